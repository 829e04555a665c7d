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

// An array whose launch passes `given` by value: see gate_cuda.h. It shares `any`'s memory, since it needs some.
mx::array launch_view(const GateLaunch& given, const mx::array& any) {
  mx::Strides words(kGateLaunchWords, 0);
  std::memcpy(words.data(), &given, sizeof given);
  mx::array view(mx::Shape(kGateLaunchWords, 1), any.dtype(), nullptr, {});
  view.copy_shared_buffer(any, words, any.flags(), any.data_size());
  return view;
}

// An output that a launch does without. MLX orders launches by the addresses of buffers: where a later one has this
// one's address, that is an edge too many.
mx::array nothing(mx::Dtype dtype) {
  return mx::array(mx::Shape{0}, dtype, nullptr, {});
}

}  // namespace

Gpu gpu() {
  static const Gpu kind = mx::cu::is_available() && mx::is_available(mx::Device::gpu) ? Gpu::cuda : Gpu::none;
  return kind;
}

// An event that anything waits for is recorded after what came before it has been launched.
void commit_gpu_streams() {}

// MLX keeps an operation's outputs until its kernels are done, and keeps nothing else that an eval_gpu makes.
std::optional<mx::Shape> gate_scratch(const mx::Shape& x) {
  return mx::Shape{int(kGatePartials * gate_grid(gate_rows(x), x[2], gate_cuda_tuning()).groups)};
}

void Gate::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  static const auto& kernel = *new mx::fast::CustomKernelFunction(
      mx::fast::cuda_kernel(
          "teacache_gate", {std::begin(kGateCudaInputs), std::end(kGateCudaInputs)},
          {std::begin(kGateCudaOutputs), std::end(kGateCudaOutputs)}, kGateCudaBody, gate_source,
          /*ensure_row_contiguous=*/false));

  const auto& x = inputs[kX];
  const auto& mod = inputs[kScale];
  const auto& state = inputs[kState];
  const auto& partials = outputs.back();
  const auto grid = gate_grid(gate_rows(x.shape()), x.shape(2), gate_cuda_tuning());
  const auto params = gate_params(
      x.shape(0), x.shape(1), x.shape(2), mod.shape(0), mod.shape(1), eps_, /*in_place=*/false, rules_, grid);

  // Absent residuals repeat the first, or x; what is absent of the results has no elements.
  const int n_residuals = n_branches_ * n_terms_;
  std::vector<mx::array> residuals;
  for (int i = 0; i < kGateMaxResiduals; i++) {
    residuals.push_back(n_residuals > 0 ? inputs[kResiduals + (i < n_residuals ? i : 0)] : x);
  }
  const auto reused_dtype = mx::result_type(x, residuals[0]);

  // Whole 16-byte words, if every array begins at one and a row ends with one.
  bool aligned = x.shape(2) % kGatePack == 0;
  for (int i = 0; i < int(inputs.size()); i++) {
    aligned &= (i > kAnchor && i < kResiduals) || inputs[i].offset() % 16 == 0;
  }

  // Builds the node and evaluates it here and now into `out`, whose memory that allocates.
  auto launch = [&](bool decides, const mx::array& sums, std::vector<mx::array>&& out, int groups, int threads) {
    std::vector<mx::array> in{x, inputs[kShift], mod, inputs[kAnchor], n_residuals > 0 ? inputs[kWeights] : state};
    in.insert(in.end(), residuals.begin(), residuals.end());
    in.insert(in.end(), {sums, state, inputs[kForce], launch_view({params, decides}, state)});
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    for (auto& o : out) {
      shapes.push_back(o.shape());
      dtypes.push_back(o.dtype());
    }
    auto node = kernel(
        in, shapes, dtypes, {groups * threads, 1, 1}, {threads, 1, 1},
        {{"X", x.dtype()},
         {"M", mod.dtype()},
         {"R", residuals[0].dtype()},
         {"MODULATES", modulates_},
         {"BRANCHES", n_branches_},
         {"TERMS", n_terms_},
         {"PACKS", grid.packs},
         {"ALIGNED", aligned}},
        std::nullopt, false, stream());
    node[0].primitive().eval_gpu(in, out);
  };
  auto reused = [&](int b) { return b < n_branches_ ? outputs[kReused + b] : nothing(reused_dtype); };
  launch(
      false, state, {outputs[kModulated], reused(0), reused(1), partials, nothing(mx::float32)}, grid.groups,
      grid.threads);
  launch(
      true, partials,
      {nothing(outputs[kModulated].dtype()), nothing(reused_dtype), nothing(reused_dtype), nothing(mx::float32),
       outputs[kNewState]},
      1, kGateCudaThreads);
}

}  // namespace teacache
