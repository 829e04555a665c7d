// GATE on the CPU: each row is read from memory once and then stays in the first-level cache for the passes over it.
// Formula: LayerNorm without affine, adaLN modulation, relative L1 (TeaCache, arXiv 2411.19108, section 3.3).
#include <algorithm>
#include <bit>
#include <charconv>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "gate.h"
#include "mlx/backend/cpu/encoder.h"

// One body, compiled for each level of x86-64 and chosen at load. The order of every sum is fixed by kLanes and the
// build contracts no multiply-add, so that all levels give the same bits. (On Arm the baseline has NEON.)
// (A choice at load would come before AddressSanitizer is there.)
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
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

// The dtypes. Two elements of a 16-bit one share a 32-bit word: widening takes the low or the high one out of it,
// packing makes the half of a word out of a value that is rounded already. Rounding is to nearest, ties to even, as MLX
// does.
struct Float32 {
  static constexpr int size = 4;
  static ALWAYS_INLINE Floats rounded(Floats v) {
    return v;
  }
};

struct BFloat16 {
  static constexpr int size = 2;
  static ALWAYS_INLINE Floats widen_low(Bits word) {
    return floats(word << 16);
  }
  static ALWAYS_INLINE Floats widen_high(Bits word) {
    return floats(word & 0xffff0000u);
  }
  // A NaN must have a free low half, else the carry could reach its sign. Those here do: they come from bfloat16
  // elements, whose low half is 0, from weights, which are cleaned, or from arithmetic, which makes the canonical NaN.
  static ALWAYS_INLINE Floats rounded(Floats v) {
    Bits b = bits(v);
    return floats((b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u);
  }
  static ALWAYS_INLINE Bits pack_low(Floats v) {
    return bits(v) >> 16;
  }
  static ALWAYS_INLINE Bits pack_high(Floats v) {
    return bits(v);
  }
};

struct Float16 {
  static constexpr int size = 2;
  static ALWAYS_INLINE Floats widen_low(Bits word) {
    return widen(word & 0xffffu);
  }
  static ALWAYS_INLINE Floats widen_high(Bits word) {
    return widen(word >> 16);
  }
  static ALWAYS_INLINE Floats rounded(Floats v) {
    return widen(narrow(v));
  }
  static ALWAYS_INLINE Bits pack_low(Floats v) {
    return narrow(v);
  }
  static ALWAYS_INLINE Bits pack_high(Floats v) {
    return narrow(v) << 16;
  }

 private:
  static ALWAYS_INLINE Floats widen(Bits h) {
    Bits magnitude = (h & 0x7fffu) << 13;
    // Scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
    Bits finite = bits(floats(magnitude) * 0x1p112f);
    Bits special = magnitude | 0x7f800000u;
    Bits is_special = Bits(magnitude >= 0x0f800000u);
    return floats((is_special & special) | (~is_special & finite) | ((h & 0x8000u) << 16));
  }
  static ALWAYS_INLINE Bits narrow(Floats v) {
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
    return h | (is_nan & 0x0200u) | sign;
  }
};

// 2 * kLanes neighbouring elements of a row. Where all arrays of a loop have 16-bit elements, `interleaved`, a holds
// the even and b the odd ones, which takes no shuffle; else a holds the first half and b the second.
constexpr int kPair = 2 * kLanes;
struct Pair {
  Floats a, b;
};

template <typename T, bool interleaved>
ALWAYS_INLINE Pair load(const char* from) {
  if constexpr (T::size == 4) {
    static_assert(!interleaved);
    Pair p;
    std::memcpy(&p, from, sizeof p);
    return p;
  } else if constexpr (interleaved) {
    Bits words;
    std::memcpy(&words, from, sizeof words);
    return {T::widen_low(words), T::widen_high(words)};
  } else {
    Halves h[2];
    std::memcpy(&h, from, sizeof h);
    return {T::widen_low(__builtin_convertvector(h[0], Bits)), T::widen_low(__builtin_convertvector(h[1], Bits))};
  }
}

// p must be rounded to T.
template <typename T, bool interleaved>
ALWAYS_INLINE void store(char* to, Pair p) {
  if constexpr (T::size == 4) {
    std::memcpy(to, &p, sizeof p);
  } else if constexpr (interleaved) {
    Bits words = T::pack_low(p.a) | T::pack_high(p.b);
    std::memcpy(to, &words, sizeof words);
  } else {
    Halves h[2] = {
        __builtin_convertvector(T::pack_low(p.a), Halves), __builtin_convertvector(T::pack_low(p.b), Halves)};
    std::memcpy(to, &h, sizeof h);
  }
}

// The last n < kPair elements of a row; the rest reads as 0 and is not written.
template <typename T, bool interleaved>
ALWAYS_INLINE Pair load_tail(const char* from, int n) {
  char padded[kPair * T::size] = {};
  std::memcpy(padded, from, size_t(n) * T::size);
  return load<T, interleaved>(padded);
}
template <typename T, bool interleaved>
ALWAYS_INLINE void store_tail(char* to, Pair p, int n) {
  char padded[kPair * T::size];
  store<T, interleaved>(padded, p);
  std::memcpy(to, padded, size_t(n) * T::size);
}

// Zero in the lanes past the first n elements.
template <bool interleaved>
ALWAYS_INLINE Pair first(int n, Pair p) {
  for (int l = 0; l < kLanes; l++) {
    p.a[l] = (interleaved ? 2 * l : l) < n ? p.a[l] : 0;
    p.b[l] = (interleaved ? 2 * l + 1 : l + kLanes) < n ? p.b[l] : 0;
  }
  return p;
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

// Sum of f over a row. Four partial sums: one would wait for its own last addition, 4 cycles for 16 elements.
template <typename T, bool interleaved, typename F>
ALWAYS_INLINE float sum_over(const char* row, int d, F&& f) {
  Floats partial[4] = {};
  int i = 0;
  for (; i + 2 * kPair <= d; i += 2 * kPair) {
    Pair p = load<T, interleaved>(row + size_t(i) * T::size);
    Pair q = load<T, interleaved>(row + size_t(i + kPair) * T::size);
    partial[0] += f(p.a);
    partial[1] += f(p.b);
    partial[2] += f(q.a);
    partial[3] += f(q.b);
  }
  for (; i < d; i += kPair) {
    const int n = std::min(d - i, kPair);
    Pair p = load_tail<T, interleaved>(row + size_t(i) * T::size, n);
    p = first<interleaved>(n, {f(p.a), f(p.b)});
    partial[0] += p.a;
    partial[1] += p.b;
  }
  return sum((partial[0] + partial[1]) + (partial[2] + partial[3]));
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
  bool modulates;  // else x is the modulated input, and the distance is all that is computed
  int n_rows;      // of all batches
  int tokens;
  int channels;
  float eps;
  Type x_type, mod_type, residual_type;
  const char* x;
  const char* shift;
  const char* scale;
  size_t mod_batch_stride, mod_token_stride;  // in elements; 0 where broadcast
  const char* anchor;
  float weights[kMaxBranches * kMaxTerms];
  char* modulated;
  int n_branches, n_terms;
  const char* residuals[kMaxBranches * kMaxTerms];
  char* reused[kMaxBranches];
};

// 1 + scale, rounded to its dtype. Most often one row serves all tokens.
template <typename M>
ALWAYS_INLINE void plus_one_row(const char* scale, char* out, int d) {
  constexpr bool all16 = M::size == 2;
  auto plus_one = [](Pair p)
                      __attribute__((always_inline)) { return Pair{M::rounded(1.0f + p.a), M::rounded(1.0f + p.b)}; };
  int i = 0;
  for (; i + kPair <= d; i += kPair) {
    const size_t at = size_t(i) * M::size;
    store<M, all16>(out + at, plus_one(load<M, all16>(scale + at)));
  }
  if (const int n = d - i; n > 0) {
    const size_t at = size_t(i) * M::size;
    store_tail<M, all16>(out + at, plus_one(load_tail<M, all16>(scale + at, n)), n);
  }
}

template <typename T>
bool all_finite(const char* row, int d) {
  constexpr bool all16 = T::size == 2;
  Bits not_finite{};
  for (int i = 0; i < d; i += kPair) {
    Pair p = load_tail<T, all16>(row + size_t(i) * T::size, std::min(d - i, kPair));
    not_finite |= Bits((bits(p.a) & 0x7fffffffu) >= 0x7f800000u) | Bits((bits(p.b) & 0x7fffffffu) >= 0x7f800000u);
  }
  bool finite = true;
  for (int l = 0; l < kLanes; l++) {
    finite &= !not_finite[l];
  }
  return finite;
}

// Both sums over a row whose dtype is O.
template <typename O>
struct Distance {
  Pair diff{}, anchor{};

  ALWAYS_INLINE void add(Pair m, Pair a) {
    diff.a += absolute(O::rounded(m.a - a.a));
    diff.b += absolute(O::rounded(m.b - a.b));
    anchor.a += absolute(a.a);
    anchor.b += absolute(a.b);
  }
  // An element that is not finite makes the sum so; the row is looked at again only then.
  ALWAYS_INLINE RowSums of_row(const char* modulated, int d) const {
    const float sum_diff = sum(diff.a + diff.b);
    return {sum_diff, sum(anchor.a + anchor.b), gate_is_finite(sum_diff) || all_finite<O>(modulated, d)};
  }
};

template <typename X>
ALWAYS_INLINE RowSums compare_row(const char* modulated, const char* anchor, int d) {
  constexpr bool all16 = X::size == 2;
  Distance<X> sums;
  int i = 0;
  for (; i + kPair <= d; i += kPair) {
    const size_t at = size_t(i) * X::size;
    sums.add(load<X, all16>(modulated + at), load<X, all16>(anchor + at));
  }
  if (const int n = d - i; n > 0) {
    const size_t at = size_t(i) * X::size;
    sums.add(load_tail<X, all16>(modulated + at, n), load_tail<X, all16>(anchor + at, n));
  }
  return sums.of_row(modulated, d);
}

template <typename X, typename M>
ALWAYS_INLINE RowSums modulate_row(
    const char* x,
    const char* scale_plus_one,
    const char* shift,
    const char* anchor,
    char* modulated,
    int d,
    float eps) {
  using O = Promoted<X, M>;
  constexpr bool x16 = X::size == 2;
  constexpr bool all16 = O::size == 2;

  // LayerNorm statistics in two passes: E[x^2] - mean^2 cancels for a large mean.
  const float mean = sum_over<X, x16>(x, d, [](Floats v) __attribute__((always_inline)) { return v; }) / float(d);
  auto squared = [mean](Floats v) __attribute__((always_inline)) {
    Floats c = v - mean;
    return c * c;
  };
  const float rstd = 1.0f / std::sqrt(sum_over<X, x16>(x, d, squared) / float(d) + eps);

  // Modulation, rounded to the result's dtype after each operation as the unfused ops do, and both sums.
  Distance<O> sums;
  auto modulate = [&](Floats xv, Floats scale_v, Floats shift_v) __attribute__((always_inline)) {
    Floats norm = X::rounded((xv - mean) * rstd);
    return O::rounded(O::rounded(scale_v * norm) + shift_v);
  };
  int i = 0;
  for (; i + kPair <= d; i += kPair) {
    Pair xv = load<X, all16>(x + size_t(i) * X::size);
    Pair scale_v = load<M, all16>(scale_plus_one + size_t(i) * M::size);
    Pair shift_v = load<M, all16>(shift + size_t(i) * M::size);
    Pair av = load<O, all16>(anchor + size_t(i) * O::size);
    Pair m{modulate(xv.a, scale_v.a, shift_v.a), modulate(xv.b, scale_v.b, shift_v.b)};
    store<O, all16>(modulated + size_t(i) * O::size, m);
    sums.add(m, av);
  }
  if (const int n = d - i; n > 0) {
    Pair xv = load_tail<X, all16>(x + size_t(i) * X::size, n);
    Pair scale_v = load_tail<M, all16>(scale_plus_one + size_t(i) * M::size, n);
    Pair shift_v = load_tail<M, all16>(shift + size_t(i) * M::size, n);
    Pair av = load_tail<O, all16>(anchor + size_t(i) * O::size, n);
    Pair m = first<all16>(n, {modulate(xv.a, scale_v.a, shift_v.a), modulate(xv.b, scale_v.b, shift_v.b)});
    store_tail<O, all16>(modulated + size_t(i) * O::size, m, n);
    sums.add(m, av);
  }
  return sums.of_row(modulated, d);
}

// x + sum_k weights[k] * residual_k: float32, rounded once.
template <typename X, typename R, int n_terms>
ALWAYS_INLINE void reuse_row(
    const char* x, const char* const* residuals, size_t offset, const float* weights, char* reused, int d) {
  using O = Promoted<X, R>;
  constexpr bool all16 = O::size == 2;
  auto sum_terms = [&](Pair xv, auto&& term) __attribute__((always_inline)) {
    Pair first_term = term(0);
    Pair change{weights[0] * first_term.a, weights[0] * first_term.b};
    for (int k = 1; k < n_terms; k++) {
      Pair t = term(k);
      change.a += weights[k] * t.a;
      change.b += weights[k] * t.b;
    }
    return Pair{O::rounded(xv.a + change.a), O::rounded(xv.b + change.b)};
  };
  int i = 0;
  for (; i + kPair <= d; i += kPair) {
    store<O, all16>(
        reused + size_t(i) * O::size,
        sum_terms(load<X, all16>(x + size_t(i) * X::size), [&](int k) __attribute__((always_inline)) {
          return load<R, all16>(residuals[k] + offset + size_t(i) * R::size);
        }));
  }
  if (const int n = d - i; n > 0) {
    store_tail<O, all16>(
        reused + size_t(i) * O::size,
        sum_terms(
            load_tail<X, all16>(x + size_t(i) * X::size, n),
            [&](int k) __attribute__((always_inline)) {
              return load_tail<R, all16>(residuals[k] + offset + size_t(i) * R::size, n);
            }),
        n);
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

// scale_plus_one: room for a row of 1 + scale.
FOR_EACH_CPU void run_rows(const Job& job, int begin, int end, char* scale_plus_one, RowSums* sums) {
  const size_t d = job.channels;
  const size_t x_size = size_of_type(job.x_type);
  const size_t mod_size = size_of_type(job.mod_type);
  const size_t out_size = job.x_type == job.mod_type ? x_size : 4;
  const size_t residual_size = size_of_type(job.residual_type);
  const size_t reused_size = job.x_type == job.residual_type ? x_size : 4;
  size_t scale_at = SIZE_MAX;
  for (int row = begin; row < end; row++) {
    const char* x = job.x + row * d * x_size;
    if (!job.modulates) {
      sums[row] = with_type(job.x_type, [&](auto xt) __attribute__((always_inline)) {
        return compare_row<decltype(xt)>(x, job.anchor + row * d * x_size, int(d));
      });
      continue;
    }
    const size_t mod =
        mod_size * ((row / job.tokens) * job.mod_batch_stride + (row % job.tokens) * job.mod_token_stride);
    if (mod != scale_at) {
      scale_at = mod;
      with_type(job.mod_type, [&](auto mt) __attribute__((always_inline)) {
        plus_one_row<decltype(mt)>(job.scale + mod, scale_plus_one, int(d));
      });
    }
    sums[row] = with_type(job.x_type, [&](auto xt) __attribute__((always_inline)) {
      return with_type(job.mod_type, [&](auto mt) __attribute__((always_inline)) {
        return modulate_row<decltype(xt), decltype(mt)>(
            x, scale_plus_one, job.shift + mod, job.anchor + row * d * out_size, job.modulated + row * d * out_size,
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

// Below this a thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 17;

// The rows in as many slices as threads. Each row's sums have a place of their own and are added up in row order
// afterwards, so the result does not depend on the number of threads. All memory is taken by who asks for the gate,
// which can say that there is none.
struct Work {
  Work(const Job& job, int n_slices)
      : n_slices(n_slices), sums(job.n_rows), scales(n_slices, std::vector<char>(job.channels * sizeof(float))) {}

  void run_slice(const Job& job, int i) {
    const auto first_row = [&](int slice) { return int(int64_t(job.n_rows) * slice / n_slices); };
    run_rows(job, first_row(i), first_row(i + 1), scales[i].data(), sums.data());
  }

  const int n_slices;
  std::vector<RowSums> sums;
  std::vector<std::vector<char>> scales;  // of each slice: 1 + scale of a row
};

// Threads that wait for slices, for all gates of the process. They are never ended: nothing waits for them at exit.
class Pool {
 public:
  static Pool& get() {
    static auto& pool = *new Pool;
    return pool;
  }

  // On this thread, and on those of the pool that are free.
  void run(const Job& job, Work& work) {
    Task task{job, work};
    std::unique_lock lock(mutex_);
    while (int(threads_.size()) < work.n_slices - 1) {
      try {
        threads_.emplace_back([this] { serve(); });
      } catch (const std::exception&) {
        break;  // the system gives no more: those there are do it
      }
    }
    if (work.n_slices > 1) {
      task.next = first_;
      first_ = &task;
      wake_.notify_all();
    }
    take_slices(task, lock);
    done_.wait(lock, [&] { return task.n_done == work.n_slices; });
  }

 private:
  // On the stack of who runs it, and in the list while there are slices to take.
  struct Task {
    const Job& job;
    Work& work;
    int n_taken = 0;
    int n_done = 0;
    Task* next = nullptr;
  };

  void serve() {
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return first_ != nullptr; });
      take_slices(*first_, lock);
    }
  }

  void take_slices(Task& task, std::unique_lock<std::mutex>& lock) {
    while (task.n_taken < task.work.n_slices) {
      const int slice = task.n_taken++;
      if (task.n_taken == task.work.n_slices) {
        for (Task** t = &first_; *t != nullptr; t = &(*t)->next) {
          if (*t == &task) {
            *t = task.next;
            break;
          }
        }
      }
      lock.unlock();
      task.work.run_slice(task.job, slice);
      lock.lock();
      if (++task.n_done == task.work.n_slices) {
        done_.notify_all();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Task* first_ = nullptr;
  std::vector<std::thread> threads_;
};

// Fresh memory costs a page fault for each page that is first written. In transparent huge pages that is 512 times
// fewer.
void allocate(mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
#ifdef __linux__
  if (gpu() == Gpu::cuda) {
    return;  // managed memory, which the driver maps
  }
  constexpr uintptr_t kHugePage = 1 << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(out.data<char>()) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(out.data<char>()) + out.nbytes()) & ~(kHugePage - 1);
  if (end > begin) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failing changes nothing
  }
#endif
}

}  // namespace

int gate_cpu_threads() {
  static const int n = [] {
    int n = std::clamp(int(std::thread::hardware_concurrency()), 1, 8);
    if (const char* set = std::getenv("MLX_TEACACHE_FAST_NUM_THREADS")) {
      const char* end = set + std::strlen(set);
      if (const auto read = std::from_chars(set, end, n); read.ec != std::errc() || read.ptr != end || n < 1) {
        reject("[gate] MLX_TEACACHE_FAST_NUM_THREADS must be a whole number of at least 1, got ", set);
      }
    }
    return n;
  }();
  return n;
}

void Gate::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate_outputs(inputs, outputs, allocate);
  const auto& x = inputs[kX];
  Job job{};
  job.modulates = modulates_;
  job.n_rows = gate_rows(x.shape());
  job.tokens = x.shape(1);
  job.channels = x.shape(2);
  job.eps = eps_;
  job.x_type = type_of(x.dtype());
  job.mod_type = type_of(inputs[kScale].dtype());
  job.residual_type = n_branches_ > 0 ? type_of(inputs[kResiduals].dtype()) : job.x_type;
  job.n_branches = n_branches_;
  job.n_terms = n_terms_;

  job.x = x.data<char>();
  job.shift = inputs[kShift].data<char>();
  job.scale = inputs[kScale].data<char>();
  const auto& mod = inputs[kScale];
  job.mod_token_stride = mod.shape(1) == 1 ? 0 : job.channels;
  job.mod_batch_stride = mod.shape(0) == 1 ? 0 : size_t(mod.shape(1)) * job.channels;
  job.anchor = inputs[kAnchor].data<char>();
  job.modulated = outputs[kModulated].data<char>();
  for (int i = 0; i < n_branches_ * n_terms_; i++) {
    job.residuals[i] = inputs[kResiduals + i].data<char>();
  }
  for (int b = 0; b < n_branches_; b++) {
    job.reused[b] = outputs[kReused + b].data<char>();
  }

  const int64_t useful_threads = std::max<int64_t>(1, int64_t(job.n_rows) * job.channels / kElementsPerThread);
  const int n_slices = std::min<int64_t>({useful_threads, gate_cpu_threads(), std::max(1, job.n_rows)});
  auto work = std::make_shared<Work>(job, n_slices);

  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (auto& in : inputs) {
    encoder.set_input_array(in);
  }
  for (auto& out : outputs) {
    encoder.set_output_array(out);
  }
  encoder.dispatch([prepared = job, work, rules = rules_, weights = inputs[kWeights].data<float>(),
                    state = inputs[kState].data<float>(), force = inputs[kForce].data<int32_t>(),
                    new_state = outputs[kNewState].data<float>()]() {
    Job job = prepared;
    for (int i = 0; i < job.n_branches * job.n_terms; i++) {
      // The canonical NaN, whatever the NaN: see BFloat16::rounded.
      job.weights[i] = std::isnan(weights[i]) ? std::numeric_limits<float>::quiet_NaN() : weights[i];
    }
    Pool::get().run(job, *work);
    double diff = 0, anchor = 0;
    bool finite = true;
    for (auto& row : work->sums) {
      diff += row.diff;
      anchor += row.anchor;
      finite &= row.finite;
    }
    // Sums overflow to infinity as a float32 reduction's would.
    const float count = float(double(job.n_rows) * job.channels);
    gate_decide_state(
        state, new_state, float(diff) / count, float(anchor) / count, finite, *force, rules,
        std::numeric_limits<float>::quiet_NaN());
  });
}

}  // namespace teacache
