// Vectors of kLanes numbers for kernels that are compiled once for each SIMD target (simd_targets.h), by the vector
// extensions of GCC and Clang: + - * < and ?: work on whole vectors.
//
// Everything here, and in the kernels, has internal linkage, and nothing is used of the standard library but types: of
// an inline function that several targets compile, the linker would keep one copy for all, perhaps the one with
// instructions that a machine lacks. tests/compile_only looks for such copies.
#pragma once

#if !defined(BBQ_SIMD) || !defined(BBQ_LANES)
#error "CMake compiles this for each SIMD target, with BBQ_SIMD its name and BBQ_LANES the floats of a vector"
#endif

#include <stdint.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#define BBQ_INLINE inline __attribute__((always_inline))
#define BBQ_INLINE_LAMBDA __attribute__((always_inline))

namespace bbq::BBQ_SIMD {
namespace {

constexpr int kLanes = BBQ_LANES;

// What the machine has. A vector of kLanes floats may take several registers, or a part of one.
#if defined(__AVX512F__)
constexpr int kRegisters = 32, kRegisterLanes = 16;
#elif defined(__AVX__)
constexpr int kRegisters = 16, kRegisterLanes = 8;
#elif defined(__aarch64__)
constexpr int kRegisters = 32, kRegisterLanes = 4;
#else
constexpr int kRegisters = 16, kRegisterLanes = 4;
#endif
constexpr int kVectorRegisters = kLanes > kRegisterLanes ? kLanes / kRegisterLanes : 1;
static_assert(kLanes == 4 || kLanes == 8 || kLanes == 16);

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N = kLanes>
using Vector = typename VectorOf<T, N>::type;

using Floats = Vector<float>;
using Doubles = Vector<double>;
using Ints = Vector<int32_t>;  // also what a comparison of Floats gives: -1 where true, 0 where false
using Words = Vector<uint32_t>;

// 16-bit floats as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// f<0>(), ..., f<N - 1>(): arrays of vectors that only constants index stay in registers.
template <int N, int I = 0, class F>
BBQ_INLINE void unroll(const F& f) {
  if constexpr (I < N) {
    f.template operator()<I>();
    unroll<N, I + 1>(f);
  }
}

// ---- Whole vectors, and the first lanes of one ----

struct All {};
struct First {
  int64_t count;  // 1 to kLanes - 1
};

// Calls f(d, All or First) for the vectors that cover `width` elements from `begin` on.
template <class F>
BBQ_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t d = begin;
  for (; d + kLanes <= end; d += kLanes) f(d, All{});
  if (d < end) f(d, First{end - d});
}

BBQ_INLINE Floats broadcast(float value) { return Floats{} + value; }
BBQ_INLINE Ints broadcast(int32_t value) { return Ints{} + value; }

BBQ_INLINE Ints lane_numbers() {
  Ints lanes;
  for (int j = 0; j < kLanes; ++j) lanes[j] = j;
  return lanes;
}

template <class To, class From>
BBQ_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V, class T>
BBQ_INLINE V load_as(const T* p) {
  static_assert(sizeof(V) == kLanes * sizeof(T));
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

BBQ_INLINE Floats load(const float* p, All = {}) { return load_as<Floats>(p); }
BBQ_INLINE void store(float* p, Floats v, All = {}) { __builtin_memcpy(p, &v, sizeof(v)); }

// Lanes past the first ones are zero, and nothing behind them is read.
BBQ_INLINE Floats load(const float* p, First first) {
#if defined(__AVX512F__) && BBQ_LANES == 16
  return bit_cast<Floats>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << first.count) - 1), p));
#elif defined(__AVX__) && BBQ_LANES % 8 == 0
  const Ints mask = lane_numbers() < broadcast(static_cast<int32_t>(first.count));
  Floats v;
  for (int j = 0; j < kLanes; j += 8) {
    __m256i part;
    __builtin_memcpy(&part, reinterpret_cast<const char*>(&mask) + j * 4, 32);
    const __m256 values = _mm256_maskload_ps(p + j, part);
    __builtin_memcpy(reinterpret_cast<char*>(&v) + j * 4, &values, 32);
  }
  return v;
#else
  Floats v{};
  for (int j = 0; j < kLanes; ++j) {
    if (j < first.count) v[j] = p[j];
  }
  return v;
#endif
}

// Nothing behind the first lanes is written.
BBQ_INLINE void store(float* p, Floats v, First first) {
#if defined(__AVX512F__) && BBQ_LANES == 16
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << first.count) - 1), bit_cast<__m512>(v));
#elif defined(__AVX__) && BBQ_LANES % 8 == 0
  const Ints mask = lane_numbers() < broadcast(static_cast<int32_t>(first.count));
  for (int j = 0; j < kLanes; j += 8) {
    __m256i part;
    __m256 values;
    __builtin_memcpy(&part, reinterpret_cast<const char*>(&mask) + j * 4, 32);
    __builtin_memcpy(&values, reinterpret_cast<const char*>(&v) + j * 4, 32);
    _mm256_maskstore_ps(p + j, part, values);
  }
#else
  for (int j = 0; j < kLanes; ++j) {
    if (j < first.count) p[j] = v[j];
  }
#endif
}

// ---- bfloat16 and float16: exact to float, rounded to nearest (ties to even) back; NaN stays NaN ----

using Halves = Vector<uint16_t>;

BBQ_INLINE Words select(Ints mask, Words a, Words b) {
  const Words m = bit_cast<Words>(mask);
  return (a & m) | (b & ~m);
}

BBQ_INLINE Floats widen(Halves halves, BFloat16) {
  return bit_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

BBQ_INLINE Halves narrow(Floats v, BFloat16) {
  const Words bits = bit_cast<Words>(v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(select(v == v, rounded, Words{} + 0x7fc0), Halves);
}

BBQ_INLINE Floats widen(Halves halves, Float16) {
  const Words bits = __builtin_convertvector(halves, Words);
  const Words exponent = bits & 0x7c00, magnitude = (bits & 0x7fff) << 13;
  // The exponents of the two formats differ by 112; a product moves subnormal numbers as well.
  const Words finite = bit_cast<Words>(bit_cast<Floats>(magnitude) * 0x1p112f);
  const Words not_finite = magnitude | 0x7f800000;
  const Words value = select(exponent == 0x7c00, not_finite, finite);
  return bit_cast<Floats>(value | ((bits & 0x8000) << 16));
}

BBQ_INLINE Halves narrow(Floats v, Float16) {
  const Words bits = bit_cast<Words>(v), magnitude = bits & 0x7fffffff;
  const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 a unit is 2^-24, as it is in floats between 0.5 and 1: an addition rounds there.
  const Words small = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000;
  Words value = select(bit_cast<Ints>(magnitude) < 0x38800000, small, normal);
  value = select(bit_cast<Ints>(magnitude) < 0x477ff000, value, Words{} + 0x7c00);  // 65520 and more: infinite
  value = select(v == v, value, Words{} + 0x7e00);
  return __builtin_convertvector(value | ((bits >> 16) & 0x8000), Halves);
}

template <class T>
BBQ_INLINE Floats load(const T* p, All = {}) {
  return widen(load_as<Halves>(p), T{});
}

template <class T>
BBQ_INLINE Floats load(const T* p, First first) {
  Halves halves{};
  for (int j = 0; j < first.count; ++j) halves[j] = p[j].bits;
  return widen(halves, T{});
}

template <class T>
BBQ_INLINE void store(T* p, Floats v, All = {}) {
  const Halves halves = narrow(v, T{});
  __builtin_memcpy(p, &halves, sizeof(halves));
}

template <class T>
BBQ_INLINE void store(T* p, Floats v, First first) {
  const Halves halves = narrow(v, T{});
  for (int j = 0; j < first.count; ++j) p[j].bits = halves[j];
}

// ---- Across lanes ----

// Combines all lanes in pairs, always the same ones: (0, N/2), (1, N/2 + 1), ..., then again.
template <class T, int N = kLanes, class Op>
BBQ_INLINE T reduce(const Vector<T, N>& v, const Op& combine) {
  if constexpr (N == 2) {
    return combine(v[0], v[1]);
  } else {
    Vector<T, N / 2> low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(low));
    return reduce<T, N / 2>(combine(low, high), combine);
  }
}

struct Add {
  template <class V>
  BBQ_INLINE V operator()(const V& a, const V& b) const {
    return a + b;
  }
};
struct Min {  // b where either is NaN
  template <class V>
  BBQ_INLINE V operator()(const V& a, const V& b) const {
    return a < b ? a : b;
  }
};

BBQ_INLINE double sum(const Doubles& v) { return reduce<double>(v, Add{}); }
BBQ_INLINE float min(const Floats& v) { return reduce<float>(v, Min{}); }
BBQ_INLINE int32_t min(const Ints& v) { return reduce<int32_t>(v, Min{}); }
BBQ_INLINE bool all(const Ints& mask) {
  return reduce<int32_t>(mask, [](const auto& a, const auto& b) BBQ_INLINE_LAMBDA { return a & b; }) != 0;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define BBQ_SHUFFLEVECTOR 1
#endif
#endif

// a0 b0 a1 b1 ... of the lower halves, or of the upper ones.
template <bool upper, int... lane>
BBQ_INLINE Floats interleave_lanes(Floats a, Floats b) {
  constexpr int offset = upper ? kLanes / 2 : 0;
#if defined(BBQ_SHUFFLEVECTOR)
  return __builtin_shufflevector(a, b, (lane / 2 + offset + lane % 2 * kLanes)...);
#else
  return __builtin_shuffle(a, b, Ints{(lane / 2 + offset + lane % 2 * kLanes)...});
#endif
}

template <bool upper, int... lane>
BBQ_INLINE Floats interleave(Floats a, Floats b) {
  if constexpr (sizeof...(lane) < kLanes) {
    return interleave<upper, lane..., static_cast<int>(sizeof...(lane))>(a, b);
  } else {
    return interleave_lanes<upper, lane...>(a, b);
  }
}

// Transposes a square: lane j of rows[i] and lane i of rows[j] change places.
BBQ_INLINE void transpose(Floats (&rows)[kLanes]) {
  for (int step = 1; step < kLanes; step *= 2) {
    Floats mixed[kLanes];
    unroll<kLanes / 2>([&]<int i>() BBQ_INLINE_LAMBDA {
      mixed[2 * i] = interleave<false>(rows[i], rows[i + kLanes / 2]);
      mixed[2 * i + 1] = interleave<true>(rows[i], rows[i + kLanes / 2]);
    });
    unroll<kLanes>([&]<int i>() BBQ_INLINE_LAMBDA { rows[i] = mixed[i]; });
  }
}

}  // namespace
}  // namespace bbq::BBQ_SIMD
