// GATE on Metal: what csrc/gate_cpu.cpp computes, with each element of device memory touched once.
// Formula: LayerNorm without affine, adaLN modulation, relative L1 (TeaCache, arXiv 2411.19108, section 3.3).
//
// Whoever compiles this text appends an instantiate_kernel() line for each variant that is wanted. Threadgroups, rows
// and registers are reasoned about in gate_params.h.
#include <metal_stdlib>

#include "gate_params.h"

using namespace metal;

// Rounding is part of the gate's contract: no fused multiply-add that the source does not ask for. Older compilers know
// the second form only; an unknown pragma does nothing.
#pragma METAL fp contract(off)
#pragma clang fp contract(off)

#ifndef instantiate_kernel
#define instantiate_kernel(name, func, ...) \
  template [[host_name(name)]] [[kernel]] decltype(func<__VA_ARGS__>) func<__VA_ARGS__>;
#endif

// MLX's promotion of two floating dtypes.
template <typename A, typename B>
struct Promote {
  typedef float type;
};
template <typename A>
struct Promote<A, A> {
  typedef A type;
};

// ---- Packs: kGatePack neighbouring elements of a row

template <typename T>
struct Pack {
  T v[kGatePack];
};

// What 16 bytes hold: 4 floats, or 8 elements of a 16-bit type.
inline void from_word(uint4 word, thread float* v) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    v[i] = as_type<float>(word[i]);
  }
}
template <typename T>
inline void from_word(uint4 word, thread T* v) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const vec<T, 2> pair = as_type<vec<T, 2>>(word[i]);
    v[2 * i] = pair[0];
    v[2 * i + 1] = pair[1];
  }
}
inline uint4 to_word(thread const float* v) {
  return uint4(as_type<uint>(v[0]), as_type<uint>(v[1]), as_type<uint>(v[2]), as_type<uint>(v[3]));
}
template <typename T>
inline uint4 to_word(thread const T* v) {
  uint4 word;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    word[i] = as_type<uint>(vec<T, 2>(v[2 * i], v[2 * i + 1]));
  }
  return word;
}

// Aligned, a pack is one or two 16-byte words and the row ends with a whole one. Else its elements are read one by one;
// those past the row's end read as 0.
template <bool aligned, typename T>
inline Pack<T> load_pack(device const T* row, uint column, uint channels) {
  constexpr int per_word = 16 / sizeof(T);
  Pack<T> p;
  if (aligned) {
    device const uint4* words = reinterpret_cast<device const uint4*>(row + column);
#pragma unroll
    for (int w = 0; w < kGatePack / per_word; w++) {
      from_word(words[w], p.v + w * per_word);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGatePack; i++) {
      p.v[i] = column + i < channels ? row[column + i] : T(0.0f);
    }
  }
  return p;
}

template <bool aligned, typename T>
inline void store_pack(device T* row, uint column, uint channels, Pack<T> p) {
  constexpr int per_word = 16 / sizeof(T);
  if (aligned) {
    device uint4* words = reinterpret_cast<device uint4*>(row + column);
#pragma unroll
    for (int w = 0; w < kGatePack / per_word; w++) {
      words[w] = to_word(p.v + w * per_word);
    }
  } else {
    for (int i = 0; i < kGatePack && column + i < channels; i++) {
      row[column + i] = p.v[i];
    }
  }
}

// ---- Sums over a threadgroup

struct Place {
  uint lid, threads;    // in the threadgroup
  uint lane, sg, n_sg;  // in the SIMD-group, and which of how many
};

// Each sum has a row of its own. A row is written again only after a barrier of another sum, which no thread passes
// before it has read: so one barrier for each sum is enough. (In a loop, two sums take turns.)
enum SumOf { kSumMean, kSumVariance, kSumDiff, kSumAnchor, kSumNotFinite, kSums };
struct Scratch {
  float of[kSums][kGateMaxSimdgroups];
};

// The order is fixed by the hardware's simd_sum and by the number of threads: the same each time.
inline float threadgroup_sum(float v, threadgroup float* scratch, Place at) {
  v = simd_sum(v);
  if (at.lane == 0) {
    scratch[at.sg] = v;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(at.lane < at.n_sg ? scratch[at.lane] : 0.0f);
}

// ---- The decision, by one threadgroup, from the sums of all

inline void decide(
    device const float* state,
    device const int* force,
    device float* new_state,
    device atomic_uint* partials,
    constant GateParams& p,
    threadgroup Scratch& scratch,
    Place at) {
  float diff = 0.0f;
  float anchor = 0.0f;
  float not_finite = 0.0f;
  for (uint g = at.lid; g < p.groups; g += at.threads) {
    device atomic_uint* partial = partials + kGatePartials * g;
    diff += as_type<float>(atomic_load_explicit(partial, memory_order_relaxed));
    anchor += as_type<float>(atomic_load_explicit(partial + 1, memory_order_relaxed));
    not_finite += as_type<float>(atomic_load_explicit(partial + 2, memory_order_relaxed));
  }
  diff = threadgroup_sum(diff, scratch.of[kSumDiff], at);
  anchor = threadgroup_sum(anchor, scratch.of[kSumAnchor], at);
  not_finite = threadgroup_sum(not_finite, scratch.of[kSumNotFinite], at);
  if (at.lid == 0) {
    const float count = float(p.rows) * float(p.channels);
    const GateRules rules = p.rules;
    gate_decide_state(state, new_state, diff / count, anchor / count, not_finite == 0.0f, force[0], rules, NAN);
  }
}

// ---- The pass over the data

struct Distance {
  float diff, anchor, not_finite;  // sums: of |m - a|, of |a|, of the elements of m that are not finite
};

template <typename O>
inline void add_element(thread Distance& sums, O m, O before) {
  const float a = float(before);
  sums.diff += metal::abs(float(O(float(m) - a)));
  sums.anchor += metal::abs(a);
  sums.not_finite += gate_is_finite(float(m)) ? 0.0f : 1.0f;
}

// A row that is the modulated input. Past its end both are 0, which adds nothing.
template <bool aligned, typename X>
inline void add_row(
    thread Distance& sums, device const X* row, device const X* before, uint first, uint stride, uint channels) {
  for (uint column = first; column < channels; column += stride) {
    const Pack<X> m = load_pack<aligned>(row, column, channels);
    const Pack<X> a = load_pack<aligned>(before, column, channels);
#pragma unroll
    for (int i = 0; i < kGatePack; i++) {
      add_element(sums, m.v[i], a.v[i]);
    }
  }
}

// X, M, R: dtypes of x, of shift and scale, of the residuals. packs: of a thread; 0 reads each row in every pass.
// modulates: else x is the modulated input, M is X, and the distance is all that is computed.
// one_dispatch: the threadgroup that finishes last decides. Else gate_decide_sums does, in a dispatch of its own.
template <
    typename X,
    typename M,
    typename R,
    bool modulates,
    int branches,
    int terms,
    int packs,
    bool aligned,
    bool one_dispatch>
[[kernel]] void gate(
    device const X* x [[buffer(kBufferX)]],
    device const M* shift [[buffer(kBufferShift)]],
    device const M* scale [[buffer(kBufferScale)]],
    device const typename Promote<X, M>::type* anchor [[buffer(kBufferAnchor)]],
    device const float* weights [[buffer(kBufferWeights)]],
    device const float* state [[buffer(kBufferState)]],
    device const int* force [[buffer(kBufferForce)]],
    device typename Promote<X, M>::type* modulated [[buffer(kBufferModulated)]],
    device float* new_state [[buffer(kBufferNewState)]],
    device typename Promote<X, R>::type* reused0 [[buffer(kBufferReused0)]],
    device typename Promote<X, R>::type* reused1 [[buffer(kBufferReused1)]],
    device atomic_uint* partials [[buffer(kBufferPartials)]],  // float bits, kGatePartials for each threadgroup
    device atomic_uint* counter [[buffer(kBufferCounter)]],    // of finished threadgroups; 0 before
    constant GateParams& p [[buffer(kBufferParams)]],
    device const R* residual0 [[buffer(kBufferResidual0)]],
    device const R* residual1 [[buffer(kBufferResidual0 + 1)]],
    device const R* residual2 [[buffer(kBufferResidual0 + 2)]],
    device const R* residual3 [[buffer(kBufferResidual0 + 3)]],
    device const R* residual4 [[buffer(kBufferResidual0 + 4)]],
    device const R* residual5 [[buffer(kBufferResidual0 + 5)]],
    device const R* residual6 [[buffer(kBufferResidual0 + 6)]],
    device const R* residual7 [[buffer(kBufferResidual0 + 7)]],
    uint group [[threadgroup_position_in_grid]],
    uint lid [[thread_position_in_threadgroup]],
    uint threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]],
    uint n_sg [[simdgroups_per_threadgroup]]) {
  typedef typename Promote<X, M>::type O;
  typedef typename Promote<X, R>::type Y;
  threadgroup Scratch scratch;
#if __METAL_VERSION__ >= 320
  threadgroup uint is_last;
#endif
  const Place at = {lid, threads, lane, sg, n_sg};

  device const R* residuals[kGateMaxResiduals] = {residual0, residual1, residual2, residual3,
                                                  residual4, residual5, residual6, residual7};
  device Y* reused[2] = {reused0, reused1};
  // Metal takes the arguments never to overlap: where the anchor is overwritten, it is read by the pointer that writes.
  device const O* before = p.in_place != 0 ? static_cast<device const O*>(modulated) : anchor;
  float w[branches > 0 ? branches * terms : 1];
#pragma unroll
  for (int i = 0; i < branches * terms; i++) {
    w[i] = weights[i];
  }

  const uint channels = p.channels;
  const uint stride = threads * kGatePack;  // from one pack of a thread to its next
  const uint n_packs = packs > 0 ? uint(packs) : (channels + stride - 1) / stride;
  // Rolled loops over what is held would index registers by a variable, which Metal keeps in memory. A row that is not
  // held is a loop of unknown length, which stays rolled.
  constexpr int held = packs > 0 ? packs : 1;
  Pack<X> xs[held];
  Pack<O> befores[held];  // the anchor
  Pack<M> scales[held];   // 1 + scale
  Pack<M> shifts[held];
  size_t mod_at = ~size_t(0);  // where they were read

  Distance sums = {0.0f, 0.0f, 0.0f};
  const uint end = min(p.rows, (group + 1) * p.rows_per_group);
  for (uint row = group * p.rows_per_group; row < end; row++) {
    const size_t begin = size_t(row) * channels;
    device const X* x_row = x + begin;
    if (!modulates) {
      add_row<aligned>(
          sums, x_row, reinterpret_cast<device const X*>(before + begin), lid * kGatePack, stride, channels);
      continue;
    }

    // All reads of the row at once, so that they are in flight together; the sum of x, and reuse, which needs no more.
    float sum = 0.0f;
#pragma unroll(held)
    for (uint k = 0; k < n_packs; k++) {
      const uint column = lid * kGatePack + k * stride;
      if (column >= channels) {
        continue;
      }
      const Pack<X> xp = load_pack<aligned>(x_row, column, channels);
      xs[held > 1 ? k : 0] = xp;
      if (packs > 0) {
        befores[held > 1 ? k : 0] = load_pack<aligned>(before + begin, column, channels);
      }
#pragma unroll
      for (int i = 0; i < kGatePack; i++) {
        sum += float(xp.v[i]);
      }
      // x + sum_k weights[k] * residual_k: float32, rounded once.
#pragma unroll
      for (int b = 0; b < branches; b++) {
        float change[kGatePack];
#pragma unroll
        for (int t = 0; t < terms; t++) {
          const Pack<R> rp = load_pack<aligned>(residuals[b * terms + t] + begin, column, channels);
#pragma unroll
          for (int i = 0; i < kGatePack; i++) {
            const float term = w[b * terms + t] * float(rp.v[i]);
            change[i] = t == 0 ? term : change[i] + term;
          }
        }
        Pack<Y> out;
#pragma unroll
        for (int i = 0; i < kGatePack; i++) {
          out.v[i] = Y(float(xp.v[i]) + change[i]);
        }
        store_pack<aligned>(reused[b] + begin, column, channels, out);
      }
    }

    // LayerNorm statistics in two passes: E[x^2] - mean^2 cancels for a large mean.
    const float mean = threadgroup_sum(sum, scratch.of[kSumMean], at) / float(channels);
    float squares = 0.0f;
#pragma unroll(held)
    for (uint k = 0; k < n_packs; k++) {
      const uint column = lid * kGatePack + k * stride;
      if (column >= channels) {
        continue;
      }
      if (packs == 0) {
        xs[0] = load_pack<aligned>(x_row, column, channels);
      }
      const Pack<X> xp = xs[held > 1 ? k : 0];
#pragma unroll
      for (int i = 0; i < kGatePack; i++) {
        const float centered = float(xp.v[i]) - mean;
        squares += aligned || column + i < channels ? centered * centered : 0.0f;
      }
    }
    const float variance = threadgroup_sum(squares, scratch.of[kSumVariance], at) / float(channels);
    const float rstd = 1.0f / precise::sqrt(variance + p.eps);

    // Modulation, rounded to the result's dtype after each operation as the unfused ops do, and both sums.
    const size_t mod = size_t((row / p.tokens) * p.mod_batch_rows + (row % p.tokens) * p.mod_token_rows) * channels;
#pragma unroll(held)
    for (uint k = 0; k < n_packs; k++) {
      const uint column = lid * kGatePack + k * stride;
      if (column >= channels) {
        continue;
      }
      const uint slot = held > 1 ? k : 0;
      if (packs == 0) {
        xs[0] = load_pack<aligned>(x_row, column, channels);
        befores[0] = load_pack<aligned>(before + begin, column, channels);
      }
      if (packs == 0 || mod != mod_at) {
        shifts[slot] = load_pack<aligned>(shift + mod, column, channels);
        scales[slot] = load_pack<aligned>(scale + mod, column, channels);
#pragma unroll
        for (int i = 0; i < kGatePack; i++) {
          scales[slot].v[i] = M(1.0f + float(scales[slot].v[i]));
        }
      }
      Pack<O> out;
#pragma unroll
      for (int i = 0; i < kGatePack; i++) {
        const X norm = X((float(xs[slot].v[i]) - mean) * rstd);
        const O product = O(float(scales[slot].v[i]) * float(norm));
        const O m = O(float(product) + float(shifts[slot].v[i]));
        out.v[i] = m;
        if (aligned || column + i < channels) {
          add_element(sums, m, befores[slot].v[i]);
        }
      }
      store_pack<aligned>(modulated + begin, column, channels, out);
    }
    mod_at = mod;
  }

  const float group_diff = threadgroup_sum(sums.diff, scratch.of[kSumDiff], at);
  const float group_anchor = threadgroup_sum(sums.anchor, scratch.of[kSumAnchor], at);
  const float group_not_finite = threadgroup_sum(sums.not_finite, scratch.of[kSumNotFinite], at);
  if (lid == 0) {
    device atomic_uint* partial = partials + kGatePartials * group;
    atomic_store_explicit(partial, as_type<uint>(group_diff), memory_order_relaxed);
    atomic_store_explicit(partial + 1, as_type<uint>(group_anchor), memory_order_relaxed);
    atomic_store_explicit(partial + 2, as_type<uint>(group_not_finite), memory_order_relaxed);
  }

#if __METAL_VERSION__ >= 320  // fences of device scope
  if (one_dispatch) {
    if (lid == 0) {
      // Release: whoever counts after this group sees its partials.
      atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
      const uint finished = atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
      is_last = finished == p.groups - 1 ? 1 : 0;
      // Acquire: the last one sees all of them.
      atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
    }
    // Of the device's memory too: carries thread 0's acquire on to the others.
    threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
    if (is_last == 1) {
      atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
      decide(state, force, new_state, partials, p, scratch, at);
    }
  }
#endif
}

// The second dispatch, one threadgroup, where Metal has no fence between threadgroups (before 3.2, macOS 15).
[[kernel]] void gate_decide_sums(
    device const float* state [[buffer(kBufferState)]],
    device const int* force [[buffer(kBufferForce)]],
    device float* new_state [[buffer(kBufferNewState)]],
    device atomic_uint* partials [[buffer(kBufferPartials)]],
    constant GateParams& p [[buffer(kBufferParams)]],
    uint lid [[thread_position_in_threadgroup]],
    uint threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]],
    uint n_sg [[simdgroups_per_threadgroup]]) {
  threadgroup Scratch scratch;
  const Place at = {lid, threads, lane, sg, n_sg};
  decide(state, force, new_state, partials, p, scratch, at);
}
