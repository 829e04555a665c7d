// What MLX makes the CUDA kernel of: its arguments' names and its body, one text for the host code and its tests.
// MLX declares each argument by its array's dtype and X, M, R, MODULATES, BRANCHES, TERMS, PACKS and ALIGNED as
// constants.
//
// It is launched twice, for the pass over the rows and for the decision: what the other launch needs is then without
// elements or stands in unread. Two kernels would be compiled one after the other, and that is nearly all headers.
#pragma once

#include "gate_params.h"

// A kernel made by fast::cuda_kernel has no scalar arguments but an input's shape and strides, which the launch passes
// by value if the body names them. `launch` is a view whose strides are a GateLaunch; its memory is not touched.
constexpr int kGateLaunchWords = 10;  // of 64 bits: MLX's greatest number of axes
static_assert(sizeof(GateLaunch) <= 8 * kGateLaunchWords);

constexpr const char* kGateCudaInputs[] = {
    "x",         "shift",     "scale",     "anchor",    "weights", "residual0", "residual1", "residual2", "residual3",
    "residual4", "residual5", "residual6", "residual7", "sums",    "state",     "force",     "launch",
};
constexpr const char* kGateCudaOutputs[] = {"modulated", "reused0", "reused1", "partials", "new_state"};
constexpr const char* kGateCudaBody =
    "  const GateLaunch& given = reinterpret_cast<const GateLaunch&>(launch_strides);\n"
    "  if (given.decides) {\n"
    "    ::teacache::gate_decide_sums(given.params, sums, state, force, new_state);\n"
    "    return;\n"
    "  }\n"
    "  ::teacache::gate_rows<MODULATES, BRANCHES, TERMS, PACKS, ALIGNED>(\n"
    "      given.params, x, shift, scale, anchor, weights,\n"
    "      ::teacache::Residuals<R>{{residual0, residual1, residual2, residual3,\n"
    "                                residual4, residual5, residual6, residual7}},\n"
    "      modulated, reused0, reused1, partials);\n";
