// In place of MLX's header, which is not in its package: what the kernels take from it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace mlx::core::cu {

struct Strides {
  long long of[10];
};

}  // namespace mlx::core::cu
