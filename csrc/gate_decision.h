// The gate's rules once the two means are known: TeaCache (Liu et al., CVPR 2025, arXiv 2411.19108) with the safeguards
// of mlx-teacache 0.14.1. Plain float arithmetic in the common subset of C++, Metal and CUDA, so that every backend
// compiles this text and decides alike.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#define GATE_FN inline
#define GATE_DEVICE device
#define GATE_FMA(a, b, c) metal::fma(a, b, c)
#elif defined(__CUDACC__)
#define GATE_FN __host__ __device__ inline
#define GATE_DEVICE
#define GATE_FMA(a, b, c) fmaf(a, b, c)
#else
#include <cmath>
#define GATE_FN inline
#define GATE_DEVICE
#define GATE_FMA(a, b, c) std::fma(a, b, c)
#endif

// Why a step may not be gated; the schedule is known on the host.
enum GateForce { kForceNone = 0, kForceLeading = 1, kForceTrailing = 2 };

// stats.py has the same order.
enum GateKind { kComputed = 0, kForced = 1, kSkipped = 2, kNumericalMiss = 3 };

// What goes from step to step, as float32[8]; field order is the array's.
struct GateState {
  float skip;
  float kind;
  float rel_l1;     // NaN where not measured
  float predicted;  // NaN where not measured
  float accumulated;
  float streak;
  float has_anchor;
  float has_residual;
};

struct GateRules {
  float coefficients[5];  // c4 first
  float range_lo;         // calibrated range of rel_l1; read only if has_range
  float range_hi;
  int has_range;
  float threshold;
  int max_consecutive_skips;
};

// Comparisons, not library calls: fast-math builds fold isfinite() away. NaN fails both.
GATE_FN bool gate_is_finite(float v) {
  return v <= 3.402823466e38f && v >= -3.402823466e38f;
}

// diff_mean = mean|m - anchor|, anchor_mean = mean|anchor|; m_is_finite: every element of m is.
GATE_FN GateState
gate_decide(GateState s, float diff_mean, float anchor_mean, bool m_is_finite, int force, GateRules rules, float nan) {
  s.skip = 0.0f;
  s.kind = float(kComputed);
  s.rel_l1 = nan;
  s.predicted = nan;
  if (rules.threshold <= 0.0f) {
    return s;
  }
  if (force != kForceNone) {
    s.kind = float(kForced);
    if (force == kForceLeading && m_is_finite) {
      s.has_anchor = 1.0f;
    }
    return s;
  }
  const bool seeded = s.has_anchor != 0.0f && s.has_residual != 0.0f;
  if (m_is_finite && !seeded) {
    s.has_anchor = 1.0f;
    s.has_residual = 1.0f;
    s.streak = 0.0f;
    return s;
  }
  float x = nan;
  float predicted = nan;
  bool above_range = false;
  if (m_is_finite) {
    s.has_anchor = 1.0f;
    // A NaN mean fails the comparison and stays NaN.
    x = diff_mean / (anchor_mean < 1e-12f ? 1e-12f : anchor_mean);
    s.rel_l1 = gate_is_finite(x) ? x : nan;
    if (rules.has_range && gate_is_finite(x)) {
      above_range = x > rules.range_hi;
      x = x < rules.range_lo ? rules.range_lo : (above_range ? rules.range_hi : x);
    }
    predicted = rules.coefficients[0];
    for (int i = 1; i < 5; i++) {
      predicted = GATE_FMA(predicted, x, rules.coefficients[i]);
    }
  }
  if (!gate_is_finite(x) || !gate_is_finite(predicted)) {
    // The next gated step seeds again: what was cached is two steps old by then.
    s.kind = float(kNumericalMiss);
    s.has_residual = 0.0f;
    s.accumulated = 0.0f;
    s.streak = 0.0f;
    return s;
  }
  s.predicted = predicted > 0.0f ? predicted : 0.0f;
  const float accumulated = s.accumulated + s.predicted;
  if (!above_range && accumulated < rules.threshold && s.streak < float(rules.max_consecutive_skips)) {
    s.skip = 1.0f;
    s.kind = float(kSkipped);
    s.accumulated = accumulated;
    s.streak += 1.0f;
    return s;
  }
  s.accumulated = 0.0f;
  s.streak = 0.0f;
  s.has_residual = 1.0f;
  return s;
}

// gate_decide from array to array.
GATE_FN void gate_decide_state(
    GATE_DEVICE const float* from,
    GATE_DEVICE float* to,
    float diff_mean,
    float anchor_mean,
    bool m_is_finite,
    int force,
    GateRules rules,
    float nan) {
  GateState s = {from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7]};
  s = gate_decide(s, diff_mean, anchor_mean, m_is_finite, force, rules, nan);
  to[0] = s.skip;
  to[1] = s.kind;
  to[2] = s.rel_l1;
  to[3] = s.predicted;
  to[4] = s.accumulated;
  to[5] = s.streak;
  to[6] = s.has_anchor;
  to[7] = s.has_residual;
}
