// The part of CUDA's language and library that the gate uses, on what metal_stdlib has: the unchanged text of a .cu
// file compiles against it. Source: CUDA C++ Programming Guide, CUDA Math API.
//
// `__shared__ T name[N];` declarations are rewritten by host.py. A kernel's pointer is buffer 0, 1, ... in the order of
// its parameters, and so is what it takes by value.
#pragma once
#include <math.h>

#include "metal_stdlib"

#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __global__
#define __device__
#define __host__
#define __grid_constant__

using metal::max;
using metal::min;

// ---- Where a thread is

namespace kernel_host {
struct Dim3 {
  unsigned x, y, z;
};
template <Builtin which>
KERNEL_HOST_UNCHECKED inline Dim3 dim3_of() {
  unsigned at[3];
  builtin_id(which, at);
  return {at[0], at[1], at[2]};
}
}  // namespace kernel_host
#define threadIdx (::kernel_host::dim3_of<::kernel_host::kThreadInThreadgroup>())
#define blockIdx (::kernel_host::dim3_of<::kernel_host::kThreadgroupInGrid>())
#define blockDim (::kernel_host::dim3_of<::kernel_host::kThreadsPerThreadgroup>())
#define gridDim (::kernel_host::dim3_of<::kernel_host::kThreadgroups>())

// ---- Synchronisation

// Orders accesses of all memory.
inline void __syncthreads(kernel_host::Location at = KERNEL_HOST_CALLER) {
  kernel_host::threadgroup_barrier(3, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, kernel_host::Location at = KERNEL_HOST_CALLER) {
  return metal::simd_shuffle_xor(value, ushort(mask == ~0u ? distance : 0), at);  // all lanes, or none is heard
}

// ---- Numbers

typedef half __half;
typedef bfloat __nv_bfloat16;
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float2 __half22float2(__half2 v) {
  return float2(float(v.x), float(v.y));
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return float2(float(v.x), float(v.y));
}
inline __half2 __floats2half2_rn(float a, float b) {
  return {__half(a), __half(b)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__nv_bfloat16(a), __nv_bfloat16(b)};
}
inline float2 make_float2(float a, float b) {
  return float2(a, b);
}

inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline float __uint_as_float(unsigned v) {
  return as_type<float>(v);
}
inline float __int_as_float(int v) {
  return as_type<float>(v);
}
