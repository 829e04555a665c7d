// Tiny kernels for the runtime's own tests. Those with `right` come in pairs: a fault, and its correct twin.
#include <metal_stdlib>

using namespace metal;

// ---- One threadgroup of 64 threads; x and y have 64 floats, y is not initialised

template <bool right>
[[kernel]] void bounds(
    device const float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  y[right ? i : i + 1] = x[i];  // line of the fault
}

template <bool right>
[[kernel]] void far_bounds(
    device const float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  y[i] = x[right ? i : i * 100000];
}

template <bool right>
[[kernel]] void threadgroup_bounds(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  threadgroup float a[64];
  threadgroup float b[64];
  a[right ? i : i + 1] = 1.0f;
  b[i] = 2.0f;
  y[i] = b[i];
}

template <bool right>
[[kernel]] void binding(
    device const float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    device const float* unbound [[buffer(7)]],
    uint i [[thread_position_in_grid]]) {
  y[i] = right ? x[i] : unbound[i];
}

template <bool right>
[[kernel]] void initialised(device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  if (right) {
    y[i] = 0.0f;
  }
  y[i] += 1.0f;
}

template <bool right>
[[kernel]] void threadgroup_initialised(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  threadgroup float a[64];
  if (right || i > 0) {
    a[i] = 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = a[63 - i];
}

template <bool right>
[[kernel]] void input(
    device const float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  device float* to = right ? y : (device float*)x;
  to[i] = 1.0f;
}

// Written, then read by others.
template <bool right>
[[kernel]] void barrier(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  threadgroup float a[64];
  a[i] = float(i);
  if (right) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  y[i] = a[i ^ 32];
}

template <bool right>
[[kernel]] void barrier_flags(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  threadgroup float a[64];
  a[i] = float(i);
  threadgroup_barrier(right ? mem_flags::mem_threadgroup : mem_flags::mem_device);
  y[i] = a[i ^ 32];
}

template <bool right>
[[kernel]] void device_barrier_flags(
    device float* y [[buffer(1)]], device float* z [[buffer(2)]], uint i [[thread_position_in_threadgroup]]) {
  z[i] = float(i);
  threadgroup_barrier(right ? mem_flags::mem_device : mem_flags::mem_threadgroup);
  y[i] = z[i ^ 32];
}

// Read, then written by others.
template <bool right>
[[kernel]] void barrier_before_reuse(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  threadgroup float a[64];
  a[i] = float(i);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = a[i ^ 32];
  if (right) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  a[i] = 0.0f;
}

// A SIMD-group's barrier orders its own lanes and no others; its sums order nothing.
template <bool right>
[[kernel]] void simd_barrier(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  threadgroup float a[64];
  a[i] = float(i);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = a[right ? i ^ 1 : i ^ 32];
}

template <bool right>
[[kernel]] void sum_is_no_barrier(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  threadgroup float a[64];
  a[i] = simd_sum(float(i));
  if (right) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  y[i] = simd_sum(1.0f) + a[i ^ 1];
}

template <bool right>
[[kernel]] void same_barrier(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  if (right || i < 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  y[i] = 1.0f;
}

template <bool right>
[[kernel]] void barrier_of_all(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  if (!right && i == 5) {
    return;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = 1.0f;
}

template <bool right>
[[kernel]] void simd_of_all(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  if (!right && i == 5) {
    return;
  }
  y[i] = simd_sum(1.0f);
}

template <bool right>
[[kernel]] void same_simd_operation(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  if (right || i % 2 == 0) {
    y[i] = simd_sum(1.0f);
  } else {
    y[i] = simd_max(1.0f);
  }
}

template <bool right>
[[kernel]] void barrier_or_simd(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  if (right || i % 2 == 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  y[i] = simd_sum(1.0f);
}

template <bool right>
[[kernel]] void relaxed(device atomic_uint* counter [[buffer(3)]]) {
  atomic_fetch_add_explicit(counter, 1u, right ? memory_order_relaxed : memory_order_seq_cst);
}

template <bool right>
[[kernel]] void atomic_bounds(device atomic_uint* counter [[buffer(3)]]) {
  atomic_fetch_add_explicit(counter + (right ? 0 : 2), 1u, memory_order_relaxed);
}

template <bool right>
[[kernel]] void atomic_initialised(device atomic_uint* flag [[buffer(2)]]) {
  if (right) {
    atomic_store_explicit(flag, 0u, memory_order_relaxed);
  }
  atomic_fetch_add_explicit(flag, 1u, memory_order_relaxed);
}

// Atomics beside plain accesses of the same word.
template <bool right>
[[kernel]] void atomic_or_plain(device atomic_uint* counter [[buffer(3)]], uint i [[thread_position_in_threadgroup]]) {
  if (right || i > 0) {
    atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
  } else {
    *(device uint*)counter = 1;
  }
}

template <bool right>
[[kernel]] void threadgroup_size(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  constexpr int floats = right ? 8192 : 8193;
  threadgroup float a[floats];
  a[i] = 1.0f;
  y[i] = a[i];
}

template <bool right>
[[kernel]] void alignment(
    device const float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  if (i < 8) {
    device const uint4* words = (device const uint4*)(x + (right ? 4 : 2));
    *(device uint4*)(y + 4 * i) = words[i];
  }
}

struct alignas(16) Eight {
  half v[8];
};
template <bool right>
[[kernel]] void struct_alignment(device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  if (i < 4) {
    Eight e;
    for (int k = 0; k < 8; k++) {
      e.v[k] = half(k);
    }
    device Eight* to = (device Eight*)((device half*)y + 8 * i + (right ? 0 : 1));
    *to = e;
  }
}

template <bool right>
[[kernel]] void threadgroup_alignment(device float* y [[buffer(1)]], uint i [[thread_position_in_threadgroup]]) {
  threadgroup float a[68];
  a[i] = 1.0f;
  if (i < 4) {
    a[64 + i] = 1.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = (*(threadgroup float4*)(a + (right ? i / 4 * 4 : i)))[0];
}

template <bool right>
[[kernel]] void atomic_alignment(device uchar* counter [[buffer(3)]]) {
  atomic_fetch_add_explicit((device atomic_uint*)(counter + (right ? 4 : 2)), 1u, memory_order_relaxed);
}

// ---- Several threadgroups

template <bool right>
[[kernel]] void groups_apart(device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  y[right ? i : i % 16] = float(i);
}

// In place: buffer 0 and 1 are the same array.
template <bool right>
[[kernel]] void in_place(
    device const float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  y[i] = x[right ? i : 63 - i] + 1.0f;
}

#if __METAL_VERSION__ >= 320
// The threadgroup that finishes last adds what all have published. One fault at a time.
enum Fault {
  kRight,
  kNoRelease,
  kNoAcquire,
  kAcquireForRelease,
  kReleaseForAcquire,
  kThreadgroupScope,
  kThreadgroupFlags,
  kFenceBeforeData,
  kBarrierWithoutDevice,
};

template <int fault>
inline void fence_unless(int without, memory_order order) {
  if (fault == without) {
    return;
  }
  atomic_thread_fence(
      fault == kThreadgroupFlags ? mem_flags::mem_threadgroup : mem_flags::mem_device, order,
      fault == kThreadgroupScope ? thread_scope_threadgroup : thread_scope_device);
}

// Thread 0's part: true in the last threadgroup.
template <int fault>
inline bool is_last_to_count(device atomic_uint* counter, uint n_groups) {
  if (fault != kFenceBeforeData) {
    fence_unless<fault>(kNoRelease, fault == kAcquireForRelease ? memory_order_acquire : memory_order_release);
  }
  const bool last = atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed) == n_groups - 1;
  fence_unless<fault>(kNoAcquire, fault == kReleaseForAcquire ? memory_order_release : memory_order_acquire);
  return last;
}

// Data is plain: a fault is a race.
template <int fault, bool is_coherent>
[[kernel]] void last_adds(
    device float* sum [[buffer(1)]],
    coherent(device) device float* coherent_data [[buffer(2)]],
    device float* data [[buffer(2)]],
    device atomic_uint* counter [[buffer(3)]],
    uint group [[threadgroup_position_in_grid]],
    uint n_groups [[threadgroups_per_grid]],
    uint i [[thread_position_in_threadgroup]]) {
  threadgroup bool is_last;
  if (i == 0) {
    if (fault == kFenceBeforeData) {
      fence_unless<fault>(kNoRelease, memory_order_release);
    }
    coherent_data[group] = float(group + 1);
    is_last = is_last_to_count<fault>(counter, n_groups);
  }
  threadgroup_barrier(
      fault == kBarrierWithoutDevice ? mem_flags::mem_threadgroup : mem_flags::mem_threadgroup | mem_flags::mem_device);
  if (is_last) {
    float mine = 0.0f;
    if (i < n_groups && is_coherent) {
      mine = coherent_data[i];
    } else if (i < n_groups) {
      mine = data[i];
    }
    const float all = simd_sum(mine);
    if (i == 0) {
      sum[0] = all;
    }
  }
}

// Data is atomic: a fault is no race, but lets an old value be read.
template <int fault>
[[kernel]] void last_adds_atomics(
    device float* sum [[buffer(1)]],
    device atomic_uint* data [[buffer(2)]],
    device atomic_uint* counter [[buffer(3)]],
    uint group [[threadgroup_position_in_grid]],
    uint n_groups [[threadgroups_per_grid]],
    uint i [[thread_position_in_threadgroup]]) {
  if (i == 0) {
    atomic_store_explicit(data + group, as_type<uint>(float(group + 1)), memory_order_relaxed);
    if (is_last_to_count<fault>(counter, n_groups)) {
      float all = 0.0f;
      for (uint g = 0; g < n_groups; g++) {
        all += as_type<float>(atomic_load_explicit(data + g, memory_order_relaxed));
      }
      sum[0] = all;
    }
  }
}
#endif

// ---- Values

template <typename From, typename To>
[[kernel]] void convert(
    device const From* from [[buffer(0)]],
    device To* to [[buffer(1)]],
    constant uint& n [[buffer(2)]],
    uint i [[thread_position_in_grid]],
    uint threads [[threads_per_grid]]) {
  for (; i < n; i += threads) {
    to[i] = To(from[i]);
  }
}

// a * b + a, rounded to T after each operation.
template <typename T>
[[kernel]] void arithmetic(
    device const T* a [[buffer(0)]],
    device const T* b [[buffer(1)]],
    device T* c [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  c[i] = a[i] * b[i] + a[i];
}

[[kernel]] void lanes(
    device int* sum [[buffer(0)]],
    device int* largest [[buffer(1)]],
    device int* other [[buffer(2)]],
    device int* any_and_all [[buffer(3)]],
    uint i [[thread_position_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint n_simdgroups [[simdgroups_per_threadgroup]],
    uint width [[threads_per_simdgroup]]) {
  sum[i] = simd_sum(int(i) + 1);
  largest[i] = simd_max(int(i));
  other[i] = simd_shuffle_xor(int(i), 1);
  any_and_all[i] =
      simd_any(i == 0) + 2 * simd_all(i < width) + 4 * (simdgroup * width + lane == i) + 8 * (simdgroup < n_simdgroups);
}

// Three axes of the grid.
[[kernel]] void positions(
    device uint* at [[buffer(0)]],
    uint3 in_grid [[thread_position_in_grid]],
    uint3 in_group [[thread_position_in_threadgroup]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 size [[threads_per_threadgroup]],
    uint3 grid [[threads_per_grid]]) {
  const uint i = (in_grid.z * grid.y + in_grid.y) * grid.x + in_grid.x;
  const bool fits = in_grid.x == group.x * size.x + in_group.x && in_grid.y == group.y * size.y + in_group.y &&
                    in_grid.z == group.z * size.z + in_group.z;
  at[i] = fits ? i : ~0u;
}

// Each thread reads a word of a and a half of b, every fourth one more of b; it writes a half of c.
[[kernel]] void traffic(
    device const uint4* a [[buffer(0)]],
    device const half* b [[buffer(1)]],
    device half* c [[buffer(2)]],
    device atomic_uint* counter [[buffer(3)]],
    uint i [[thread_position_in_grid]]) {
  threadgroup half t[32];
  t[i % 32] = b[i];
  const uint4 word = a[i];
  half sum = t[i % 32] + half(float(word[0] + word[1] + word[2] + word[3]));
  if (i % 4 == 0) {
    sum += b[i + 1];
  }
  c[i] = sum;
  atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
}
