// The bucket of one pair of tokens in one channel of an attention term. Free of torch, for host and device code.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define BBQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: a copy in the library would be that of one SIMD target, for all.
#define BBQ_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace bbq {

// The numbers are those of KINDS in terms.py.
enum class Kind : int64_t { kPrefix = 0, kMatches = 1, kCosine = 2, kGap = 3 };

constexpr uint8_t kNoBucket = 255;  // a similarity of NaN: the score is NaN

BBQ_HOST_DEVICE int32_t bit_length(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return 64 - __clzll(static_cast<long long>(x));
#else
  return x == 0 ? 0 : 64 - __builtin_clzll(x);
#endif
}

// Index of the lowest set bit of x, which is not 0.
BBQ_HOST_DEVICE int32_t lowest_bit(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(x)) - 1;
#else
  return __builtin_ctzll(x);
#endif
}

// Packed codes: `bits` a level, level 0 lowest; sentinels differ between the sides, so negative codes never agree.
BBQ_HOST_DEVICE int32_t prefix_bucket(uint64_t query, uint64_t key, int32_t bits, int32_t levels) {
  const uint64_t different = query ^ key;
  const int32_t agree = different == 0 ? levels : lowest_bit(different) / bits;
  return agree < levels ? agree : levels;  // words with bits above the levels are not read past the table
}

BBQ_HOST_DEVICE int32_t matches_bucket(uint64_t query, uint64_t key, int32_t bits, int32_t levels) {
  const uint64_t field = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  const uint64_t different = query ^ key;
  int32_t agree = 0;
  for (int32_t l = 0; l < levels; ++l) agree += ((different >> (l * bits)) & field) == 0;
  return agree;
}

// Codes that are not packed.
BBQ_HOST_DEVICE int32_t prefix_bucket(const int64_t* query, const int64_t* key, int32_t levels) {
  int32_t l = 0;
  while (l < levels && query[l] == key[l] && query[l] >= 0) ++l;
  return l;
}

BBQ_HOST_DEVICE int32_t matches_bucket(const int64_t* query, const int64_t* key, int32_t levels) {
  int32_t agree = 0;
  for (int32_t l = 0; l < levels; ++l) agree += query[l] == key[l] && query[l] >= 0;
  return agree;
}

BBQ_HOST_DEVICE int32_t gap_bucket(int64_t query, int64_t key, int32_t buckets) {
  const uint64_t a = static_cast<uint64_t>(query), b = static_cast<uint64_t>(key);
  const int32_t length = bit_length(query > key ? a - b : b - a);  // unsigned: no difference overflows
  return length < buckets ? length : buckets - 1;
}

BBQ_HOST_DEVICE int32_t cosine_bucket(float similarity, const float* boundaries, int32_t buckets) {
  if (similarity != similarity) return kNoBucket;
  int32_t bucket = 0;
  while (bucket < buckets - 1 && boundaries[bucket] <= similarity) ++bucket;
  return bucket;
}

}  // namespace bbq
