// GATE: modulated input, relative L1 distance, decision and reuse in one pass. The rules are in gate_decision.h.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "forward_only.h"
#include "gate_decision.h"
#include "mlx/mlx.h"

namespace teacache {

constexpr int kMaxBranches = 2;
constexpr int kMaxTerms = 4;

struct GateOutputs {
  mx::array modulated;
  std::vector<mx::array> reused;  // one for each branch
  mx::array state;
};

// Arguments as documented in bindings.cpp. Throws std::invalid_argument for what the caller got wrong.
GateOutputs gate(
    mx::array x,
    const std::optional<mx::array>& shift,
    const std::optional<mx::array>& scale,
    mx::array anchor,
    const std::vector<std::vector<mx::array>>& residuals,
    mx::array weights,
    mx::array state,
    mx::array force,
    const std::vector<float>& coefficients,
    float threshold,
    std::optional<std::pair<float, float>> calibrated_range,
    int max_consecutive_skips,
    float eps,
    mx::StreamOrDevice s);

// Rows of an x of this shape that have elements. Throws std::invalid_argument where an int cannot count them.
int gate_rows(const mx::Shape& x);

// How many threads a gate on the CPU may take: MLX_TEACACHE_FAST_NUM_THREADS, or the CPU's, but at most 8. Throws
// std::invalid_argument for a value that is no number of threads.
int gate_cpu_threads();

// What a gate on this build's GPU needs besides its results, if it is to be a last output, of float32.
std::optional<mx::Shape> gate_scratch(const mx::Shape& x);

class Gate : public ForwardOnly {
 public:
  // Positions of the inputs; residuals follow, branch by branch. And of the outputs; reused follow, and scratch. Where
  // x is the modulated input, it stands in for shift and scale, which are not read, and kModulated has no elements.
  enum Input { kX, kShift, kScale, kAnchor, kWeights, kState, kForce, kResiduals };
  enum Output { kModulated, kNewState, kReused };

  Gate(mx::Stream stream, GateRules rules, bool modulates, float eps, int n_branches, int n_terms)
      : ForwardOnly(stream),
        on_gpu_(stream.device == mx::Device::gpu),
        rules_(rules),
        modulates_(modulates),
        eps_(eps),
        n_branches_(n_branches),
        n_terms_(n_terms) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  const char* name() const override {
    return "TeaCacheGate";
  }

 protected:
  const char* op_name() const override {
    return "gate";
  }

 private:
  // Gives every output its memory: by `allocate`, but the modulated input has the anchor's where that is free.
  void allocate_outputs(
      const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, void (*allocate)(mx::array&)) const;

  bool on_gpu_;
  GateRules rules_;
  bool modulates_;
  float eps_;
  int n_branches_;
  int n_terms_;
};

}  // namespace teacache
