// What compiled kernels (through <metal_stdlib>) call in the runtime.
#pragma once
#include <stddef.h>
#include <stdint.h>

// Code of the shim that is no access of the kernel's.
#define KERNEL_HOST_UNCHECKED __attribute__((no_sanitize_thread))

namespace kernel_host {

struct Location {
  const char* file = "";
  unsigned line = 0;
};
// As a default argument: where the call is.
#define KERNEL_HOST_CALLER {__builtin_FILE(), __builtin_LINE()}

enum Builtin {
  kThreadInGrid,
  kThreadInThreadgroup,
  kThreadgroupInGrid,
  kThreadIndex,
  kLaneIndex,
  kSimdgroupIndex,
  kSimdgroups,
  kSimdWidth,
  kThreadsPerThreadgroup,
  kThreadgroups,
  kThreadsInGrid,
};

struct RegisterKernel {
  RegisterKernel(const char* name, void (*run)());
};

void* bound_buffer(int index, size_t min_bytes);
void builtin_id(Builtin which, unsigned out[3]);
// One variable for each threadgroup; `key` tells variables apart.
void* threadgroup_variable(const void* key, size_t bytes, size_t alignment, const char* name);

void threadgroup_barrier(unsigned flags, const Location& at);
void simdgroup_barrier(unsigned flags, const Location& at);
void fence(unsigned flags, int order, int scope);

// All lanes hand in a value and continue; returns the values, kMaxLaneBytes apart.
constexpr size_t kMaxLaneBytes = 16;
constexpr unsigned kMaxSimdWidth = 64;
const char* simd_exchange(
    const char* op, const void* value, size_t bytes, const Location& at, unsigned* lanes, unsigned* lane);

uint32_t atomic_load(void* p, int order);
void atomic_store(void* p, uint32_t value, int order);
// A read-modify-write is begin, then end with the new value; no other thread runs between the two.
uint32_t atomic_modify_begin(void* p, int order);
void atomic_modify_end(void* p, uint32_t value);

}  // namespace kernel_host
