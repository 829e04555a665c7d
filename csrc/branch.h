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

// Throws std::invalid_argument if the body was traced with other shapes or dtypes.
void check_inputs(const CapturedGraph& body, const Arrays& inputs);

// skip: bool scalar, or a gate's state (float32[8]), or what decide() made of one. True: on_skip. False:
// (*body)(inputs). Throws std::invalid_argument where on_skip or inputs do not have the body's shapes and dtypes.
Arrays branch(
    const mx::array& skip, const Arrays& on_skip, std::shared_ptr<const CapturedGraph> body, const Arrays& inputs);

// skip, read on the host when it is evaluated: all branches on the result share that read.
mx::array decide(const mx::array& skip);

// The stream that a branch and its decision stand on, `own`. On Metal it is the calling thread's default CPU stream,
// also where the work is the GPU's: evaluating one there may send off, wait for and extend the GPU's work, which within
// an eval_gpu is not possible. docs/metal.md goes through MLX's evaluation step by step. On CUDA it is the work's
// stream: that may all be done in an eval_gpu, and what goes from a GPU's stream to the CPU's is moved to managed
// memory. docs/cuda.md does the same for it.

// Reads the decision on the calling thread. A branch on it needs no wait of its own: without this the second branch of
// a step would wait for the whole body of the first.
class Decide : public ForwardOnly {
 public:
  using ForwardOnly::ForwardOnly;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  const char* name() const override {
    return "TeaCacheDecide";
  }

 protected:
  const char* op_name() const override {
    return "branch";
  }
};

// Hands buffers on to another stream: what reads an output is ordered after the inputs. MLX orders the streams of a
// primitive and its inputs; this gives it a place to do so.
class Relay : public ForwardOnly {
 public:
  using ForwardOnly::ForwardOnly;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  // Never: MLX merges equal nodes whatever their streams, and the stream is all that a relay is.
  bool is_equivalent(const mx::Primitive&) const override {
    return false;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  const char* name() const override {
    return "TeaCacheRelay";
  }

 protected:
  const char* op_name() const override {
    return "branch";
  }
};

class Branch : public ForwardOnly {
 public:
  Branch(mx::Stream own, std::shared_ptr<const CapturedGraph> body) : ForwardOnly(own), body_(std::move(body)) {}

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
