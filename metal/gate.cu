// GATE on CUDA: what csrc/gate_cpu.cpp computes, with each element of device memory touched once.
// Formula: LayerNorm without affine, adaLN modulation, relative L1 (TeaCache, arXiv 2411.19108, section 3.3).
//
// MLX compiles this text with NVRTC at first use, below headers of its own, and writes the kernel's signature; its
// body, in gate_cuda.h, calls gate_rows in one launch and gate_decide_sums in the next. The edge between the two in
// MLX's CUDA graph is the order: a counter of finished blocks would have to be zeroed by a launch of its own as well.
//
// Rounding is part of the gate's contract, and NVRTC contracts a * b + c: a product that must round is an intrinsic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gate_params.h"

namespace teacache {

// ---- Packs: kGatePack neighbouring elements of a row, in pairs, since one instruction rounds two floats

template <typename T>
struct Pair;
template <>
struct Pair<float> {
  typedef float2 type;
};
template <>
struct Pair<__half> {
  typedef __half2 type;
};
template <>
struct Pair<__nv_bfloat16> {
  typedef __nv_bfloat162 type;
};

__device__ inline float2 to_floats(float2 v) {
  return v;
}
__device__ inline float2 to_floats(__half2 v) {
  return __half22float2(v);
}
__device__ inline float2 to_floats(__nv_bfloat162 v) {
  // One instruction for each; the library's takes two.
  const unsigned int bits = reinterpret_cast<const unsigned int&>(v);
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
template <typename T>
__device__ inline typename Pair<T>::type to_pair(float a, float b);
template <>
__device__ inline float2 to_pair<float>(float a, float b) {
  return make_float2(a, b);
}
template <>
__device__ inline __half2 to_pair<__half>(float a, float b) {
  return __floats2half2_rn(a, b);
}
template <>
__device__ inline __nv_bfloat162 to_pair<__nv_bfloat16>(float a, float b) {
  return __floats2bfloat162_rn(a, b);
}
template <typename T>
__device__ inline float2 rounded(float a, float b) {
  return to_floats(to_pair<T>(a, b));
}

constexpr int kPairs = kGatePack / 2;
template <typename T>
struct Pack {
  typename Pair<T>::type v[kPairs];
};
template <typename T>
union Words {
  Pack<T> pack;
  uint4 of[sizeof(Pack<T>) / sizeof(uint4)];
  __device__ Words() {}
};

// Aligned, a pack is one or two 16-byte words and the row ends with a whole one. Else its elements are read one by one;
// those past the row's end read as 0.
template <bool aligned, typename T>
__device__ inline Pack<T> load_pack(const T* row, unsigned int column, unsigned int channels) {
  Words<T> words;
  if (aligned) {
#pragma unroll
    for (int w = 0; w < int(sizeof(words) / sizeof(uint4)); w++) {
      words.of[w] = reinterpret_cast<const uint4*>(row + column)[w];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const unsigned int at = column + 2 * i;
      words.pack.v[i].x = at < channels ? row[at] : T(0.0f);
      words.pack.v[i].y = at + 1 < channels ? row[at + 1] : T(0.0f);
    }
  }
  return words.pack;
}

template <bool aligned, typename T>
__device__ inline void store_pack(T* row, unsigned int column, unsigned int channels, Pack<T> pack) {
  Words<T> words;
  words.pack = pack;
  if (aligned) {
#pragma unroll
    for (int w = 0; w < int(sizeof(words) / sizeof(uint4)); w++) {
      reinterpret_cast<uint4*>(row + column)[w] = words.of[w];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const unsigned int at = column + 2 * i;
      if (at < channels) {
        row[at] = words.pack.v[i].x;
      }
      if (at + 1 < channels) {
        row[at + 1] = words.pack.v[i].y;
      }
    }
  }
}

// ---- Sums over a block

constexpr int kMaxWarps = kGateCudaThreads / kGateSimdWidth;

// Each sum has a row of its own. A row is written again only after a barrier of another sum, which no thread passes
// before it has read: so one barrier for each sum is enough. (In a loop, two sums take turns.)
enum SumOf { kSumMean, kSumVariance, kSumDiff, kSumAnchor, kSumNotFinite, kSums };
struct Scratch {
  float of[kSums][kMaxWarps];
};

// The same in all lanes, and in the same order each time.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int distance = kGateSimdWidth / 2; distance > 0; distance /= 2) {
    v += __shfl_xor_sync(0xffffffffu, v, distance);
  }
  return v;
}
__device__ inline float block_sum(float v, float* scratch) {
  const unsigned int lane = threadIdx.x % kGateSimdWidth;
  v = warp_sum(v);
  if (lane == 0) {
    scratch[threadIdx.x / kGateSimdWidth] = v;
  }
  __syncthreads();
  return warp_sum(lane < blockDim.x / kGateSimdWidth ? scratch[lane] : 0.0f);
}

// ---- The pass over the data

template <typename R>
struct Residuals {
  const R* of[kGateMaxResiduals];
};

struct Distance {
  float diff, anchor;  // sums of |m - a| and |a|
  float zeros;         // sum of 0 * m: NaN if any m is not finite
};

// First and second of a pair; the second only where the row goes on.
template <typename O>
__device__ inline void add_pair(Distance& sums, float2 m, float2 a, bool has_first, bool has_second) {
  const float2 diff = rounded<O>(m.x - a.x, m.y - a.y);
  if (has_first) {
    sums.diff += fabsf(diff.x);
    sums.anchor += fabsf(a.x);
    sums.zeros = __fmaf_rn(m.x, 0.0f, sums.zeros);
  }
  if (has_second) {
    sums.diff += fabsf(diff.y);
    sums.anchor += fabsf(a.y);
    sums.zeros = __fmaf_rn(m.y, 0.0f, sums.zeros);
  }
}

// A row that is the modulated input. Past its end both are 0, which adds nothing.
template <bool aligned, typename X>
__device__ inline void add_row(
    Distance& sums, const X* row, const X* before, unsigned int stride, unsigned int channels) {
  for (unsigned int column = threadIdx.x * kGatePack; column < channels; column += stride) {
    const Pack<X> m = load_pack<aligned>(row, column, channels);
    const Pack<X> a = load_pack<aligned>(before, column, channels);
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      add_pair<X>(sums, to_floats(m.v[i]), to_floats(a.v[i]), true, true);
    }
  }
}

// X, M, R: dtypes of x, of shift and scale, of the residuals; O and Y: of the results.
// packs: of a thread, held in registers; 0 reads each row in every pass.
// modulates: else x is the modulated input, M is X, and the distance is all that is computed.
template <
    bool modulates,
    int branches,
    int terms,
    int packs,
    bool aligned,
    typename X,
    typename M,
    typename R,
    typename O,
    typename Y>
__device__ void gate_rows(
    const GateParams& p,
    const X* x,
    const M* shift,
    const M* scale,
    const O* anchor,
    const float* weights,
    Residuals<R> residuals,
    O* modulated,
    Y* reused0,
    Y* reused1,
    float* partials) {
  __shared__ Scratch scratch;
  Y* const reused[2] = {reused0, reused1};
  float w[branches > 0 ? branches * terms : 1];
#pragma unroll
  for (int i = 0; i < branches * terms; i++) {
    w[i] = weights[i];
  }

  const unsigned int channels = p.channels;
  const unsigned int stride = blockDim.x * kGatePack;  // from one pack of a thread to its next
  const unsigned int n_packs = packs > 0 ? packs : (channels + stride - 1) / stride;
  constexpr int held = packs > 0 ? packs : 1;
  Pack<X> xs[held];
  Pack<O> befores[held];  // the anchor

  Distance sums = {0.0f, 0.0f, 0.0f};
  const unsigned int end = min(p.rows, (blockIdx.x + 1) * p.rows_per_group);
  for (unsigned int row = blockIdx.x * p.rows_per_group; row < end; row++) {
    const size_t begin = size_t(row) * channels;
    if (!modulates) {
      add_row<aligned>(sums, x + begin, reinterpret_cast<const X*>(anchor + begin), stride, channels);
      continue;
    }

    // All reads of the row at once, so that they are in flight together; the sum of x, and reuse, which needs no more.
    float sum = 0.0f;
#pragma unroll
    for (unsigned int k = 0; k < n_packs; k++) {
      const unsigned int column = threadIdx.x * kGatePack + k * stride;
      if (column >= channels) {
        continue;
      }
      const Pack<X> xp = load_pack<aligned>(x + begin, column, channels);
      xs[packs > 0 ? k : 0] = xp;
      if (packs > 0) {
        befores[k] = load_pack<aligned>(anchor + begin, column, channels);
      }
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
        const float2 v = to_floats(xp.v[i]);
        sum += v.x;
        sum += v.y;
      }
      // x + sum_k weights[k] * residual_k: float32, rounded once.
#pragma unroll
      for (int b = 0; b < branches; b++) {
        float2 change[kPairs];
#pragma unroll
        for (int t = 0; t < terms; t++) {
          const Pack<R> rp = load_pack<aligned>(residuals.of[b * terms + t] + begin, column, channels);
#pragma unroll
          for (int i = 0; i < kPairs; i++) {
            const float2 r = to_floats(rp.v[i]);
            const float2 term = make_float2(__fmul_rn(w[b * terms + t], r.x), __fmul_rn(w[b * terms + t], r.y));
            change[i].x = t == 0 ? term.x : __fadd_rn(change[i].x, term.x);
            change[i].y = t == 0 ? term.y : __fadd_rn(change[i].y, term.y);
          }
        }
        Pack<Y> out;
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
          const float2 v = to_floats(xp.v[i]);
          out.v[i] = to_pair<Y>(__fadd_rn(v.x, change[i].x), __fadd_rn(v.y, change[i].y));
        }
        store_pack<aligned>(reused[b] + begin, column, channels, out);
      }
    }

    // LayerNorm statistics in two passes: E[x^2] - mean^2 cancels for a large mean.
    const float mean = block_sum(sum, scratch.of[kSumMean]) / float(channels);
    float squares = 0.0f;
#pragma unroll
    for (unsigned int k = 0; k < n_packs; k++) {
      const unsigned int column = threadIdx.x * kGatePack + k * stride;
      if (column >= channels) {
        continue;
      }
      if (packs == 0) {
        xs[0] = load_pack<aligned>(x + begin, column, channels);
      }
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
        const float2 v = to_floats(xs[packs > 0 ? k : 0].v[i]);
        const float2 centered = make_float2(v.x - mean, v.y - mean);
        const unsigned int at = column + 2 * i;
        squares = aligned || at < channels ? __fmaf_rn(centered.x, centered.x, squares) : squares;
        squares = aligned || at + 1 < channels ? __fmaf_rn(centered.y, centered.y, squares) : squares;
      }
    }
    const float variance = block_sum(squares, scratch.of[kSumVariance]) / float(channels);
    const float rstd = 1.0f / sqrtf(variance + p.eps);

    // Modulation, rounded to the result's dtype after each operation as the unfused ops do, and both sums.
    const size_t mod = size_t((row / p.tokens) * p.mod_batch_rows + (row % p.tokens) * p.mod_token_rows) * channels;
#pragma unroll
    for (unsigned int k = 0; k < n_packs; k++) {
      const unsigned int column = threadIdx.x * kGatePack + k * stride;
      if (column >= channels) {
        continue;
      }
      const unsigned int slot = packs > 0 ? k : 0;
      if (packs == 0) {
        xs[0] = load_pack<aligned>(x + begin, column, channels);
        befores[0] = load_pack<aligned>(anchor + begin, column, channels);
      }
      const Pack<M> shifts = load_pack<aligned>(shift + mod, column, channels);
      const Pack<M> scales = load_pack<aligned>(scale + mod, column, channels);
      Pack<O> out;
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
        const float2 v = to_floats(xs[slot].v[i]);
        const float2 shift2 = to_floats(shifts.v[i]);
        const float2 scale2 = to_floats(scales.v[i]);
        const float2 norm = rounded<X>(__fmul_rn(v.x - mean, rstd), __fmul_rn(v.y - mean, rstd));
        const float2 factor = rounded<M>(1.0f + scale2.x, 1.0f + scale2.y);
        const float2 product = rounded<O>(__fmul_rn(factor.x, norm.x), __fmul_rn(factor.y, norm.y));
        out.v[i] = to_pair<O>(__fadd_rn(product.x, shift2.x), __fadd_rn(product.y, shift2.y));

        const unsigned int at = column + 2 * i;
        add_pair<O>(
            sums, to_floats(out.v[i]), to_floats(befores[slot].v[i]), aligned || at < channels,
            aligned || at + 1 < channels);
      }
      store_pack<aligned>(modulated + begin, column, channels, out);
    }
  }

  const float block_diff = block_sum(sums.diff, scratch.of[kSumDiff]);
  const float block_anchor = block_sum(sums.anchor, scratch.of[kSumAnchor]);
  const float block_not_finite = block_sum(sums.zeros == 0.0f ? 0.0f : 1.0f, scratch.of[kSumNotFinite]);
  if (threadIdx.x == 0) {
    partials[kGatePartials * blockIdx.x] = block_diff;
    partials[kGatePartials * blockIdx.x + 1] = block_anchor;
    partials[kGatePartials * blockIdx.x + 2] = block_not_finite;
  }
}

// ---- The decision, by one block, from the sums of all

__device__ void gate_decide_sums(
    const GateParams& p, const float* partials, const float* state, const int* force, float* new_state) {
  __shared__ Scratch scratch;
  float diff = 0.0f;
  float anchor = 0.0f;
  float not_finite = 0.0f;
  for (unsigned int g = threadIdx.x; g < p.groups; g += blockDim.x) {
    diff += partials[kGatePartials * g];
    anchor += partials[kGatePartials * g + 1];
    not_finite += partials[kGatePartials * g + 2];
  }
  diff = block_sum(diff, scratch.of[kSumDiff]);
  anchor = block_sum(anchor, scratch.of[kSumAnchor]);
  not_finite = block_sum(not_finite, scratch.of[kSumNotFinite]);
  if (threadIdx.x == 0) {
    const float count = float(p.rows) * float(p.channels);
    gate_decide_state(
        state, new_state, diff / count, anchor / count, not_finite == 0.0f, force[0], p.rules,
        __int_as_float(0x7fc00000));
  }
}

}  // namespace teacache
