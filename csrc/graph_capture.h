// A traced body as a pure function of its inputs, replayed without Python.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "mlx/mlx.h"

namespace teacache {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

class CapturedGraph {
 public:
  // Calls fn once, on placeholders of these shapes and dtypes, and keeps what it built, fused as mx.compile fuses.
  // Arrays that do not depend on a placeholder (weights) are evaluated now and kept as constants; without fold those of
  // them that are lazy are computed at each call, as a function of mx.compile does, but for what is read from files.
  // Throws std::invalid_argument if fn reaches a placeholder of another trace; what fn throws passes through.
  CapturedGraph(
      const std::function<Arrays(const Arrays&)>& fn,
      const std::vector<mx::Shape>& shapes,
      const std::vector<mx::Dtype>& dtypes,
      bool fold = true);

  // The same graph on real inputs, which must have the traced shapes and dtypes. Lazy.
  Arrays operator()(const Arrays& inputs) const;

  const std::vector<mx::Shape>& input_shapes() const {
    return input_shapes_;
  }
  const std::vector<mx::Dtype>& input_dtypes() const {
    return input_dtypes_;
  }
  const std::vector<mx::Shape>& output_shapes() const {
    return output_shapes_;
  }
  const std::vector<mx::Dtype>& output_dtypes() const {
    return output_dtypes_;
  }
  bool reads_input(int i) const {
    return input_read_[i];
  }
  // Where the outputs are computed: the stream of the first that is; none if all are inputs or constants.
  std::optional<mx::Stream> output_stream() const {
    return output_stream_;
  }
  // Whether every node runs on s.
  bool runs_on(mx::Stream s) const {
    return streams_.empty() || (streams_.size() == 1 && *streams_.begin() == s);
  }

 private:
  // A straight-line program over slots: the inputs, then the constants, then each node's outputs in order.
  struct Node {
    std::shared_ptr<mx::Primitive> primitive;
    std::vector<int> inputs;
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
  };

  void record(const Arrays& placeholders, const Arrays& outputs);

  std::vector<mx::Shape> input_shapes_;
  std::vector<mx::Dtype> input_dtypes_;
  std::vector<bool> input_read_;
  Arrays constants_;
  std::vector<Node> nodes_;
  std::vector<int> output_slots_;
  std::vector<mx::Shape> output_shapes_;
  std::vector<mx::Dtype> output_dtypes_;
  std::set<mx::Stream> streams_;
  std::optional<mx::Stream> output_stream_;
};

}  // namespace teacache
