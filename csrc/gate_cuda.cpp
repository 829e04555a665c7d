// GATE on CUDA: launches of metal/gate.cu, through MLX's public fast::cuda_kernel. Of MLX's CUDA backend libmlx exports
// nothing else that could launch a kernel; and so one build of the extension is for the CPU's libmlx and for CUDA's.
#include "gate_cuda.h"

#include <cstring>
#include <iterator>

#include "gate.h"
#include "gate_source.h"  // the kernels' text, made by cmake/embed_kernel.py
#include "mlx/backend/cuda/cuda.h"
#include "mlx/fast.h"

namespace teacache {

static_assert(kGateMaxResiduals == kMaxBranches * kMaxTerms && kMaxBranches == 2);

namespace {

template <size_t n_in, size_t n_out>
mx::fast::CustomKernelFunction make_kernel(
    const char* name, const char* const (&inputs)[n_in], const char* const (&outputs)[n_out], const char* body) {
  return mx::fast::cuda_kernel(
      name, {std::begin(inputs), std::end(inputs)}, {std::begin(outputs), std::end(outputs)}, body, gate_source,
      /*ensure_row_contiguous=*/false);
}

// An array whose launch passes `params` by value: see gate_cuda.h. It shares `any`'s memory, since it needs some.
mx::array launch_view(const GateParams& params, const mx::array& any) {
  mx::Strides words(kGateLaunchWords, 0);
  std::memcpy(words.data(), &params, sizeof params);
  mx::array view(mx::Shape(kGateLaunchWords, 1), any.dtype(), nullptr, {});
  view.copy_shared_buffer(any, words, any.flags(), any.data_size());
  return view;
}

// Builds the node and evaluates it here and now into `outputs`, whose memory the evaluation allocates.
void launch(
    const mx::fast::CustomKernelFunction& kernel,
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>&& outputs,
    unsigned int groups,
    unsigned int threads,
    const std::vector<std::pair<std::string, mx::fast::TemplateArg>>& arguments,
    mx::Stream s) {
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (auto& out : outputs) {
    shapes.push_back(out.shape());
    dtypes.push_back(out.dtype());
  }
  auto node = kernel(
      inputs, shapes, dtypes, {int(groups * threads), 1, 1}, {int(threads), 1, 1}, arguments, std::nullopt, false, s);
  node[0].primitive().eval_gpu(inputs, outputs);
}

}  // namespace

Gpu gpu() {
  static const Gpu kind = mx::cu::is_available() ? Gpu::cuda : Gpu::none;
  return kind;
}

// An event that anything waits for is recorded after what came before it has been launched.
void commit_gpu_streams() {}

// MLX keeps an operation's outputs until its kernels are done, and keeps nothing else that an eval_gpu makes.
std::optional<mx::Shape> gate_scratch(const mx::Shape& x) {
  return mx::Shape{int(kGatePartials * gate_grid(x[0] * x[1], x[2], gate_cuda_tuning()).groups)};
}

void Gate::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  static const auto& rows_kernel =
      *new auto(make_kernel("teacache_gate_rows", kGateRowsInputs, kGateRowsOutputs, kGateRowsBody));
  static const auto& decide_kernel =
      *new auto(make_kernel("teacache_gate_decide", kGateDecideInputs, kGateDecideOutputs, kGateDecideBody));

  const auto& x = inputs[kX];
  const auto& mod = inputs[kScale];
  const auto& state = inputs[kState];
  auto& partials = outputs.back();
  const auto grid = gate_grid(x.shape(0) * x.shape(1), x.shape(2), gate_cuda_tuning());
  const auto params = launch_view(
      gate_params(
          x.shape(0), x.shape(1), x.shape(2), mod.shape(0), mod.shape(1), eps_, /*in_place=*/false, rules_, grid),
      state);

  // Whole 16-byte words, if every array begins at one and a row ends with one.
  bool aligned = x.shape(2) % kGatePack == 0;
  for (int i = 0; i < int(inputs.size()); i++) {
    aligned &= (i > kAnchor && i < kResiduals) || inputs[i].offset() % 16 == 0;
  }

  // Absent residuals repeat the first, or x; absent results have no elements. Neither is read or written.
  const int n_residuals = n_branches_ * n_terms_;
  std::vector<mx::array> in{x,     inputs[kShift], mod, inputs[kAnchor], n_residuals > 0 ? inputs[kWeights] : state,
                            params};
  for (int i = 0; i < kGateMaxResiduals; i++) {
    in.push_back(n_residuals > 0 ? inputs[kResiduals + (i < n_residuals ? i : 0)] : x);
  }
  const auto residual_dtype = in.back().dtype();
  std::vector<mx::array> out{outputs[kModulated]};
  for (int b = 0; b < kMaxBranches; b++) {
    out.push_back(
        b < n_branches_ ? outputs[kReused + b] : mx::array(mx::Shape{0}, mx::result_type(x, in.back()), nullptr, {}));
  }
  out.push_back(partials);
  launch(
      rows_kernel, in, std::move(out), grid.groups, grid.threads,
      {{"X", x.dtype()},
       {"M", mod.dtype()},
       {"R", residual_dtype},
       {"BRANCHES", n_branches_},
       {"TERMS", n_terms_},
       {"PACKS", grid.packs},
       {"ALIGNED", aligned}},
      stream());
  launch(
      decide_kernel, {partials, state, inputs[kForce], params}, {outputs[kNewState]}, 1, kGateCudaThreads, {},
      stream());
}

}  // namespace teacache
