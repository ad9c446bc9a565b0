// 16-bit floats as bits, and how float32 is rounded to them and to tf32. Free of torch, for host and device code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <bit>
#include <cmath>
#endif

#include "buckets.h"  // BBQ_HOST_DEVICE

namespace bbq {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#if defined(__CUDACC__)

BBQ_HOST_DEVICE float to_float(float value) { return value; }
BBQ_HOST_DEVICE float to_float(BFloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }
BBQ_HOST_DEVICE float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }

template <class T>
BBQ_HOST_DEVICE T from_float(float value);
template <>
BBQ_HOST_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
BBQ_HOST_DEVICE BFloat16 from_float<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
BBQ_HOST_DEVICE Half from_float<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

#else

// Rounds to nearest, ties to even, keeping the upper 32 - kDropped bits. NaN stays NaN.
template <int kDropped>
inline uint32_t round_bits(uint32_t bits) {
  if ((bits & 0x7fffffff) > 0x7f800000) return bits | 0x00400000;
  const uint32_t half = uint32_t{1} << (kDropped - 1), odd = (bits >> kDropped) & 1;
  return (bits + half - 1 + odd) & ~((uint32_t{1} << kDropped) - 1);
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }
inline float to_float(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, exponent = (value.bits >> 10) & 31;
  const uint32_t fraction = value.bits & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | (wide << 23) | (fraction << 13));
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  return {static_cast<uint16_t>(round_bits<16>(std::bit_cast<uint32_t>(value)) >> 16)};
}
template <>
inline Half from_float<Half>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float size = std::fabs(value);
  if (value != value) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (size < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyintf(size * 0x1p24f)))};
  const uint32_t rounded = round_bits<13>(std::bit_cast<uint32_t>(size));
  if (rounded >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65536 and above: infinity
  return {static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)))};
}

// What the tensor cores see of a float32 that was converted by cvt.rna.tf32: ties away from zero.
inline float round_to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7f800000) == 0x7f800000) return value;
  return std::bit_cast<float>((bits + 0x1000) & ~uint32_t{0x1fff});
}

#endif

}  // namespace bbq
