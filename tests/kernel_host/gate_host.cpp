// What metal/gate_params.h and gate_cuda.h say, for the tests: they bind and launch the kernels by the numbers that the
// host code uses.
#include <cstring>
#include <string>

#include "gate_cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// max_threads: 0 for what the GPU admits.
EXPORT void gate_host_grid(bool cuda, unsigned rows, unsigned channels, unsigned max_threads, unsigned* out) {
  GateTuning tuning = cuda ? gate_cuda_tuning() : gate_metal_tuning();
  tuning.threads = max_threads > 0 ? max_threads : tuning.threads;
  const GateGrid grid = gate_grid(rows, channels, tuning);
  out[0] = grid.threads;
  out[1] = grid.rows_per_group;
  out[2] = grid.groups;
  out[3] = unsigned(grid.packs);
}

// shape: batches, tokens, channels, batches and tokens of shift and scale. numbers: c4 to c0, range, threshold, eps.
EXPORT unsigned gate_host_params(
    const unsigned* shape,
    const float* numbers,
    int has_range,
    int max_consecutive_skips,
    int in_place,
    const unsigned* grid,
    void* out) {
  GateRules rules{};
  std::memcpy(rules.coefficients, numbers, sizeof rules.coefficients);
  rules.range_lo = numbers[5];
  rules.range_hi = numbers[6];
  rules.has_range = has_range;
  rules.threshold = numbers[7];
  rules.max_consecutive_skips = max_consecutive_skips;
  const GateGrid g{grid[0], grid[1], grid[2], int(grid[3])};
  const GateParams p = gate_params(shape[0], shape[1], shape[2], shape[3], shape[4], numbers[8], in_place, rules, g);
  std::memcpy(out, &p, sizeof p);
  return sizeof p;
}

EXPORT int gate_host_buffer(const char* name) {
  const struct {
    const char* name;
    int index;
  } buffers[] = {
      {"x", kBufferX},
      {"shift", kBufferShift},
      {"scale", kBufferScale},
      {"anchor", kBufferAnchor},
      {"weights", kBufferWeights},
      {"state", kBufferState},
      {"force", kBufferForce},
      {"modulated", kBufferModulated},
      {"new_state", kBufferNewState},
      {"reused0", kBufferReused0},
      {"reused1", kBufferReused1},
      {"partials", kBufferPartials},
      {"counter", kBufferCounter},
      {"params", kBufferParams},
      {"residual0", kBufferResidual0},
  };
  for (auto& b : buffers) {
    if (std::strcmp(b.name, name) == 0) {
      return b.index;
    }
  }
  return -1;
}

EXPORT int gate_host_max_residuals() {
  return kGateMaxResiduals;
}

// The CUDA kernel's body, its inputs' or its outputs' names with spaces between.
EXPORT const char* gate_host_cuda(int what) {
  static std::string text;
  const auto joined = [&](const auto& names) {
    text.clear();
    for (const char* name : names) {
      text += text.empty() ? name : std::string(" ") + name;
    }
    return text.c_str();
  };
  return what == 0 ? kGateCudaBody : what == 1 ? joined(kGateCudaInputs) : joined(kGateCudaOutputs);
}

EXPORT int gate_host_cuda_threads() {
  return kGateCudaThreads;
}

EXPORT int gate_host_partials() {
  return kGatePartials;
}
