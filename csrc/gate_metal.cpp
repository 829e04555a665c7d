// GATE on Metal: pipelines, buffers and dispatch of metal/gate.metal.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "gate.h"
#include "gate_params.h"
#include "gate_source.h"  // the kernel's text, made by cmake/embed_kernel.py
#include "mlx/backend/metal/device.h"

namespace teacache {

static_assert(kGateMaxResiduals == kMaxBranches * kMaxTerms && kMaxBranches == 2);

namespace {

const char* metal_type(mx::Dtype t) {
  return t == mx::float32 ? "float" : t == mx::float16 ? "half" : "bfloat";
}

std::string metal_bool(bool b) {
  return b ? "true" : "false";
}

// Fences between threadgroups, which one dispatch needs, came with Metal 3.2 (macOS 15), for which MLX compiles where
// it can; MLX's own fences between kernels ask for the same family of GPUs. MLX_TEACACHE_FAST_METAL_DISPATCHES=2 has
// the older way measured and tested on newer systems.
bool one_dispatch(mx::metal::Device& device) {
  if (const char* set = std::getenv("MLX_TEACACHE_FAST_METAL_DISPATCHES"); set && std::string(set) == "2") {
    return false;
  }
  if (__builtin_available(macOS 15, *)) {
    return device.mtl_device()->supportsFamily(MTL::GPUFamilyMetal3);
  }
  return false;
}

// Compiled at first use, one library for each variant: all of them would be hundreds.
MTL::Library* library_of(mx::metal::Device& device, const std::string& kernel, const std::string& arguments) {
  return device.get_library("mlx_teacache_fast_" + kernel, [&] {
    return std::string(gate_source) + "\ninstantiate_kernel(\"" + kernel + "\", gate, " + arguments + ")\n";
  });
}

}  // namespace

Gpu gpu() {
  return mx::is_available(mx::Device::gpu) ? Gpu::metal : Gpu::none;
}

std::optional<mx::Shape> gate_scratch(const mx::Shape&) {
  return std::nullopt;
}

// What MLX's own gpu::finalize does, which libmlx does not export, for every stream: which ones an evaluation has used
// is not known here.
void commit_gpu_streams() {
  auto pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
  for (auto& s : mx::get_streams()) {
    if (s.device == mx::Device::gpu) {
      try {
        auto& encoder = mx::metal::get_command_encoder(s);
        encoder.end_encoding();
        encoder.commit();
      } catch (const std::runtime_error&) {
        // Another thread's stream: no evaluation on this one can have used it.
      }
    }
  }
}

void Gate::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate_outputs(inputs, outputs, [](mx::array& out) { out.set_data(mx::allocator::malloc(out.nbytes())); });
  const auto& x = inputs[kX];
  const auto& mod = inputs[kScale];
  // Where nothing is reused, x stands in for residuals and the new state for results: neither is read or written.
  const int n_residuals = n_branches_ * n_terms_;
  auto residual = [&](int i) -> const mx::array& { return n_residuals > 0 ? inputs[kResiduals + i] : x; };
  auto& device = mx::metal::device(stream().device);

  const unsigned int rows = gate_rows(x.shape());
  const unsigned int channels = x.shape(2);

  // Whole 16-byte words, if every array begins at one and a row ends with one.
  bool aligned = channels % kGatePack == 0;
  for (int i = 0; i < int(inputs.size()); i++) {
    aligned &= (i > kAnchor && i < kResiduals) || inputs[i].offset() % 16 == 0;
  }
  const bool one = one_dispatch(device);
  const std::string types[] = {metal_type(x.dtype()), metal_type(mod.dtype()), metal_type(residual(0).dtype())};
  MTL::Library* library;
  auto kernel_with = [&](int packs) {
    std::string name = "gate";
    std::string arguments;
    for (auto& argument :
         {types[0], types[1], types[2], metal_bool(modulates_), std::to_string(n_branches_), std::to_string(n_terms_),
          std::to_string(packs), metal_bool(aligned), metal_bool(one)}) {
      name += "_" + argument;
      arguments += (arguments.empty() ? "" : ", ") + argument;
    }
    library = library_of(device, name, arguments);
    return device.get_kernel(name, library);
  };
  // A pipeline that needs many registers admits fewer threads: then each takes more of a row.
  auto tuning = gate_metal_tuning();
  auto grid = gate_grid(rows, channels, tuning);
  auto* kernel = kernel_with(grid.packs);
  while (kernel->maxTotalThreadsPerThreadgroup() < grid.threads) {
    tuning.threads = kernel->maxTotalThreadsPerThreadgroup() / kGateSimdWidth * kGateSimdWidth;
    grid = gate_grid(rows, channels, tuning);
    kernel = kernel_with(grid.packs);
  }
  const bool in_place = outputs[kModulated].data_shared_ptr() == inputs[kAnchor].data_shared_ptr();
  const GateParams params =
      gate_params(x.shape(0), x.shape(1), channels, mod.shape(0), mod.shape(1), eps_, in_place, rules_, grid);

  // Partial sums and, in the last word, the counter: of this evaluation alone, so that two gates in flight share
  // nothing. MLX keeps the array until the GPU is done.
  const int n_partials = int(kGatePartials * grid.groups);
  mx::array partials({n_partials + 1}, mx::uint32, nullptr, {});
  partials.set_data(mx::allocator::malloc(partials.nbytes()));
  partials.data<uint32_t>()[n_partials] = 0;

  auto& encoder = mx::metal::get_command_encoder(stream());
  encoder.add_temporary(partials);
  // An array without elements has no buffer; any other one stands in, since nothing is read or written.
  auto bind_input = [&](const mx::array& a, int index) {
    encoder.set_input_array(a.size() > 0 ? a : inputs[kState], index);
  };
  auto bind_output = [&](mx::array& a, int index) {
    encoder.set_output_array(a.size() > 0 ? a : outputs[kNewState], index);
  };
  encoder.set_compute_pipeline_state(kernel);
  bind_input(x, kBufferX);
  bind_input(inputs[kShift], kBufferShift);
  bind_input(mod, kBufferScale);
  bind_input(inputs[kAnchor], kBufferAnchor);
  bind_input(inputs[kWeights], kBufferWeights);
  bind_input(inputs[kState], kBufferState);
  bind_input(inputs[kForce], kBufferForce);
  for (int i = 0; i < kGateMaxResiduals; i++) {
    bind_input(residual(i < n_residuals ? i : 0), kBufferResidual0 + i);
  }
  bind_output(outputs[kModulated], kBufferModulated);
  bind_output(outputs[kNewState], kBufferNewState);
  bind_output(outputs[n_branches_ > 0 ? int(kReused) : int(kNewState)], kBufferReused0);
  bind_output(outputs[n_branches_ > 0 ? kReused + n_branches_ - 1 : int(kNewState)], kBufferReused1);
  bind_output(partials, kBufferPartials);
  encoder.set_output_array(partials, kBufferCounter, n_partials * sizeof(uint32_t));
  encoder.set_bytes(params, kBufferParams);
  encoder.dispatch_threadgroups(MTL::Size(grid.groups, 1, 1), MTL::Size(grid.threads, 1, 1));
  if (one) {
    return;
  }

  kernel = device.get_kernel("gate_decide_sums", library);
  const size_t threads = std::min<size_t>(256, kernel->maxTotalThreadsPerThreadgroup());
  encoder.set_compute_pipeline_state(kernel);
  bind_input(inputs[kState], kBufferState);
  bind_input(inputs[kForce], kBufferForce);
  bind_input(partials, kBufferPartials);
  bind_output(outputs[kNewState], kBufferNewState);
  encoder.set_bytes(params, kBufferParams);
  encoder.dispatch_threadgroups(MTL::Size(1, 1, 1), MTL::Size(threads, 1, 1));
}

}  // namespace teacache
