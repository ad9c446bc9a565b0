// All that a kernel body may use of the GPU, under one name in two worlds: intrinsics and PTX for nvcc, csrc/simt for
// a host compiler. A kernel is a struct with `Params` and `static BBQ_DEVICE void run(const Params&)`.
//
// Pointers to global memory are `Global<T>`, to shared memory `Shared<T>`: raw on the device, checked on the host.
// Warp operations take part with all 32 lanes.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/floats.h"

#if defined(__CUDACC__)
#define BBQ_DEVICE __device__ __forceinline__
#define BBQ_PRAGMA(text) _Pragma(#text)
#define BBQ_UNROLL BBQ_PRAGMA(unroll)
#define BBQ_UNROLL_BY(times) BBQ_PRAGMA(unroll times)
#else
#include "simt/simt.h"
#define BBQ_DEVICE inline
#define BBQ_UNROLL
#define BBQ_UNROLL_BY(times)
#endif

namespace bbq::gpu {

constexpr int kLanes = 32;
constexpr float kInfinity = __builtin_huge_valf();

// A 16 x 8 piece of a product in the registers of one lane: rows lane / 4 (0, 1) and 8 below (2, 3), columns
// 2 (lane % 4) and the next.
struct Accumulator {
  float v[4];
};
// 16 rows by 16 columns of 16-bit elements, and 16 by 8, as `multiply` wants them.
struct Left {
  uint32_t v[4];
};
struct Right {
  uint32_t v[2];
};

#if defined(__CUDACC__)

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

template <class U, class T>
BBQ_DEVICE U* cast(T* pointer) {
  return reinterpret_cast<U*>(pointer);
}

BBQ_DEVICE int thread_index() { return threadIdx.x; }
BBQ_DEVICE int block_threads() { return blockDim.x; }
BBQ_DEVICE int64_t block_index() { return blockIdx.x; }
BBQ_DEVICE int64_t block_index_y() { return blockIdx.y; }
BBQ_DEVICE int64_t grid_blocks() { return gridDim.x; }

template <class T>
BBQ_DEVICE Shared<T> shared_at(int byte) {
  extern __shared__ __align__(128) unsigned char bbq_shared_memory[];
  return reinterpret_cast<T*>(bbq_shared_memory + byte);
}

BBQ_DEVICE void sync_threads() { __syncthreads(); }
// The same, and whether any thread says so.
BBQ_DEVICE bool sync_threads_or(bool vote) { return __syncthreads_or(vote); }
BBQ_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
BBQ_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffff, value, lane);
}
template <class T>
BBQ_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffff, value, mask);
}
BBQ_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffff, vote); }
BBQ_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
BBQ_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
BBQ_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
BBQ_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
BBQ_DEVICE float quiet_nan() { return __int_as_float(0x7fffffff); }

// Rounded one by one, never contracted into a fused multiply-add.
BBQ_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
BBQ_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
BBQ_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// 2^x with a relative error of at most 2^-22; 0 for -infinity, NaN stays, results below 2^-126 are 0.
BBQ_DEVICE float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Rounded to tf32, ties away from zero.
BBQ_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Two floats rounded to float16 or bfloat16, the first in the lower half of the word.
BBQ_DEVICE uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
BBQ_DEVICE uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

BBQ_DEVICE uintptr_t address_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
template <class T>
struct alignas(2 * sizeof(T)) Two {
  T v[2];
};
template <class T>
BBQ_DEVICE Two<T> load2(const T* pointer) {
  return *reinterpret_cast<const Two<T>*>(pointer);
}
template <class T>
BBQ_DEVICE void store2(T* pointer, const Two<T>& value) {
  *reinterpret_cast<Two<T>*>(pointer) = value;
}
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};
template <class T>
BBQ_DEVICE Four<T> load4(const T* pointer) {
  return *reinterpret_cast<const Four<T>*>(pointer);
}
template <class T>
BBQ_DEVICE void store4(T* pointer, const Four<T>& value) {
  *reinterpret_cast<Four<T>*>(pointer) = value;
}

BBQ_DEVICE void async_copy16(void* target, const void* source, int valid = 16) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(valid) : "memory");
}
BBQ_DEVICE void async_copy8(void* target, const void* source, int valid = 8) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(source), "r"(valid) : "memory");
}
BBQ_DEVICE void async_copy4(void* target, const void* source, int valid = 4) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(source), "r"(valid) : "memory");
}
BBQ_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsInFlight>
BBQ_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsInFlight) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lanes 8m to 8m + 7 name the rows of matrix m.
BBQ_DEVICE void load_matrices(uint32_t (&words)[4], const uint16_t* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

// The same, each matrix transposed.
BBQ_DEVICE void load_matrices_across(uint32_t (&words)[4], const uint16_t* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

BBQ_DEVICE Accumulator multiply_half(const Left& a, const Right& b, const Accumulator& c) {
  Accumulator d;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d.v[0]), "=f"(d.v[1]), "=f"(d.v[2]), "=f"(d.v[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]), "f"(c.v[0]), "f"(c.v[1]),
        "f"(c.v[2]), "f"(c.v[3]));
  return d;
}
BBQ_DEVICE Accumulator multiply_bfloat16(const Left& a, const Right& b, const Accumulator& c) {
  Accumulator d;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d.v[0]), "=f"(d.v[1]), "=f"(d.v[2]), "=f"(d.v[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]), "f"(c.v[0]), "f"(c.v[1]),
        "f"(c.v[2]), "f"(c.v[3]));
  return d;
}

// 16 by 8 elements of tf32 times 8 by 8.
BBQ_DEVICE Accumulator multiply_tf32(const Left& a, const Right& b, const Accumulator& c) {
  Accumulator d;
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d.v[0]), "=f"(d.v[1]), "=f"(d.v[2]), "=f"(d.v[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]), "f"(c.v[0]), "f"(c.v[1]),
        "f"(c.v[2]), "f"(c.v[3]));
  return d;
}

template <class T>
BBQ_DEVICE void atomic_add(T* target, T value) {
  atomicAdd(target, value);
}

BBQ_DEVICE void atomic_min(int* target, int value) { atomicMin(target, value); }
BBQ_DEVICE void atomic_max(int* target, int value) { atomicMax(target, value); }

// A device-side assertion: the launch fails, and with it the context.
BBQ_DEVICE void fail_code(int64_t, int64_t) {
  __assert_fail("codes: expected -1 to codebook_size - 1", __FILE__, __LINE__, "bbqrec_kernels");
  __trap();
}

#else

template <class T>
using Global = simt::Pointer<T>;
template <class T>
using Shared = simt::Pointer<T>;

template <class U, class T>
simt::Pointer<U> cast(simt::Pointer<T> pointer) {
  return pointer.template as<U>();
}

inline int thread_index() { return simt::thread_index(); }
inline int block_threads() { return simt::block_threads(); }
inline int64_t block_index() { return simt::block_index().x; }
inline int64_t block_index_y() { return simt::block_index().y; }
inline int64_t grid_blocks() { return simt::grid_size().x; }

template <class T>
Shared<T> shared_at(int byte) {
  return (simt::shared_memory() + byte).as<T>();
}

inline void sync_threads(simt::Location at = simt::Location::current()) { simt::sync_threads(at); }
inline bool sync_threads_or(bool vote, simt::Location at = simt::Location::current()) {
  return simt::sync_threads_or(vote, at);
}
inline void sync_warp(simt::Location at = simt::Location::current()) { simt::sync_warp(simt::kAllLanes, at); }

template <class T>
T shuffle(T value, int lane, simt::Location at = simt::Location::current()) {
  return simt::shuffle(value, lane, simt::kAllLanes, at);
}
template <class T>
T shuffle_xor(T value, int mask, simt::Location at = simt::Location::current()) {
  return simt::shuffle(value, (simt::thread_index() % kLanes) ^ mask, simt::kAllLanes, at);
}
inline uint32_t ballot(bool vote, simt::Location at = simt::Location::current()) {
  return simt::ballot(vote, simt::kAllLanes, at);
}
inline int count_bits(uint32_t bits) { return std::popcount(bits); }
inline int lowest_bit(uint32_t bits) { return bits ? std::countr_zero(bits) : -1; }
inline uint32_t float_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline float bits_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float quiet_nan() { return __builtin_nanf(""); }

inline float add(float a, float b) { return a + b; }
inline float multiply(float a, float b) { return a * b; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

// As wrong as the GPU's may be, by something drawn from the bits of x; exact for integers, as the GPU's is.
inline float exp2(float x) {
  const double exact = std::exp2(double{x});
  if (exact < 0x1p-126) return 0.0f;
  const double drawn = static_cast<int32_t>(float_bits(x) * 0x9e3779b1u) * 0x1p-31;
  return static_cast<float>(x == std::floor(x) ? exact : exact * (1 + drawn * 0x1p-22));
}

inline uint32_t to_tf32(float value) { return float_bits(value != value ? quiet_nan() : round_to_tf32(value)); }

inline uint32_t pack_half(float low, float high) {
  return from_float<Half>(low).bits | uint32_t{from_float<Half>(high).bits} << 16;
}
inline uint32_t pack_bfloat16(float low, float high) {
  return from_float<BFloat16>(low).bits | uint32_t{from_float<BFloat16>(high).bits} << 16;
}

template <class T>
uintptr_t address_of(simt::Pointer<T> pointer) {
  return pointer.address();
}
template <class T>
struct Two {
  T v[2];
};
template <class T>
Two<std::remove_const_t<T>> load2(simt::Pointer<T> pointer) {
  using Value = std::remove_const_t<T>;
  return pointer.template as<const Two<Value>>().read(2 * sizeof(T));
}
template <class T>
void store2(simt::Pointer<T> pointer, const Two<T>& value) {
  pointer.template as<Two<T>>().write(value, 2 * sizeof(T));
}
template <class T>
struct Four {
  T v[4];
};
template <class T>
Four<std::remove_const_t<T>> load4(simt::Pointer<T> pointer) {
  using Value = std::remove_const_t<T>;
  return pointer.template as<const Four<Value>>().read(4 * sizeof(T));
}
template <class T>
void store4(simt::Pointer<T> pointer, const Four<T>& value) {
  pointer.template as<Four<T>>().write(value, 4 * sizeof(T));
}

template <class T, class U>
void async_copy16(Shared<T> target, Global<U> source, int valid = 16) {
  simt::async_copy(target.template as<std::byte>(), source.template as<const std::byte>(), 16, valid);
}
template <class T, class U>
void async_copy8(Shared<T> target, Global<U> source, int valid = 8) {
  simt::async_copy(target.template as<std::byte>(), source.template as<const std::byte>(), 8, valid);
}
template <class T, class U>
void async_copy4(Shared<T> target, Global<U> source, int valid = 4) {
  simt::async_copy(target.template as<std::byte>(), source.template as<const std::byte>(), 4, valid);
}
inline void async_commit() { simt::async_commit(); }
template <int kGroupsInFlight>
void async_wait(simt::Location at = simt::Location::current()) {
  simt::async_wait(kGroupsInFlight, at);
}

inline void load_matrices(uint32_t (&words)[4], Shared<const uint16_t> row,
                          simt::Location at = simt::Location::current()) {
  const auto loaded = simt::load_matrices(row, at);
  for (int i = 0; i < 4; ++i) words[i] = loaded[i];
}

inline void load_matrices_across(uint32_t (&words)[4], Shared<const uint16_t> row,
                                 simt::Location at = simt::Location::current()) {
  const auto loaded = simt::load_matrices_across(row, at);
  for (int i = 0; i < 4; ++i) words[i] = loaded[i];
}

inline Accumulator multiply_tiles(simt::Tile kind, const Left& a, const Right& b, const Accumulator& c,
                                  simt::Location at) {
  return std::bit_cast<Accumulator>(simt::multiply_tiles(kind, std::bit_cast<std::array<uint32_t, 4>>(a),
                                                         std::bit_cast<std::array<uint32_t, 2>>(b),
                                                         std::bit_cast<std::array<float, 4>>(c), at));
}
inline Accumulator multiply_half(const Left& a, const Right& b, const Accumulator& c,
                                 simt::Location at = simt::Location::current()) {
  return multiply_tiles(simt::Tile::kHalf, a, b, c, at);
}
inline Accumulator multiply_bfloat16(const Left& a, const Right& b, const Accumulator& c,
                                     simt::Location at = simt::Location::current()) {
  return multiply_tiles(simt::Tile::kBFloat16, a, b, c, at);
}
inline Accumulator multiply_tf32(const Left& a, const Right& b, const Accumulator& c,
                                 simt::Location at = simt::Location::current()) {
  return multiply_tiles(simt::Tile::kTf32, a, b, c, at);
}

template <class T, class F>
void atomic_update(simt::Pointer<T> target, const F& update) {
  simt::check_access(target.region(), target.address(), sizeof(T), alignof(T), simt::Access::kAtomic);
  T old;
  std::memcpy(&old, reinterpret_cast<const void*>(target.address()), sizeof(T));
  target.write(update(old), alignof(T), simt::Access::kAtomic);
}
template <class T>
void atomic_add(simt::Pointer<T> target, T value) {
  atomic_update(target, [value](T old) { return old + value; });
}
inline void atomic_min(simt::Pointer<int> target, int value) {
  atomic_update(target, [value](int old) { return old < value ? old : value; });
}
inline void atomic_max(simt::Pointer<int> target, int value) {
  atomic_update(target, [value](int old) { return old > value ? old : value; });
}

inline void fail_code(int64_t code, int64_t size) {
  throw std::out_of_range("codes: got " + std::to_string(code) + ", expected -1 to " + std::to_string(size - 1) +
                          " (codebook_size - 1)");
}

#endif

BBQ_DEVICE int lane_index() { return thread_index() % kLanes; }
BBQ_DEVICE int warp_index() { return thread_index() / kLanes; }

// The sum over `kGroup` neighbouring lanes, the same bits in each of them.
template <int kGroup>
BBQ_DEVICE float sum_over(float value) {
  BBQ_UNROLL
  for (int mask = kGroup / 2; mask > 0; mask /= 2) value = add(value, shuffle_xor(value, mask));
  return value;
}
template <int kGroup>
BBQ_DEVICE float max_over(float value) {
  BBQ_UNROLL
  for (int mask = kGroup / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// A code, after it has been checked: nothing is read beyond an assertion that failed.
BBQ_DEVICE int64_t checked_code(int64_t code, int64_t size) {
  if (code < -1 || code >= size) fail_code(code, size);
  return code;
}

}  // namespace bbq::gpu

namespace bbq {

// What the sizes of launches depend on: multiprocessors, and bytes of shared memory.
struct Machine {
  int processors, shared_per_block, shared_per_processor;
};

}  // namespace bbq
