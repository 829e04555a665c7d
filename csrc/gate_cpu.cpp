// GATE on the CPU: each row is read from memory once and then stays in the first-level cache for the passes over it.
// Formula: LayerNorm without affine, adaLN modulation, relative L1 (TeaCache, arXiv 2411.19108, section 3.3).
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>

#include "gate.h"
#include "mlx/backend/cpu/encoder.h"

// One body, compiled for each level of x86-64 and chosen at load. The order of every sum is fixed by kLanes and the
// build contracts no multiply-add, so that all levels give the same bits. (On Arm the baseline has NEON.)
#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_CPU __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EACH_CPU
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace teacache {

namespace {

// 64 bytes of float: one AVX-512, two AVX or four SSE/NEON registers.
constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

ALWAYS_INLINE Bits bits(Floats v) {
  return std::bit_cast<Bits>(v);
}
ALWAYS_INLINE Floats floats(Bits v) {
  return std::bit_cast<Floats>(v);
}
ALWAYS_INLINE Floats absolute(Floats v) {
  return floats(bits(v) & 0x7fffffffu);
}

// A dtype: how its elements are widened to float32 and rounded back (to nearest, ties to even, as MLX does).
struct Float32 {
  using Raw = Floats;
  static constexpr int size = 4;
  static ALWAYS_INLINE Floats widen(Raw v) {
    return v;
  }
  static ALWAYS_INLINE Raw narrow(Floats v) {
    return v;
  }
};

struct BFloat16 {
  using Raw = Halves;
  static constexpr int size = 2;
  static ALWAYS_INLINE Floats widen(Raw v) {
    return floats(__builtin_convertvector(v, Bits) << 16);
  }
  // A NaN must have a free low half, else the carry could reach its sign. Those here do: they come from bfloat16
  // elements, whose low half is 0, or from arithmetic, which makes the canonical NaN.
  static ALWAYS_INLINE Raw narrow(Floats v) {
    Bits b = bits(v);
    return __builtin_convertvector((b + 0x7fffu + ((b >> 16) & 1u)) >> 16, Halves);
  }
};

struct Float16 {
  using Raw = Halves;
  static constexpr int size = 2;
  static ALWAYS_INLINE Floats widen(Raw v) {
    Bits h = __builtin_convertvector(v, Bits);
    Bits magnitude = (h & 0x7fffu) << 13;
    // Scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
    Bits finite = bits(floats(magnitude) * 0x1p112f);
    Bits special = magnitude | 0x7f800000u;
    Bits is_special = Bits(magnitude >= 0x0f800000u);
    return floats((is_special & special) | (~is_special & finite) | ((h & 0x8000u) << 16));
  }
  static ALWAYS_INLINE Raw narrow(Floats v) {
    Bits sign = (bits(v) >> 16) & 0x8000u;
    Bits b = bits(v) & 0x7fffffffu;
    Bits normal = (b - (112u << 23) + 0xfffu + ((b >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 0.5 leaves the rounded half-precision mantissa in the low bits.
    Bits subnormal = bits(floats(b) + 0.5f) - 0x3f000000u;
    Bits is_subnormal = Bits(b < 0x38800000u);
    Bits is_large = Bits(b >= 0x47800000u);
    Bits is_nan = Bits(b > 0x7f800000u);
    Bits h = (is_subnormal & subnormal) | (~is_subnormal & normal);
    h = (is_large & 0x7c00u) | (~is_large & h);
    return __builtin_convertvector(h | (is_nan & 0x0200u) | sign, Halves);
  }
};

template <typename T>
ALWAYS_INLINE Floats load(const char* row, int i) {
  typename T::Raw v;
  std::memcpy(&v, row + size_t(i) * T::size, sizeof v);
  return T::widen(v);
}
template <typename T>
ALWAYS_INLINE void store(char* row, int i, Floats v) {
  auto raw = T::narrow(v);
  std::memcpy(row + size_t(i) * T::size, &raw, sizeof raw);
}
// The last n < kLanes elements; the rest reads as 0 and is not written.
template <typename T>
ALWAYS_INLINE Floats load_tail(const char* row, int i, int n) {
  typename T::Raw v{};
  std::memcpy(&v, row + size_t(i) * T::size, size_t(n) * T::size);
  return T::widen(v);
}
template <typename T>
ALWAYS_INLINE void store_tail(char* row, int i, int n, Floats v) {
  auto raw = T::narrow(v);
  std::memcpy(row + size_t(i) * T::size, &raw, size_t(n) * T::size);
}
template <typename T>
ALWAYS_INLINE Floats rounded(Floats v) {
  return T::widen(T::narrow(v));
}

ALWAYS_INLINE Floats first(int n, Floats v) {
  for (int l = n; l < kLanes; l++) {
    v[l] = 0;
  }
  return v;
}
// Halving tree: the same order everywhere.
ALWAYS_INLINE float sum(Floats v) {
  float t[kLanes];
  std::memcpy(t, &v, sizeof t);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; l++) {
      t[l] += t[l + half];
    }
  }
  return t[0];
}

template <typename A, typename B>
struct PromoteTypes {
  using type = Float32;
};
template <typename A>
struct PromoteTypes<A, A> {
  using type = A;
};
template <typename A, typename B>
using Promoted = typename PromoteTypes<A, B>::type;

enum class Type { f32, f16, bf16 };

Type type_of(mx::Dtype t) {
  return t == mx::float32 ? Type::f32 : t == mx::float16 ? Type::f16 : Type::bf16;
}
size_t size_of_type(Type t) {
  return t == Type::f32 ? 4 : 2;
}

struct RowSums {
  float diff;    // sum |m - anchor|
  float anchor;  // sum |anchor|
  bool finite;   // all of m
};

// Everything that a range of rows needs: addresses, sizes and types, by value.
struct Job {
  int n_rows;  // of all batches
  int tokens;
  int channels;
  float eps;
  Type x_type, mod_type, residual_type;
  const char* x;
  const char* shift;
  const char* scale;
  size_t mod_batch_stride, mod_token_stride;  // in elements; 0 where broadcast
  const char* anchor;
  const float* weights;
  char* modulated;
  int n_branches, n_terms;
  const char* residuals[kMaxBranches * kMaxTerms];
  char* reused[kMaxBranches];
};

template <typename X, typename M>
ALWAYS_INLINE RowSums modulate_row(
    const char* x, const char* scale, const char* shift, const char* anchor, char* modulated, int d, float eps) {
  using O = Promoted<X, M>;
  const int whole = d - d % kLanes;
  const int rest = d - whole;

  // LayerNorm statistics in two passes: E[x^2] - mean^2 cancels for a large mean.
  Floats total{};
  for (int i = 0; i < whole; i += kLanes) {
    total += load<X>(x, i);
  }
  if (rest) {
    total += load_tail<X>(x, whole, rest);
  }
  const float mean = sum(total) / float(d);
  Floats squares{};
  for (int i = 0; i < whole; i += kLanes) {
    Floats c = load<X>(x, i) - mean;
    squares += c * c;
  }
  if (rest) {
    Floats c = first(rest, load_tail<X>(x, whole, rest) - mean);
    squares += c * c;
  }
  const float rstd = 1.0f / std::sqrt(sum(squares) / float(d) + eps);

  // Modulation, rounded to the result's dtype after each operation as the unfused ops do, and both sums.
  Floats diff_sum{}, anchor_sum{};
  Bits not_finite{};
  auto step = [&](Floats xv, Floats scale_v, Floats shift_v, Floats a) __attribute__((always_inline)) {
    Floats norm = rounded<X>((xv - mean) * rstd);
    Floats m = rounded<O>(rounded<O>(rounded<M>(1.0f + scale_v) * norm) + shift_v);
    diff_sum += absolute(rounded<O>(m - a));
    anchor_sum += absolute(a);
    not_finite |= Bits((bits(m) & 0x7fffffffu) >= 0x7f800000u);
    return m;
  };
  for (int i = 0; i < whole; i += kLanes) {
    store<O>(modulated, i, step(load<X>(x, i), load<M>(scale, i), load<M>(shift, i), load<O>(anchor, i)));
  }
  if (rest) {
    // Lanes past the end must add nothing: keep the sums of the whole part and mask what the tail adds.
    Floats diff_before = diff_sum, anchor_before = anchor_sum;
    Bits not_finite_before = not_finite;
    Floats m = step(
        load_tail<X>(x, whole, rest), load_tail<M>(scale, whole, rest), load_tail<M>(shift, whole, rest),
        load_tail<O>(anchor, whole, rest));
    store_tail<O>(modulated, whole, rest, m);
    for (int l = rest; l < kLanes; l++) {
      diff_sum[l] = diff_before[l];
      anchor_sum[l] = anchor_before[l];
      not_finite[l] = not_finite_before[l];
    }
  }
  bool finite = true;
  for (int l = 0; l < kLanes; l++) {
    finite &= !not_finite[l];
  }
  return {sum(diff_sum), sum(anchor_sum), finite};
}

// x + sum_k weights[k] * residual_k: float32, rounded once.
template <typename X, typename R, int n_terms>
ALWAYS_INLINE void reuse_row(
    const char* x, const char* const* residuals, size_t offset, const float* weights, char* reused, int d) {
  using O = Promoted<X, R>;
  const int whole = d - d % kLanes;
  const int rest = d - whole;
  for (int i = 0; i < whole; i += kLanes) {
    Floats change = weights[0] * load<R>(residuals[0] + offset, i);
    for (int k = 1; k < n_terms; k++) {
      change += weights[k] * load<R>(residuals[k] + offset, i);
    }
    store<O>(reused, i, load<X>(x, i) + change);
  }
  if (rest) {
    Floats change = weights[0] * load_tail<R>(residuals[0] + offset, whole, rest);
    for (int k = 1; k < n_terms; k++) {
      change += weights[k] * load_tail<R>(residuals[k] + offset, whole, rest);
    }
    store_tail<O>(reused, whole, rest, load_tail<X>(x, whole, rest) + change);
  }
}

template <typename F>
ALWAYS_INLINE auto with_type(Type t, F&& f) {
  switch (t) {
    case Type::f32:
      return f(Float32{});
    case Type::f16:
      return f(Float16{});
    default:
      return f(BFloat16{});
  }
}

FOR_EACH_CPU void run_rows(const Job& job, int begin, int end, RowSums* sums) {
  const size_t d = job.channels;
  const size_t x_size = size_of_type(job.x_type);
  const size_t mod_size = size_of_type(job.mod_type);
  const size_t out_size = job.x_type == job.mod_type ? x_size : 4;
  const size_t residual_size = size_of_type(job.residual_type);
  const size_t reused_size = job.x_type == job.residual_type ? x_size : 4;
  for (int row = begin; row < end; row++) {
    const char* x = job.x + row * d * x_size;
    const size_t mod =
        mod_size * ((row / job.tokens) * job.mod_batch_stride + (row % job.tokens) * job.mod_token_stride);
    sums[row] = with_type(job.x_type, [&](auto xt) __attribute__((always_inline)) {
      return with_type(job.mod_type, [&](auto mt) __attribute__((always_inline)) {
        return modulate_row<decltype(xt), decltype(mt)>(
            x, job.scale + mod, job.shift + mod, job.anchor + row * d * out_size, job.modulated + row * d * out_size,
            int(d), job.eps);
      });
    });
    for (int b = 0; b < job.n_branches; b++) {
      const char* const* residuals = job.residuals + b * job.n_terms;
      const float* weights = job.weights + b * job.n_terms;
      const size_t offset = row * d * residual_size;
      char* reused = job.reused[b] + row * d * reused_size;
      with_type(job.x_type, [&](auto xt) __attribute__((always_inline)) {
        with_type(job.residual_type, [&](auto rt) __attribute__((always_inline)) {
          using X = decltype(xt);
          using R = decltype(rt);
          switch (job.n_terms) {
            case 1:
              return reuse_row<X, R, 1>(x, residuals, offset, weights, reused, int(d));
            case 2:
              return reuse_row<X, R, 2>(x, residuals, offset, weights, reused, int(d));
            case 3:
              return reuse_row<X, R, 3>(x, residuals, offset, weights, reused, int(d));
            default:
              return reuse_row<X, R, 4>(x, residuals, offset, weights, reused, int(d));
          }
        });
      });
    }
  }
}
static_assert(kMaxTerms == 4);

int max_threads() {
  static const int n = [] {
    if (const char* set = std::getenv("MLX_TEACACHE_FAST_NUM_THREADS")) {
      return std::max(1, std::atoi(set));
    }
    return std::clamp(int(std::thread::hardware_concurrency()), 1, 8);
  }();
  return n;
}

// Below this a thread costs more than it saves: starting one takes about 30 us, this much work 100 us.
constexpr int64_t kElementsPerThread = 1 << 17;

// The rows are independent and their sums are added up in row order afterwards, so the result does not depend on the
// number of threads.
void run(const Job& job, RowSums* sums) {
  const int64_t elements = int64_t(job.n_rows) * job.channels;
  const int n_threads =
      int(std::clamp<int64_t>(elements / kElementsPerThread, 1, std::min(max_threads(), std::max(1, job.n_rows))));
  auto first_row = [&](int t) { return int(int64_t(job.n_rows) * t / n_threads); };
  std::vector<std::jthread> threads;
  int started = 1;
  try {
    for (; started < n_threads; started++) {
      threads.emplace_back(run_rows, std::cref(job), first_row(started), first_row(started + 1), sums);
    }
  } catch (const std::system_error&) {
    // The system gives no more threads: this one does the rest.
    run_rows(job, first_row(started), job.n_rows, sums);
  }
  run_rows(job, 0, first_row(1), sums);
}

}  // namespace

void Gate::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  const auto& x = inputs[kX];
  Job job{};
  job.n_rows = x.shape(0) * x.shape(1);
  job.tokens = x.shape(1);
  job.channels = x.shape(2);
  job.eps = eps_;
  job.x_type = type_of(x.dtype());
  job.mod_type = type_of(inputs[kScale].dtype());
  job.residual_type = type_of(inputs[kResiduals].dtype());
  job.n_branches = n_branches_;
  job.n_terms = n_terms_;

  // The siblings hold their own references to the inputs; without them the anchor can be donated: each of its rows is
  // read before that row of the modulated input is written.
  for (auto& out : outputs) {
    if (&out.inputs() != &inputs && !out.is_tracer()) {
      out.inputs().clear();
    }
  }
  const auto& anchor = inputs[kAnchor];
  if (anchor.is_donatable()) {
    outputs[kModulated].copy_shared_buffer(anchor);
  } else {
    outputs[kModulated].set_data(mx::allocator::malloc(outputs[kModulated].nbytes()));
  }
  for (size_t i = kNewState; i < outputs.size(); i++) {
    outputs[i].set_data(mx::allocator::malloc(outputs[i].nbytes()));
  }

  job.x = x.data<char>();
  job.shift = inputs[kShift].data<char>();
  job.scale = inputs[kScale].data<char>();
  const auto& mod = inputs[kScale];
  job.mod_token_stride = mod.shape(1) == 1 ? 0 : job.channels;
  job.mod_batch_stride = mod.shape(0) == 1 ? 0 : size_t(mod.shape(1)) * job.channels;
  job.anchor = anchor.data<char>();
  job.weights = inputs[kWeights].data<float>();
  job.modulated = outputs[kModulated].data<char>();
  for (int i = 0; i < n_branches_ * n_terms_; i++) {
    job.residuals[i] = inputs[kResiduals + i].data<char>();
  }
  for (int b = 0; b < n_branches_; b++) {
    job.reused[b] = outputs[kReused + b].data<char>();
  }

  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (auto& in : inputs) {
    encoder.set_input_array(in);
  }
  for (auto& out : outputs) {
    encoder.set_output_array(out);
  }
  encoder.dispatch([job, rules = rules_, state = inputs[kState].data<float>(), force = inputs[kForce].data<int32_t>(),
                    new_state = outputs[kNewState].data<float>()]() {
    std::vector<RowSums> sums(job.n_rows);
    run(job, sums.data());
    double diff = 0, anchor = 0;
    bool finite = true;
    for (auto& row : sums) {
      diff += row.diff;
      anchor += row.anchor;
      finite &= row.finite;
    }
    // Sums overflow to infinity as a float32 reduction's would.
    const float count = float(double(job.n_rows) * job.channels);
    GateState s;
    static_assert(sizeof s == 8 * sizeof(float));
    std::memcpy(&s, state, sizeof s);
    s = gate_decide(
        s, float(diff) / count, float(anchor) / count, finite, *force, rules, std::numeric_limits<float>::quiet_NaN());
    std::memcpy(new_state, &s, sizeof s);
  });
}

}  // namespace teacache
