// A traced body as a pure function of its inputs, replayed without Python.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <set>
#include <vector>

#include "mlx/mlx.h"

namespace teacache {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

class CapturedGraph {
 public:
  // Calls fn once, on placeholders of these shapes and dtypes, and keeps what it built, fused as mx.compile fuses.
  // Arrays that do not depend on a placeholder (weights) are evaluated now and kept as constants.
  // Throws std::invalid_argument if fn reaches a placeholder of another trace; what fn throws passes through.
  CapturedGraph(
      const std::function<Arrays(const Arrays&)>& fn,
      const std::vector<mx::Shape>& shapes,
      const std::vector<mx::Dtype>& dtypes);

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
  bool runs_on_gpu() const {
    return std::any_of(streams_.begin(), streams_.end(), [](auto& s) { return s.device == mx::Device::gpu; });
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
};

}  // namespace teacache
