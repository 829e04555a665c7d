// BRANCH: evaluates a captured body, or nothing, by one bool that is read on the host.
#pragma once

#include <atomic>
#include <memory>

#include "forward_only.h"
#include "graph_capture.h"

namespace teacache {

// What evaluations did since the start of the process or the last reset.
struct BranchCounters {
  std::atomic<int64_t> reads{0};     // decisions read on the host
  std::atomic<int64_t> computed{0};  // bodies evaluated
  std::atomic<int64_t> reused{0};    // bodies left out
};
BranchCounters& branch_counters();

// skip: bool scalar, or a gate's state (float32[8]). True: on_skip. False: (*body)(inputs).
// Throws std::invalid_argument where on_skip or inputs do not have the body's shapes and dtypes.
Arrays branch(
    const mx::array& skip, const Arrays& on_skip, std::shared_ptr<const CapturedGraph> body, const Arrays& inputs);

// Reads the decision on the calling thread, once; every branch on it then needs no wait of its own. Without it the
// second branch of a step would wait for the whole body of the first.
class Decide : public ForwardOnly {
 public:
  Decide(mx::Stream stream, mx::Stream work) : ForwardOnly(stream), work_(work) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  const char* name() const override {
    return "TeaCacheDecide";
  }

 protected:
  const char* op_name() const override {
    return "branch";
  }

 private:
  mx::Stream work_;  // where the decision is computed
};

class Branch : public ForwardOnly {
 public:
  Branch(mx::Stream stream, std::shared_ptr<const CapturedGraph> body) : ForwardOnly(stream), body_(std::move(body)) {}

  // Inputs: the decision, one array on_skip for each output, the body's inputs.
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  const char* name() const override {
    return "TeaCacheBranch";
  }

 protected:
  const char* op_name() const override {
    return "branch";
  }

 private:
  std::shared_ptr<const CapturedGraph> body_;
};

}  // namespace teacache
