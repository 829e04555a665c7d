// Base of this package's primitives: evaluation only, with errors that say so. And how the ops refuse arguments.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "mlx/device.h"
#include "mlx/primitives.h"
#include "mlx/version.h"

namespace teacache {

namespace mx = mlx::core;

// Throws std::invalid_argument with the parts as its text, "[op] argument rule, got value".
template <typename... Parts>
[[noreturn]] void reject(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// The GPU that MLX uses here and this build has kernels for.
enum class Gpu { none, metal, cuda };
Gpu gpu();

// Has each GPU stream of the calling thread run what it has been given. On Metal not to be called within an eval_gpu.
void commit_gpu_streams();

// Throws std::runtime_error if this build does not support the GPU.
inline void require_gpu(const char* op_name) {
  if (gpu() != Gpu::none) {
    return;
  }
  throw std::runtime_error(
      std::string("[") + op_name + "] MLX has no GPU here: run on the CPU, with mx.set_default_device(mx.cpu) or " +
      "stream=mx.cpu (an NVIDIA GPU needs its driver and pip install \"mlx[cuda13]==" + mx::version() + "\")");
}

class ForwardOnly : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  std::vector<mx::array> jvp(
      const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&) override {
    throw std::runtime_error(message("is not differentiable: gate and skip steps at inference only"));
  }
  std::vector<mx::array> vjp(
      const std::vector<mx::array>&,
      const std::vector<mx::array>&,
      const std::vector<int>&,
      const std::vector<mx::array>&) override {
    throw std::runtime_error(message("is not differentiable: gate and skip steps at inference only"));
  }
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>&, const std::vector<int>&) override {
    throw std::runtime_error(message("has no vmap: one decision holds for the whole batch, put it in the batch axis"));
  }

 protected:
  std::string message(const char* what) const {
    return std::string("[") + op_name() + "] " + what;
  }
  // An evaluation gives up references to its inputs, so one that has failed cannot be repeated on the same arrays.
  [[noreturn]] void reject_second_try() const {
    throw std::runtime_error(message("an earlier evaluation of this step failed: build it again from its inputs"));
  }
  virtual const char* op_name() const = 0;
};

}  // namespace teacache
