// GATE: argument checks, promotion and the graph node. Backends are in gate_cpu.cpp, gate_metal.cpp and gate_cuda.cpp.
#include "gate.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace teacache {

namespace {

void check_floating(const char* name, const mx::array& a) {
  auto t = a.dtype();
  if (t != mx::float32 && t != mx::float16 && t != mx::bfloat16) {
    reject("[gate] ", name, " must be float32, float16 or bfloat16, got ", t);
  }
}

// Asked before MLX looks for a stream, which it does not find where there is no GPU.
bool asks_for_gpu(const mx::StreamOrDevice& s) {
  if (auto* type = std::get_if<mx::Device::DeviceType>(&s)) {
    return *type == mx::Device::gpu;
  }
  if (auto* device = std::get_if<mx::Device>(&s)) {
    return *device == mx::Device::gpu;
  }
  return mx::to_stream(s).device == mx::Device::gpu;
}

// [B, D], [B, 1, D] or [B, S, D] -> [B or 1, 1 or S, D], packed
mx::array modulation(const char* name, const mx::array& a, const mx::array& x, mx::Stream s) {
  check_floating(name, a);
  const int b = x.shape(0), n = x.shape(1), d = x.shape(2);
  auto m = a.ndim() == 2 ? mx::expand_dims(a, 1, s) : a;
  if (m.ndim() != 3 || (m.shape(0) != b && m.shape(0) != 1) || (m.shape(1) != n && m.shape(1) != 1) ||
      m.shape(2) != d) {
    reject(
        "[gate] ", name, " must have shape ", mx::Shape{b, d}, ", ", mx::Shape{b, 1, d}, " or ", mx::Shape{b, n, d},
        ", got ", a.shape());
  }
  return mx::contiguous(m, false, s);
}

}  // namespace

int gate_rows(const mx::Shape& x) {
  const int64_t rows = int64_t(x[0]) * x[1];
  if (rows > std::numeric_limits<int>::max()) {
    reject("[gate] x must have fewer than 2^31 rows (batch * tokens), got ", x);
  }
  return x[2] > 0 ? rows : 0;
}

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
    mx::StreamOrDevice s_) {
  if (asks_for_gpu(s_)) {
    require_gpu("gate");
  }
  auto s = mx::to_stream(s_);
  if (s.device == mx::Device::cpu) {
    gate_cpu_threads();  // an error of the environment is one of the call
  }

  if (x.ndim() != 3) {
    reject("[gate] x must have shape (batch, tokens, channels), got ", x.shape());
  }
  check_floating("x", x);
  const bool modulates = shift.has_value();
  if (scale.has_value() != modulates) {
    reject("[gate] shift and scale must be two arrays or both None, got None for ", modulates ? "scale" : "shift");
  }
  // contiguous() copies only what is not packed; the flags are known at evaluation, not here.
  auto packed = [&](const mx::array& a) { return mx::contiguous(a, false, s); };
  const auto packed_x = packed(x);
  auto shift3 = modulates ? modulation("shift", *shift, x, s) : packed_x;
  auto scale3 = modulates ? modulation("scale", *scale, x, s) : packed_x;
  if (shift3.shape() != scale3.shape() || shift3.dtype() != scale3.dtype()) {
    reject(
        "[gate] shift and scale must have one shape and dtype, got ", shift->dtype(), " ", shift->shape(), " and ",
        scale->dtype(), " ", scale->shape());
  }
  auto modulated_dtype = mx::result_type(x, shift3);
  if (anchor.shape() != x.shape()) {
    reject("[gate] anchor must have x's shape ", x.shape(), ", got ", anchor.shape());
  }
  if (anchor.dtype() != modulated_dtype) {
    reject("[gate] anchor must have the modulated input's dtype ", modulated_dtype, ", got ", anchor.dtype());
  }

  const int n_branches = residuals.size();
  if (n_branches > kMaxBranches) {
    reject("[gate] residuals must be a list of at most 2 branches, got ", n_branches);
  }
  if (n_branches > 0 && !modulates) {
    reject(
        "[gate] residuals must be empty where x is the modulated input (shift and scale None), got ", n_branches,
        " branches");
  }
  const int n_terms = n_branches > 0 ? residuals[0].size() : 0;
  if (n_branches > 0 && (n_terms < 1 || n_terms > kMaxTerms)) {
    reject("[gate] a branch must have 1 to ", kMaxTerms, " residual terms, got ", n_terms);
  }
  for (int b = 0; b < n_branches; b++) {
    if (int(residuals[b].size()) != n_terms) {
      reject(
          "[gate] every branch must have as many residual terms as the first, ", n_terms, ", got ",
          residuals[b].size());
    }
    for (int k = 0; k < n_terms; k++) {
      auto& r = residuals[b][k];
      std::string name = "residuals[" + std::to_string(b) + "][" + std::to_string(k) + "]";
      check_floating(name.c_str(), r);
      if (r.shape() != x.shape()) {
        reject("[gate] ", name, " must have x's shape ", x.shape(), ", got ", r.shape());
      }
      if (r.dtype() != residuals[0][0].dtype()) {
        reject("[gate] ", name, " must have the first residual's dtype ", residuals[0][0].dtype(), ", got ", r.dtype());
      }
    }
  }
  if (weights.shape() != mx::Shape{n_branches, n_terms} || weights.dtype() != mx::float32) {
    reject(
        "[gate] weights must be float32 of shape ", mx::Shape{n_branches, n_terms}, ", got ", weights.dtype(), " ",
        weights.shape());
  }
  if (state.shape() != mx::Shape{8} || state.dtype() != mx::float32) {
    reject("[gate] state must be float32 of shape (8), got ", state.dtype(), " ", state.shape());
  }
  if (force.ndim() != 0 || force.dtype() != mx::int32) {
    reject("[gate] force must be an int32 scalar, got ", force.dtype(), " ", force.shape());
  }

  GateRules rules{};
  if (coefficients.size() != 5) {
    reject("[gate] coefficients must be 5 numbers, c4 first, got ", coefficients.size());
  }
  for (int i = 0; i < 5; i++) {
    if (!std::isfinite(coefficients[i])) {
      reject("[gate] coefficients must be finite, got ", coefficients[i], " at ", i);
    }
    rules.coefficients[i] = coefficients[i];
  }
  if (!std::isfinite(threshold)) {
    reject("[gate] threshold must be finite, got ", threshold);
  }
  rules.threshold = threshold;
  if (calibrated_range) {
    auto [lo, hi] = *calibrated_range;
    if (!(std::isfinite(lo) && std::isfinite(hi) && lo <= hi)) {
      reject("[gate] calibrated_range must be (lo, hi) with lo <= hi, got (", lo, ", ", hi, ")");
    }
    rules.has_range = 1;
    rules.range_lo = lo;
    rules.range_hi = hi;
  }
  if (max_consecutive_skips < 0) {
    reject("[gate] max_consecutive_skips must not be negative, got ", max_consecutive_skips);
  }
  rules.max_consecutive_skips = max_consecutive_skips;
  if (!(std::isfinite(eps) && eps >= 0)) {
    reject("[gate] eps must be finite and not negative, got ", eps);
  }

  std::vector<mx::array> inputs{packed_x, shift3, scale3, packed(anchor), packed(weights), packed(state), force};
  for (auto& branch : residuals) {
    for (auto& term : branch) {
      inputs.push_back(packed(term));
    }
  }
  auto primitive = std::make_shared<Gate>(s, rules, modulates, eps, n_branches, n_terms);
  auto shapes = primitive->output_shapes(inputs);
  std::vector<mx::Dtype> dtypes{modulated_dtype, mx::float32};
  for (auto& branch : residuals) {
    dtypes.push_back(mx::result_type(x, branch[0]));
  }
  dtypes.resize(shapes.size(), mx::float32);
  auto outputs = mx::array::make_arrays(std::move(shapes), dtypes, primitive, inputs);
  const auto reused = outputs.begin() + Gate::kReused;
  return {modulates ? outputs[Gate::kModulated] : packed_x, {reused, reused + n_branches}, outputs[Gate::kNewState]};
}

bool Gate::is_equivalent(const mx::Primitive& other_) const {
  auto& other = static_cast<const Gate&>(other_);
  const auto& a = rules_;
  const auto& b = other.rules_;
  return on_gpu_ == other.on_gpu_ &&
         std::equal(std::begin(a.coefficients), std::end(a.coefficients), std::begin(b.coefficients)) &&
         a.has_range == b.has_range && a.range_lo == b.range_lo && a.range_hi == b.range_hi &&
         a.threshold == b.threshold && a.max_consecutive_skips == b.max_consecutive_skips &&
         modulates_ == other.modulates_ && eps_ == other.eps_ && n_branches_ == other.n_branches_ &&
         n_terms_ == other.n_terms_;
}

void Gate::allocate_outputs(
    const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, void (*allocate)(mx::array&)) const {
  if (inputs.empty()) {  // a sibling cleared them
    reject_second_try();
  }
  // The siblings hold their own references to the inputs; without them the anchor can be donated: each of its elements
  // is read before that element of the modulated input is written.
  for (auto& out : outputs) {
    if (&out.inputs() != &inputs && !out.is_tracer()) {
      out.inputs().clear();
    }
  }
  const auto& anchor = inputs[kAnchor];
  if (modulates_ && anchor.is_donatable()) {
    outputs[kModulated].copy_shared_buffer(anchor);
  } else {
    allocate(outputs[kModulated]);
  }
  for (size_t i = kNewState; i < outputs.size(); i++) {
    allocate(outputs[i]);
  }
}

std::vector<mx::Shape> Gate::output_shapes(const std::vector<mx::array>& inputs) {
  gate_rows(inputs[kX].shape());  // throws also where mx.compile(shapeless=True) asks for new shapes
  std::vector<mx::Shape> shapes(kReused + n_branches_, inputs[kX].shape());
  shapes[kNewState] = inputs[kState].shape();
  if (!modulates_) {
    shapes[kModulated] = mx::Shape{0};
  }
  if (auto scratch = on_gpu_ ? gate_scratch(inputs[kX].shape()) : std::nullopt) {
    shapes.push_back(*scratch);
  }
  return shapes;
}

}  // namespace teacache
