// What MLX makes the CUDA kernels of: their arguments' names and bodies, one text for the host code and its tests.
// MLX declares each argument by its array's dtype and X, M, R, BRANCHES, TERMS, PACKS and ALIGNED as constants.
#pragma once

#include "gate_params.h"

// A kernel made by fast::cuda_kernel has no scalar arguments but an input's shape and strides, which the launch passes
// by value if the body names them. `launch` is a view whose strides are GateParams; its memory is not touched.
constexpr int kGateLaunchWords = 10;  // of 64 bits: MLX's greatest number of axes
static_assert(sizeof(GateParams) <= 8 * kGateLaunchWords);

#define GATE_LAUNCH_PARAMS "reinterpret_cast<const GateParams&>(launch_strides)"

constexpr const char* kGateRowsInputs[] = {
    "x",         "shift",     "scale",     "anchor",    "weights",   "launch",    "residual0",
    "residual1", "residual2", "residual3", "residual4", "residual5", "residual6", "residual7",
};
constexpr const char* kGateRowsOutputs[] = {"modulated", "reused0", "reused1", "partials"};
constexpr const char* kGateRowsBody =
    "  ::teacache::gate_rows<BRANCHES, TERMS, PACKS, ALIGNED>(\n"
    "      " GATE_LAUNCH_PARAMS
    ", x, shift, scale, anchor, weights,\n"
    "      ::teacache::Residuals<R>{{residual0, residual1, residual2, residual3, residual4, residual5, residual6, "
    "residual7}},\n"
    "      modulated, reused0, reused1, partials);\n";

constexpr const char* kGateDecideInputs[] = {"partials", "state", "force", "launch"};
constexpr const char* kGateDecideOutputs[] = {"new_state"};
constexpr const char* kGateDecideBody =
    "  ::teacache::gate_decide_sums(" GATE_LAUNCH_PARAMS ", partials, state, force, new_state);\n";
