// The gate's parameters and grid on a GPU, and Metal's buffer indices: one text for kernels, host code and tests.
#pragma once

#include "gate_decision.h"

// Buffers in the Metal kernel's argument table. Residuals are branch by branch; the slots of absent ones repeat the
// first.
enum GateBuffer {
  kBufferX,
  kBufferShift,
  kBufferScale,
  kBufferAnchor,
  kBufferWeights,
  kBufferState,
  kBufferForce,
  kBufferModulated,
  kBufferNewState,
  kBufferReused0,
  kBufferReused1,
  kBufferPartials,
  kBufferCounter,
  kBufferParams,
  kBufferResidual0,  // to kBufferResidual0 + kGateMaxResiduals - 1
};

enum GateLimit {
  kGateMaxResiduals = 8,  // 2 branches of 4 terms
  // Elements that a thread takes from a row at once: 16 bytes of a 16-bit type, the widest load of most GPUs, two of
  // float32. Neighbouring threads take neighbouring packs, so that a SIMD-group reads 512 or 1024 bytes in a row.
  kGatePack = 8,
  kGateSimdWidth = 32,     // and CUDA's warps
  kGateMaxThreads = 1024,  // Metal's limit for a threadgroup on every Apple GPU
  kGateMaxSimdgroups = kGateMaxThreads / kGateSimdWidth,
  // A block's, on CUDA: so many can be launched whatever their registers (255 at most, of 65,536), and the kernels that
  // MLX builds say no bounds to the compiler.
  kGateCudaThreads = 256,
  // Packs of one thread that are held in registers, at most; a longer row is read again in each pass over it.
  kGateMaxPacks = 4,
  kGatePartials = 3,  // of a threadgroup: sum |m - anchor|, sum |anchor|, elements of m that are not finite
};

struct GateParams {
  unsigned int rows;            // of all batches
  unsigned int tokens;          // rows of one batch
  unsigned int channels;        // elements of a row
  unsigned int mod_batch_rows;  // rows of shift and scale from one batch to the next; 0 where one serves all
  unsigned int mod_token_rows;  // likewise, tokens
  unsigned int rows_per_group;
  unsigned int groups;
  int in_place;  // whether the modulated input is written over the anchor
  float eps;
  GateRules rules;
};

// CUDA: one kernel passes over the rows in one launch and decides in another.
struct GateLaunch {
  GateParams params;
  int decides;
};

struct GateGrid {
  unsigned int threads;  // of a threadgroup
  unsigned int rows_per_group;
  unsigned int groups;
  int packs;  // of a thread; 0: the row is too long to be held
};

// Which grids a kind of GPU is given.
struct GateTuning {
  unsigned int threads;  // of a threadgroup, at most
  unsigned int groups;   // enough to keep the GPU busy
  unsigned int rows;     // of a group, at most
};

GATE_FN unsigned int gate_ceil_div(unsigned int a, unsigned int b) {
  return (a + b - 1) / b;
}

// A threadgroup takes one row at a time, all of its threads together, and several rows one after the other.
//
// Metal. Threads: one pack each where the row allows it: 3072 channels make 384 threads, 4096 make 512, 8192 the 1024
// that a threadgroup can have. In 16-bit types a thread then holds x, 1 + scale, shift and anchor in 4 registers of 32
// bits each, in float32 in 8: with addresses and sums 40 to 60. A core's 208 KiB of registers hold 53,248, hence about
// 900 threads at 60 each: two groups of 384, so that one loads while the other waits at a barrier. (Sizes of the
// register file: measured on M1 by the metal-benchmarks project.)
//
// Rows of a group: shift and scale stay in registers from row to row, so a group reads them once: 2 rows beside the 5
// of every row (x, anchor and residual read, modulated and reused written). 32 rows make that 2 / (5 * 32) = 1.25 % of
// the traffic. Fewer rows in smaller images, so that 128 groups remain (1024 rows: 8 to a group, 5 %). The 40 cores of
// an M3 Max run 80 of them at a time: 80 groups * 384 threads * 3 loads * 16 bytes = 1.5 MB in flight, and 0.9 MB with
// the 48 that are left, where 400 GB/s * 1 us of latency need 0.4 MB.
GATE_FN GateTuning gate_metal_tuning() {
  return {kGateMaxThreads, 128, 32};
}

// CUDA. shift and scale come from the L1 cache for each row, 12 KiB at 3072 channels, so registers hold x and anchor
// alone and a row needs no neighbours. Several rows of a group only make fewer partial sums, which one block adds up:
// 1024 groups, 12 KiB. With 3072 channels a block has 192 threads of 64 to 72 registers (NVRTC 13.5, bfloat16), and a
// multiprocessor's 65,536 hold 4 or 5 blocks: 528 to 660 on the 132 of an H200, with 192 threads * 6 loads * 16 bytes
// each 10 to 12 MB in flight, where 4.8 TB/s * 1 us need 5 MB.
GATE_FN GateTuning gate_cuda_tuning() {
  return {kGateCudaThreads, 1024, 16};
}

// Nothing here changes what is computed but the order of the sums, which depends on the shape alone.
GATE_FN GateGrid gate_grid(unsigned int rows, unsigned int channels, GateTuning tuning) {
  const unsigned int packs_of_row = gate_ceil_div(channels, kGatePack);
  GateGrid grid;
  grid.packs = 1;
  while (grid.packs <= kGateMaxPacks && packs_of_row > grid.packs * tuning.threads) {
    grid.packs *= 2;
  }
  if (grid.packs > kGateMaxPacks) {
    grid.packs = 0;
    grid.threads = tuning.threads;
  } else {
    grid.threads = kGateSimdWidth * gate_ceil_div(gate_ceil_div(packs_of_row, grid.packs), kGateSimdWidth);
    grid.threads = grid.threads > 0 ? grid.threads : (unsigned int)kGateSimdWidth;
  }
  const unsigned int rows_per_group = gate_ceil_div(rows, tuning.groups);
  grid.rows_per_group = rows_per_group > tuning.rows ? tuning.rows : (rows_per_group > 0 ? rows_per_group : 1);
  grid.groups = rows > 0 ? gate_ceil_div(rows, grid.rows_per_group) : 1;  // no rows: one group decides
  return grid;
}

// mod_batches and mod_tokens: what shift and scale have of each, 1 where one serves all.
GATE_FN GateParams gate_params(
    unsigned int batches,
    unsigned int tokens,
    unsigned int channels,
    unsigned int mod_batches,
    unsigned int mod_tokens,
    float eps,
    bool in_place,
    GateRules rules,
    GateGrid grid) {
  GateParams p;
  p.rows = batches * tokens;
  p.tokens = tokens;
  p.channels = channels;
  p.rows_per_group = grid.rows_per_group;
  p.groups = grid.groups;
  p.mod_batch_rows = mod_batches == 1 ? 0 : mod_tokens;
  p.mod_token_rows = mod_tokens == 1 ? 0 : 1;
  p.in_place = in_place ? 1 : 0;
  p.eps = eps;
  p.rules = rules;
  return p;
}
