// Similarity-reweighted attention on vectors of kLanes, in tiles of kBlock query rows times kBlock keys. CMake compiles
// this once for each SIMD target.
//
// The forward keeps query rows in lanes: their softmax needs no sums across lanes, and keys and values are used as they
// lie in memory. The backward keeps keys in lanes: it goes through the rows once for each block of keys, whose
// gradients stay in a cache. Every product of a tile is one kernel, `product`, and every element of it one sum in a
// fixed order: forward and backward find the same scores to the last bit.
#include "simd.h"
#include "similarity_attention.h"

namespace bbq::BBQ_SIMD {
namespace {

// A product keeps kTileRows rows times kTileVectors vectors of sums in registers.
constexpr int kTileVectors = 2;
constexpr int kTileRows = kRegisters * 3 / 4 / (kTileVectors * kVectorRegisters);
// Products over the width that are summed in one go: rounding errors grow with kDepth + width / kDepth.
constexpr int64_t kDepth = 32;
static_assert(kBlock % kLanes == 0 && kDepth % kLanes == 0);

constexpr float kInfinity = __builtin_inff();

BBQ_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
BBQ_INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}
BBQ_INLINE int64_t vectors_of(int64_t elements) { return (elements + kLanes - 1) / kLanes; }
BBQ_INLINE int64_t padded(int64_t elements) { return vectors_of(elements) * kLanes; }

// Hands out scratch; without a base, adds up how much is needed.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* floats(int64_t count) {
    float* result = base_ ? base_ + used_ : nullptr;
    used_ += (count + 15) / 16 * 16;
    return result;
  }
  template <class T>
  T* take(int64_t count) {
    return reinterpret_cast<T*>(floats((count * static_cast<int64_t>(sizeof(T)) + 3) / 4));
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

// ---- Functions of a vector ----

#if defined(__AVX512F__) && BBQ_LANES == 16
constexpr __mmask16 kAllLanes = 0xffff;  // the forms without a mask make GCC 12 warn of its own headers
#endif

// e^x with an error below 1 ulp; NaN stays. Below 2e-38 the result may be 0, from -110 on it is; above 88.7 infinity.
BBQ_INLINE Floats exponential(Floats x) {
  // e^x = 2^k·e^r with |r| <= ln 2 / 2: adding 1.5·2^23 rounds to an integer, k, in the lowest bits.
  constexpr float kRound = 0x1.8p23f, kLog2E = 0x1.715476p0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
#if defined(__AVX512F__) && BBQ_LANES == 16
  x = bit_cast<Floats>(
      _mm512_maskz_max_ps(kAllLanes, _mm512_set1_ps(-110.0f), bit_cast<__m512>(x)));  // NaN: the second operand
  x = bit_cast<Floats>(_mm512_maskz_min_ps(kAllLanes, _mm512_set1_ps(90.0f), bit_cast<__m512>(x)));
#else
  const Ints vanishes = x < -86.9f;
  x = x > 89.0f ? broadcast(89.0f) : x;  // infinity already; from k = 130 on, the exponent below would wrap
#endif
  const Floats shifted = x * kLog2E + kRound, k = shifted - kRound;
  const Floats r = (x - k * kLn2High) - k * kLn2Low;
  // The least relative error of all polynomials 1 + r + r²·(...) of degree 6: 3e-9.
  Floats p = r * 0x1.6a23ccp-10f + 0x1.123a2p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__) && BBQ_LANES == 16
  return bit_cast<Floats>(_mm512_maskz_scalef_ps(kAllLanes, bit_cast<__m512>(p), bit_cast<__m512>(k)));
#else
  // In two factors: k may be 128, where 2^k is no float.
  const Words exponent = (bit_cast<Words>(shifted) << 23) + (126u << 23);  // wraps only where it does not count
  return vanishes ? Floats{} : p * bit_cast<Floats>(exponent) * 2.0f;
#endif
}

// log x with an error below 1e-13, for x of the range of a float: 0 gives -infinity, NaN stays.
BBQ_INLINE Doubles logarithm(Floats of) {
  using Longs = Vector<int64_t>;
  const Doubles x = __builtin_convertvector(of, Doubles);
  const Longs bits = bit_cast<Longs>(x);
  Doubles mantissa = bit_cast<Doubles>((bits & 0xfffffffffffff) | 0x3ff0000000000000);
  Doubles exponent = __builtin_convertvector((bits >> 52) - 1023, Doubles);
  const auto large = mantissa > 1.4142135623730951;
  mantissa = large ? mantissa * 0.5 : mantissa;
  exponent = large ? exponent + 1.0 : exponent;
  // log m = 2·artanh s
  const Doubles s = (mantissa - 1.0) / (mantissa + 1.0), z = s * s;
  Doubles series = z * (1.0 / 15) + 1.0 / 13;
  series = series * z + 1.0 / 11;
  series = series * z + 1.0 / 9;
  series = series * z + 1.0 / 7;
  series = series * z + 1.0 / 5;
  series = series * z + 1.0 / 3;
  series = series * z + 1.0;
  const Doubles result = exponent * 0.6931471805599453 + 2.0 * s * series;
  return x == 0.0 ? Doubles{} - __builtin_inf() : x == x ? result : x;
}

BBQ_INLINE Doubles widen(Floats v) { return __builtin_convertvector(v, Doubles); }

// sums + d where `mask` is true
BBQ_INLINE Floats add_where(Floats sums, Ints mask, Floats d) { return sums + (mask ? d : Floats{}); }

BBQ_INLINE Ints load_bytes(const uint8_t* p) {
#if defined(__AVX512F__) && BBQ_LANES == 16
  return bit_cast<Ints>(_mm512_maskz_cvtepu8_epi32(kAllLanes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load_as<Vector<uint8_t>>(p), Ints);
#endif
}

BBQ_INLINE void store_bytes(uint8_t* p, Ints v) {
#if defined(__AVX512F__) && BBQ_LANES == 16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(kAllLanes, bit_cast<__m512i>(v)));
#else
  const Vector<uint8_t> bytes = __builtin_convertvector(v, Vector<uint8_t>);
  __builtin_memcpy(p, &bytes, sizeof(bytes));
#endif
}

// table[index], lane by lane. `slots` is the size of the table, a multiple of kLanes.
BBQ_INLINE Floats lookup(const float* table, int64_t slots, Ints index) {
#if defined(__AVX512F__) && BBQ_LANES == 16
  const __m512i i = bit_cast<__m512i>(index);
  if (slots == 16) return bit_cast<Floats>(_mm512_maskz_permutexvar_ps(kAllLanes, i, _mm512_loadu_ps(table)));
  if (slots == 32) {
    return bit_cast<Floats>(
        _mm512_maskz_permutex2var_ps(kAllLanes, _mm512_loadu_ps(table), i, _mm512_loadu_ps(table + 16)));
  }
  return bit_cast<Floats>(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), kAllLanes, i, table, 4));
#elif defined(__AVX2__) && BBQ_LANES % 8 == 0
  Floats result;
  for (int j = 0; j < kLanes; j += 8) {
    __m256i i;
    __builtin_memcpy(&i, reinterpret_cast<const char*>(&index) + j * 4, 32);
    __m256 values;
    if (slots <= 16) {
      values = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i);
      if (slots == 16) {
        const __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i);
        values = _mm256_blendv_ps(values, upper, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
      }
    } else {
      values = _mm256_i32gather_ps(table, i, 4);
    }
    __builtin_memcpy(reinterpret_cast<char*>(&result) + j * 4, &values, 32);
  }
  return result;
#else
  (void)slots;
  Floats result;
  for (int j = 0; j < kLanes; ++j) result[j] = table[index[j]];
  return result;
#endif
}

// ---- Rows ----

// Rows of floats, a whole number of vectors long, zero behind the width.
struct Rows {
  const float* data;
  int64_t stride;
};

// Calls f(data of the right type) for a tensor of floats.
template <class F>
BBQ_INLINE void dispatch(Element element, const void* data, const F& f) {
  switch (element) {
    case Element::kFloat32:
      return f(static_cast<const float*>(data));
    case Element::kBFloat16:
      return f(static_cast<const BFloat16*>(data));
    case Element::kFloat16:
      return f(static_cast<const Float16*>(data));
  }
}

template <class F>
BBQ_INLINE void dispatch(Element element, void* data, const F& f) {
  dispatch(element, static_cast<const void*>(data),
           [&]<class T>(const T* typed) BBQ_INLINE_LAMBDA { f(const_cast<T*>(typed)); });
}

// Element 0 of a row of a head.
template <class T>
BBQ_INLINE int64_t offset_of(const Heads<T>& tensor, const Sequence& s, int64_t head, int64_t row) {
  return s.index * tensor.sequence_stride + head * tensor.head_stride + (s.start + row) * tensor.token_stride;
}

// Some rows of a tensor.
struct TensorRows {
  const void* data;
  Element element;
  int64_t offset, stride;  // in elements
};

// The rows of a head from `row` on.
template <class T>
BBQ_INLINE TensorRows rows_from(const Heads<T>& tensor, Element element, const Sequence& s, int64_t head, int64_t row) {
  return {tensor.data, element, offset_of(tensor, s, head, row), tensor.token_stride};
}

void copy_rows(const TensorRows& rows, int64_t count, int64_t width, float* copy) {
  dispatch(rows.element, rows.data, [&](const auto* source) BBQ_INLINE_LAMBDA {
    for (int64_t i = 0; i < count; ++i) {
      for_vectors(0, width, [&](int64_t d, auto lanes) BBQ_INLINE_LAMBDA {
        store(copy + i * padded(width) + d, load(source + rows.offset + i * rows.stride + d, lanes));
      });
    }
  });
}

// The rows where they are, if they are such already, or a copy.
Rows rows_of(const TensorRows& rows, int64_t count, int64_t width, float* copy) {
  if (rows.element == Element::kFloat32 && width % kLanes == 0) {
    return {static_cast<const float*>(rows.data) + rows.offset, rows.stride};
  }
  copy_rows(rows, count, width, copy);
  return {copy, padded(width)};
}

// Writes scale·source.
void store_row(void* tensor, Element element, int64_t offset, const float* source, int64_t width, float scale) {
  dispatch(element, tensor, [&](auto* target) BBQ_INLINE_LAMBDA {
    for_vectors(0, width, [&](int64_t d, auto lanes) BBQ_INLINE_LAMBDA {
      store(target + offset + d, load(source + d) * scale, lanes);
    });
  });
}

void store_zeros(void* tensor, Element element, int64_t offset, int64_t width) {
  dispatch(element, tensor, [&](auto* target) BBQ_INLINE_LAMBDA {
    for_vectors(0, width,
                [&](int64_t d, auto lanes) BBQ_INLINE_LAMBDA { store(target + offset + d, Floats{}, lanes); });
  });
}

// target[d·kBlock + i] = rows[i][d]; lanes behind the last row are zero.
void transpose_rows(Rows rows, int64_t count, int64_t width, float* target) {
  for (int64_t first = 0; first < count; first += kLanes) {
    for (int64_t d = 0; d < width; d += kLanes) {
      Floats square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = first + i < count ? load(rows.data + (first + i) * rows.stride + d) : Floats{};
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(target + (d + i) * kBlock + first, square[i]);
    }
  }
}

// Whether there is neither NaN nor infinity in the rows.
bool finite(Rows rows, int64_t count, int64_t width) {
  Floats zeros{};
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += kLanes) zeros += load(rows.data + i * rows.stride + d) * 0.0f;
  }
  return all(zeros == Floats{});
}

// ---- Products ----

// What a product reads of its left side in step t and row i: data[i·row + t·step].
struct ByRows {  // rows in memory
  const float* data;
  int64_t row;
  static constexpr int64_t step = 1, depth = kDepth;
};
struct OfTile {  // rows of a tile
  const float* data;
  static constexpr int64_t row = kBlock, step = 1, depth = kBlock;
};
struct AcrossTile {  // columns of a tile
  const float* data;
  static constexpr int64_t row = 1, step = kBlock, depth = kBlock;
};

// target (+)= Σ_t left[., t]·right[t, .], each element in one go over t.
template <int rows, int vectors, class Left>
__attribute__((noinline)) void product_tile(Left left, Rows right, int64_t steps, float* target, int64_t target_row,
                                            bool add) {
  Floats sums[rows][vectors] = {};
  const float* row[rows];
  unroll<rows>([&]<int i>() BBQ_INLINE_LAMBDA { row[i] = left.data + i * left.row; });
  const float* b = right.data;
  for (int64_t t = 0; t < steps; ++t, b += right.stride) {
    Floats value[vectors];
    unroll<vectors>([&]<int v>() BBQ_INLINE_LAMBDA { value[v] = load(b + v * kLanes); });
    unroll<rows>([&]<int i>() BBQ_INLINE_LAMBDA {
      const float factor = row[i][t * Left::step];
      unroll<vectors>([&]<int v>() BBQ_INLINE_LAMBDA { sums[i][v] += value[v] * factor; });
    });
  }
  unroll<rows>([&]<int i>() BBQ_INLINE_LAMBDA {
    unroll<vectors>([&]<int v>() BBQ_INLINE_LAMBDA {
      float* to = target + i * target_row + v * kLanes;
      store(to, add ? load(to) + sums[i][v] : sums[i][v]);
    });
  });
}

template <int vectors, int rows = kTileRows, class... Arguments>
BBQ_INLINE void product_rows(int64_t count, Arguments... arguments) {
  if (rows == 1 || count >= rows) return product_tile<rows, vectors>(arguments...);
  if constexpr (rows > 1) product_rows<vectors, rows - 1>(count, arguments...);
}

// The same for up to kTileRows rows, any number of vectors, and any number of steps, `depth` of them in one go.
template <class Left>
void product(int64_t rows, int64_t vectors, Left left, Rows right, int64_t steps, float* target, int64_t target_row,
             bool add) {
  constexpr int64_t depth = Left::depth;
  for (; steps > depth; steps -= depth, add = true) {
    product(rows, vectors, left, right, depth, target, target_row, add);
    left.data += depth * Left::step;
    right.data += depth * right.stride;
  }
  int64_t v = 0;
  for (; v + kTileVectors <= vectors; v += kTileVectors) {
    product_rows<kTileVectors>(rows, left, Rows{right.data + v * kLanes, right.stride}, steps, target + v * kLanes,
                               target_row, add);
  }
  for (; v < vectors; ++v) {
    product_rows<1>(rows, left, Rows{right.data + v * kLanes, right.stride}, steps, target + v * kLanes, target_row,
                    add);
  }
}

// Lane i: Σ_d left[i][d]·right[i][d] of up to kLanes rows, to the last bit what `product` makes of such rows.
Floats row_products(Rows left, Rows right, int64_t count, int64_t width) {
  Floats total{};
  for (int64_t begin = 0; begin < width; begin += kDepth) {
    Floats part{};
    for (int64_t d = begin; d < least(width, begin + kDepth); d += kLanes) {
      Floats a[kLanes], b[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        a[i] = i < count ? load(left.data + i * left.stride + d) : Floats{};
        b[i] = i < count ? load(right.data + i * right.stride + d) : Floats{};
      }
      transpose(a);
      transpose(b);
      for (int i = 0; i < kLanes; ++i) part += a[i] * b[i];
    }
    total = begin == 0 ? part : total + part;
  }
  return total;
}

// ---- Buckets ----

// What a channel compares on the side that lies in lanes, for up to kBlock tokens.
struct Lanes {
  uint32_t low[kBlock], high[kBlock];  // of packed words
  int64_t position[kBlock];
  int32_t offset[kBlock];  // of a position from the first one
  bool near;               // whether all offsets are small
  float* vectors;          // transposed
};

constexpr int64_t kNear = int64_t{1} << 29;
BBQ_INLINE bool is_near(int64_t position, int64_t base) {
  const uint64_t a = static_cast<uint64_t>(position), b = static_cast<uint64_t>(base);
  return (position > base ? a - b : b - a) < static_cast<uint64_t>(kNear);  // unsigned: no difference overflows
}

// The tokens of one side of a tile: `data` of a channel, from token `first` on.
struct Side {
  const void* data;
  int64_t first, count;
};

template <class T>
BBQ_INLINE const T* token_of(const Channel& c, const Side& side, int64_t i) {
  return static_cast<const T*>(side.data) + (side.first + i) * c.stride;
}

void load_lanes(const Channel& c, const Side& side, Lanes& lanes, float* copy) {
  if (c.kind == Kind::kCosine) {
    const Rows rows = rows_of({token_of<float>(c, side, 0), Element::kFloat32, 0, c.stride}, side.count, c.width, copy);
    transpose_rows(rows, side.count, padded(c.width), lanes.vectors);
  } else if (c.kind == Kind::kGap) {
    lanes.near = true;
    const int64_t base = *token_of<int64_t>(c, side, 0);
    for (int64_t i = 0; i < kBlock; ++i) {
      lanes.position[i] = i < side.count ? *token_of<int64_t>(c, side, i) : base;
      lanes.near = lanes.near && is_near(lanes.position[i], base);
      lanes.offset[i] = static_cast<int32_t>(static_cast<uint64_t>(lanes.position[i]) - static_cast<uint64_t>(base));
    }
  } else if (c.bits > 0) {
    for (int64_t i = 0; i < kBlock; ++i) {
      const uint64_t word = i < side.count ? static_cast<uint64_t>(*token_of<int64_t>(c, side, i)) : 0;
      lanes.low[i] = static_cast<uint32_t>(word);
      lanes.high[i] = static_cast<uint32_t>(word >> 32);
    }
  }
}

// A level agrees, and with it all before for a prefix, if no bit of its mask differs: a bucket is a number of levels.
template <int levels, bool wide>
BBQ_INLINE void word_buckets(const Channel& c, const uint64_t* masks, const Lanes& lanes, int64_t vectors,
                             const Side& side, uint8_t* buckets) {
  const int64_t count = levels ? levels : c.buckets - 1;
  for (int64_t j = 0; j < side.count; ++j) {
    const uint64_t word = static_cast<uint64_t>(*token_of<int64_t>(c, side, j));
    for (int64_t v = 0; v < vectors; ++v) {
      const Words low = load_as<Words>(lanes.low + v * kLanes) ^ static_cast<uint32_t>(word);
      const Words high = load_as<Words>(lanes.high + v * kLanes) ^ static_cast<uint32_t>(word >> 32);
      Ints agree{};
      const auto compare = [&](int64_t l) BBQ_INLINE_LAMBDA {
        Words different = low & static_cast<uint32_t>(masks[l]);
        if (wide) different |= high & static_cast<uint32_t>(masks[l] >> 32);
        agree -= bit_cast<Ints>(different) == Ints{};
      };
      if constexpr (levels > 0) {
        unroll<levels>([&]<int l>() BBQ_INLINE_LAMBDA { compare(l); });
      } else {
        for (int64_t l = 0; l < count; ++l) compare(l);
      }
      store_bytes(buckets + j * kBlock + v * kLanes, agree);
    }
  }
}

template <bool wide>
void word_buckets(const Channel& c, const Lanes& lanes, int64_t vectors, const Side& side, uint8_t* buckets) {
  uint64_t masks[64];
  const int64_t levels = c.buckets - 1;
  for (int64_t l = 0; l < levels; ++l) {
    const uint64_t field = c.bits == 64 ? ~uint64_t{0} : ((uint64_t{1} << c.bits) - 1) << (l * c.bits);
    masks[l] = c.kind == Kind::kPrefix && l > 0 ? masks[l - 1] | field : field;
  }
  switch (levels) {
    case 2:
      return word_buckets<2, wide>(c, masks, lanes, vectors, side, buckets);
    case 3:
      return word_buckets<3, wide>(c, masks, lanes, vectors, side, buckets);
    case 4:
      return word_buckets<4, wide>(c, masks, lanes, vectors, side, buckets);
    default:
      return word_buckets<0, wide>(c, masks, lanes, vectors, side, buckets);
  }
}

void gap_buckets(const Channel& c, const Lanes& lanes, int64_t vectors, const Side& side, uint8_t* buckets) {
  const int64_t base = lanes.position[0];
  const Ints last = broadcast(static_cast<int32_t>(c.buckets - 1));
  for (int64_t j = 0; j < side.count; ++j) {
    const int64_t position = *token_of<int64_t>(c, side, j);
    if (lanes.near && is_near(position, base)) {
      const int32_t offset = static_cast<int32_t>(static_cast<uint64_t>(position) - static_cast<uint64_t>(base));
      for (int64_t v = 0; v < vectors; ++v) {
        const Ints difference = load_as<Ints>(lanes.offset + v * kLanes) - offset;
        const Ints distance = difference < 0 ? -difference : difference;
        // The exponent of a float is a bit length. Without the second bit it cannot be rounded up to the next.
        const Floats value = __builtin_convertvector(distance & ~(distance >> 1), Floats);
        const Ints exponent = (bit_cast<Ints>(value) >> 23) - 126;
        const Ints length = exponent < 0 ? Ints{} : exponent;
        store_bytes(buckets + j * kBlock + v * kLanes, length < last ? length : last);
      }
    } else {
      for (int64_t i = 0; i < vectors * kLanes; ++i) {
        buckets[j * kBlock + i] =
            static_cast<uint8_t>(gap_bucket(lanes.position[i], position, static_cast<int32_t>(c.buckets)));
      }
    }
  }
}

void cosine_buckets(const Channel& c, const Lanes& lanes, int64_t vectors, const Side& side, float* similarities,
                    uint8_t* buckets) {
  for (int64_t j = 0; j < side.count; j += kTileRows) {
    product(least(kTileRows, side.count - j), vectors, ByRows{token_of<float>(c, side, j), c.stride},
            Rows{lanes.vectors, kBlock}, c.width, similarities + j * kBlock, kBlock, false);
  }
  for (int64_t j = 0; j < side.count; ++j) {
    for (int64_t v = 0; v < vectors; ++v) {
      const Floats s = load(similarities + j * kBlock + v * kLanes);
      Ints bucket{};
      for (int64_t b = 0; b + 1 < c.buckets; ++b) bucket -= s >= c.boundaries[b];
      bucket = s == s ? bucket : broadcast(static_cast<int32_t>(c.buckets));  // the slot that holds a NaN
      store_bytes(buckets + j * kBlock + v * kLanes, bucket);
    }
  }
}

void code_buckets(const Channel& c, const Side& in_lanes, const Side& side, uint8_t* buckets) {
  const int32_t levels = static_cast<int32_t>(c.buckets - 1);
  for (int64_t j = 0; j < side.count; ++j) {
    const int64_t* codes = token_of<int64_t>(c, side, j);
    for (int64_t i = 0; i < in_lanes.count; ++i) {
      const int64_t* others = token_of<int64_t>(c, in_lanes, i);
      buckets[j * kBlock + i] = static_cast<uint8_t>(c.kind == Kind::kPrefix ? prefix_bucket(codes, others, levels)
                                                                             : matches_bucket(codes, others, levels));
    }
    for (int64_t i = in_lanes.count; i < padded(in_lanes.count); ++i) buckets[j * kBlock + i] = 0;
  }
}

// The buckets of a tile in every channel: [channel][row][lane], found once for all heads.
class Buckets {
 public:
  Buckets(const Attention& a, bool queries_in_lanes, Arena& arena)
      : a_(a),
        queries_in_lanes_(queries_in_lanes),
        lanes_(arena.take<Lanes>(a.channel_count)),
        values_(arena.take<uint8_t>(a.channel_count * kBlock * kBlock)),
        similarities_(arena.floats(kBlock * kBlock)) {
    for (int64_t c = 0; c < a.channel_count; ++c) {
      const int64_t width = padded(a.channels[c].width);
      float* vectors = arena.floats(a.channels[c].kind == Kind::kCosine ? width * kBlock : 0);
      if (lanes_) lanes_[c].vectors = vectors;
      widest_ = width > widest_ ? width : widest_;
    }
    copy_ = arena.floats(widest_ * kBlock);
  }

  void set_lanes(int64_t first_token, int64_t count) {
    first_ = first_token;
    count_ = count;
    for (int64_t c = 0; c < a_.channel_count; ++c) {
      load_lanes(a_.channels[c], side(c, queries_in_lanes_, first_, count_), lanes_[c], copy_);
    }
  }

  void find(int64_t first_token, int64_t rows) {
    const int64_t vectors = vectors_of(count_);
    for (int64_t i = 0; i < a_.channel_count; ++i) {
      const Channel& c = a_.channels[i];
      const Side rows_side = side(i, !queries_in_lanes_, first_token, rows);
      uint8_t* buckets = values_ + i * kBlock * kBlock;
      if (c.kind == Kind::kCosine) {
        cosine_buckets(c, lanes_[i], vectors, rows_side, similarities_, buckets);
      } else if (c.kind == Kind::kGap) {
        gap_buckets(c, lanes_[i], vectors, rows_side, buckets);
      } else if (c.bits == 0) {
        code_buckets(c, side(i, queries_in_lanes_, first_, count_), rows_side, buckets);
      } else if (c.bits * (c.buckets - 1) <= 32) {
        word_buckets<false>(c, lanes_[i], vectors, rows_side, buckets);
      } else {
        word_buckets<true>(c, lanes_[i], vectors, rows_side, buckets);
      }
    }
  }

  const uint8_t* of_channel(int64_t channel) const { return values_ + channel * kBlock * kBlock; }

  // Sum of what the tables of a head hold for kLanes pairs of a tile; `channels` is their number, or 2 for any.
  template <int channels>
  BBQ_INLINE Floats bias(int64_t head, int64_t pair) const {
    Floats sum{};
    if constexpr (channels > 0) {
      sum = look_up(0, head, pair);
      if constexpr (channels > 1) {
        for (int64_t c = 1; c < a_.channel_count; ++c) sum += look_up(c, head, pair);
      }
    }
    return sum;
  }

 private:
  BBQ_INLINE Floats look_up(int64_t channel, int64_t head, int64_t pair) const {
    const Channel& c = a_.channels[channel];
    return lookup(c.tables + head * c.slots, c.slots, load_bytes(of_channel(channel) + pair));
  }
  Side side(int64_t channel, bool query, int64_t first, int64_t count) const {
    const Channel& c = a_.channels[channel];
    return {query ? c.query : c.key, first, count};
  }

  const Attention& a_;
  bool queries_in_lanes_;
  Lanes* lanes_;
  uint8_t* values_;
  float *similarities_, *copy_ = nullptr;
  int64_t widest_ = 0, first_ = 0, count_ = 0;
};

// Calls f<0>, f<1> or f<2>: see Buckets::bias.
template <class F>
BBQ_INLINE void for_channels(int64_t count, const F& f) {
  if (count == 0) return f.template operator()<0>();
  if (count == 1) return f.template operator()<1>();
  f.template operator()<2>();
}

// How many of the keys from `first` to `last` query row i sees: the first ones.
BBQ_INLINE int64_t visible(const Attention& a, int64_t i, int64_t first, int64_t last) {
  return a.is_causal ? clamp(i + a.shift + 1 - first, 0, last - first) : last - first;
}

// ---- Forward ----

struct ForwardScratch {
  ForwardScratch(const Attention& a, int64_t heads, float* base) : arena(base), buckets(a, true, arena) {
    const int64_t width = padded(a.width);
    queries = arena.floats(heads * width * kBlock);
    sums = arena.floats(heads * width * kBlock);
    highest = arena.floats(heads * kBlock);
    totals = arena.floats(heads * kBlock);
    scores = arena.floats(kBlock * kBlock);
    keys = arena.floats(kBlock * width);
    values = arena.floats(kBlock * width);
    factors = arena.floats(kBlock);
  }

  Arena arena;
  Buckets buckets;
  float* queries;           // [head][width][row]
  float* sums;              // [head][row][width]: of weighted values
  float *highest, *totals;  // [head][row]: the highest score so far, the sum of weights
  float* scores;            // [key][row], then weights
  float *keys, *values;     // [key][width], where they have to be copied
  float* factors;           // [row]: what older sums have to be multiplied with
};

// Turns products into weights, and updates what is kept for each row. False if older sums stay as they are.
template <int channels>
BBQ_INLINE bool weigh(const Attention& a, const Buckets& buckets, int64_t head, int64_t first_row, int64_t rows,
                      int64_t first_key, int64_t keys, float* scores, float* highest, float* totals, float* factors) {
  Ints same = ~Ints{};
  const Ints lane = lane_numbers();
  const Floats scale = broadcast(a.scale);
  for (int64_t v = 0; v < vectors_of(rows); ++v) {
    const int64_t column = v * kLanes, row = first_row + column;
    const int64_t seen_by_all = visible(a, row, first_key, first_key + keys);
    const int64_t seen = visible(a, row + kLanes - 1, first_key, first_key + keys);
    const Floats before = load(highest + column);
    Floats top = before;
    const auto score = [&](int64_t j) BBQ_INLINE_LAMBDA {
      const int64_t pair = j * kBlock + column;
      return load(scores + pair) * scale + buckets.bias<channels>(head, pair);
    };
    for (int64_t j = 0; j < seen_by_all; ++j) {
      const Floats s = score(j);
      store(scores + j * kBlock + column, s);
      top = s > top ? s : top;  // a NaN comes through its weight
    }
    for (int64_t j = seen_by_all; j < seen; ++j) {
      const int32_t first_lane = static_cast<int32_t>(first_key + j - a.shift - row);
      const Floats s = lane >= first_lane ? score(j) : broadcast(-kInfinity);
      store(scores + j * kBlock + column, s);
      top = s > top ? s : top;
    }
    const Floats offset = top == -kInfinity ? Floats{} : top;
    const Floats factor = exponential(before - offset);
    Floats total = load(totals + column) * factor;
    for (int64_t j = 0; j < seen; ++j) {
      const Floats weight = exponential(load(scores + j * kBlock + column) - offset);
      store(scores + j * kBlock + column, weight);
      total += weight;
    }
    for (int64_t j = seen; j < keys; ++j) store(scores + j * kBlock + column, Floats{});
    store(highest + column, top);
    store(totals + column, total);
    store(factors + column, factor);
    same &= factor == 1.0f;
  }
  return !all(same);
}

void forward(const ForwardUnit& u) {
  const Attention& a = u.attention;
  const Sequence& s = u.sequence;
  ForwardScratch scratch(a, u.heads, u.scratch);
  const int64_t rows = clamp(s.rows - u.first_row, 0, u.rows), width = padded(a.width), vectors = vectors_of(rows);
  const int64_t columns = rows == 0 ? 0 : visible(a, u.first_row + rows - 1, 0, s.columns);
  if (columns > 0) scratch.buckets.set_lanes(s.query_token + u.first_row, rows);
  for (int64_t h = 0; h < u.heads && columns > 0; ++h) {
    const TensorRows query = rows_from(a.query, a.element, s, u.first_head + h, u.first_row);
    transpose_rows(rows_of(query, rows, a.width, scratch.keys), rows, width, scratch.queries + h * width * kBlock);
    for (int64_t v = 0; v < vectors; ++v) {
      store(scratch.highest + h * kBlock + v * kLanes, broadcast(-kInfinity));
      store(scratch.totals + h * kBlock + v * kLanes, Floats{});
    }
  }
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t keys = least(kBlock, columns - first), last = first + keys;
    const bool is_masked = visible(a, u.first_row, first, last) < keys;
    scratch.buckets.find(s.key_token + first, keys);
    for (int64_t h = 0; h < u.heads; ++h) {
      const Rows key = rows_of(rows_from(a.key, a.element, s, u.first_head + h, first), keys, a.width, scratch.keys);
      for (int64_t j = 0; j < keys; j += kTileRows) {
        // Rows before the first that sees key j need no scores.
        const int64_t skipped = a.is_causal ? clamp(first + j - a.shift - u.first_row, 0, rows) / kLanes : 0;
        product(least(kTileRows, keys - j), vectors - skipped, ByRows{key.data + j * key.stride, key.stride},
                Rows{scratch.queries + h * width * kBlock + skipped * kLanes, kBlock}, a.width,
                scratch.scores + j * kBlock + skipped * kLanes, kBlock, false);
      }
      bool rescale = false;
      for_channels(a.channel_count, [&]<int channels>() BBQ_INLINE_LAMBDA {
        rescale = weigh<channels>(a, scratch.buckets, u.first_head + h, u.first_row, rows, first, keys, scratch.scores,
                                  scratch.highest + h * kBlock, scratch.totals + h * kBlock, scratch.factors);
      });
      float* sums = scratch.sums + h * width * kBlock;
      for (int64_t i = 0; i < rows && rescale && first > 0; ++i) {
        for (int64_t d = 0; d < width; d += kLanes) {
          store(sums + i * width + d, load(sums + i * width + d) * scratch.factors[i]);
        }
      }
      const Rows value =
          rows_of(rows_from(a.value, a.element, s, u.first_head + h, first), keys, a.width, scratch.values);
      // A weight of zero keeps what a row does not see out of it, but for NaN and infinity: then row by row.
      const int64_t step = is_masked && !finite(value, keys, width) ? 1 : kTileRows;
      for (int64_t i = 0; i < rows; i += step) {
        const int64_t count = least(step, rows - i);
        product(count, width / kLanes, AcrossTile{scratch.scores + i}, value,
                visible(a, u.first_row + i + count - 1, first, last), sums + i * width, width, first > 0);
      }
    }
  }
  for (int64_t h = 0; h < u.heads; ++h) {
    double logsumexp[kBlock];
    for (int64_t v = 0; v < vectors && columns > 0; ++v) {
      const int64_t column = h * kBlock + v * kLanes;
      const Floats total = load(scratch.totals + column);
      const Doubles result = widen(load(scratch.highest + column)) + logarithm(total);
      __builtin_memcpy(logsumexp + v * kLanes, &result, sizeof(result));
    }
    for (int64_t i = 0; i < u.rows; ++i) {
      const int64_t output = offset_of(u.output, s, u.first_head + h, u.first_row + i);
      double& sum = u.logsumexp.data[offset_of(u.logsumexp, s, u.first_head + h, u.first_row + i)];
      const float total = i < rows && columns > 0 ? scratch.totals[h * kBlock + i] : 0.0f;
      if (total == 0.0f) {  // nothing to attend to
        sum = -__builtin_inf();
        store_zeros(u.output.data, a.element, output, a.width);
      } else {
        sum = logsumexp[i];
        store_row(u.output.data, a.element, output, scratch.sums + (h * kBlock + i) * width, a.width, 1.0f / total);
      }
    }
  }
}

int64_t forward_scratch(const Attention& a, int64_t heads) { return ForwardScratch(a, heads, nullptr).arena.used(); }

// ---- Backward ----

struct BackwardScratch {
  BackwardScratch(const Attention& a, int64_t heads, int64_t rows, float* base)
      : arena(base), buckets(a, false, arena) {
    const int64_t width = padded(a.width);
    statistics = arena.take<RowStatistics>(heads * rows);
    query_rows = arena.take<HeadRows>(heads);
    queries = arena.floats(heads * rows * width);
    grads = arena.floats(heads * rows * width);
    keys_across = arena.floats(heads * width * kBlock);
    values_across = arena.floats(heads * width * kBlock);
    keys = arena.floats(heads * width * kBlock);
    key_rows = arena.take<HeadKeys>(heads);
    values = arena.floats(width * kBlock);
    key_sums = arena.floats(heads * width * kBlock);
    value_sums = arena.floats(heads * width * kBlock);
    weights = arena.floats(kBlock * kBlock);
    grad_scores = arena.floats(kBlock * kBlock);
  }

  struct RowStatistics {
    float high, low;  // logsumexp in two parts: a score minus the first is exact where it matters
    float delta;      // Σ_j p_ij dp_ij
    bool is_live;     // attends to anything
  };
  struct HeadRows {
    Rows query, grad;
    bool finite;
  };
  struct HeadKeys {
    Rows key;
    bool finite;
  };

  Arena arena;
  Buckets buckets;
  RowStatistics* statistics;           // [head][row]
  HeadRows* query_rows;                // [head]
  float *queries, *grads;              // [head][row][width], where they have to be copied
  float *keys_across, *values_across;  // [head][width][key]
  float* keys;                         // [head][key][width], where they have to be copied
  HeadKeys* key_rows;                  // [head]
  float* values;                       // [key][width], where they have to be copied
  float *key_sums, *value_sums;        // [head][key][width]
  float *weights, *grad_scores;        // [row][key]; before that, products
};

// Reads the rows of a head from `first` on: rows that attend to nothing become zeros.
void read_rows(const BackwardUnit& u, const BackwardScratch& scratch, int64_t h, int64_t first) {
  const Attention& a = u.attention;
  const Sequence& s = u.sequence;
  const int64_t width = padded(a.width), count = s.rows - first;
  const int64_t head = u.first_head + h;
  BackwardScratch::RowStatistics* statistics = scratch.statistics + h * s.rows;
  bool all_live = true;
  for (int64_t i = first; i < s.rows; ++i) {
    const double logsumexp = u.logsumexp.data[offset_of(u.logsumexp, s, head, i)];
    statistics[i].is_live = logsumexp != -__builtin_inf();
    statistics[i].high = static_cast<float>(logsumexp);
    statistics[i].low = static_cast<float>(logsumexp - static_cast<double>(statistics[i].high));
    all_live = all_live && statistics[i].is_live;
  }
  const auto read = [&](const Heads<const void>& tensor, float* copy) {
    const TensorRows rows = rows_from(tensor, a.element, s, head, first);
    if (all_live) return rows_of(rows, count, a.width, copy);
    copy_rows(rows, count, a.width, copy);
    for (int64_t i = first; i < s.rows; ++i) {
      if (!statistics[i].is_live) store_zeros(copy, Element::kFloat32, (i - first) * width, width);
    }
    return Rows{copy, width};
  };
  const Rows queries = read(a.query, scratch.queries + h * s.rows * width);
  const Rows grads = read(u.grad, scratch.grads + h * s.rows * width);
  for (int64_t i = 0; i < count; i += kLanes) {
    // Where a row sees one key alone, this is the gradient of its weight, exactly: the gradient of the score is zero.
    const int64_t some = least(kLanes, count - i);
    const TensorRows output = rows_from(u.output, a.element, s, head, first + i);
    const Floats deltas = row_products({grads.data + i * grads.stride, grads.stride},
                                       rows_of(output, some, a.width, scratch.values), some, width);
    for (int64_t lane = 0; lane < some; ++lane) statistics[first + i + lane].delta = deltas[lane];
  }
  scratch.query_rows[h] = {queries, grads, finite(queries, count, width) && finite(grads, count, width)};
}

// Turns the products of a tile into weights and gradients of scores. counts[i]: how many keys row i sees.
template <int channels>
BBQ_INLINE void weigh_backward(const Attention& a, const Buckets& buckets, int64_t head, int64_t keys, int64_t rows,
                               const BackwardScratch::RowStatistics* statistics, const int64_t* counts, float* weights,
                               float* grad_scores) {
  const Floats scale = broadcast(a.scale);
  const Ints lane = lane_numbers();
  for (int64_t i = 0; i < rows; ++i) {
    const Floats high = broadcast(statistics[i].high), low = broadcast(statistics[i].low);
    const Floats delta = broadcast(statistics[i].delta);
    for (int64_t j = 0; j < counts[i]; j += kLanes) {
      const int64_t pair = i * kBlock + j;
      const Floats score = load(weights + pair) * scale + buckets.bias<channels>(head, pair);
      Floats weight = exponential((score - high) - low);
      Floats grad = weight * (load(grad_scores + pair) - delta);
      if (j + kLanes > counts[i]) {
        const Ints seen = lane < static_cast<int32_t>(counts[i] - j);
        weight = seen ? weight : Floats{};
        grad = seen ? grad : Floats{};
      }
      store(weights + pair, weight);
      store(grad_scores + pair, grad);
    }
    for (int64_t j = padded(counts[i]); j < keys; j += kLanes) {
      store(weights + i * kBlock + j, Floats{});
      store(grad_scores + i * kBlock + j, Floats{});
    }
  }
}

// Adds gradients of scores to those of `count` buckets of a table, from `first` on.
template <int count>
BBQ_INLINE void add_buckets(const uint8_t* buckets, const float* grad_scores, int64_t rows, const int64_t* counts,
                            int64_t first, double* table) {
  // A lane adds at most 256 numbers in float, whatever the width.
  constexpr int64_t kRows = 4 * kLanes;
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    Floats sums[count] = {};
    for (int64_t i = begin; i < least(rows, begin + kRows); ++i) {
      for (int64_t j = 0; j < counts[i]; j += kLanes) {
        const Ints bucket = load_bytes(buckets + i * kBlock + j) - static_cast<int32_t>(first);
        const Floats grad = load(grad_scores + i * kBlock + j);
        unroll<count>([&]<int b>() BBQ_INLINE_LAMBDA { sums[b] = add_where(sums[b], bucket == b, grad); });
      }
    }
    unroll<count>([&]<int b>() BBQ_INLINE_LAMBDA {
      double* target = table + (first + b) * kLanes;
      const Doubles total = load_as<Doubles>(target) + widen(sums[b]);
      __builtin_memcpy(target, &total, sizeof(total));
    });
  }
}

// Masked sums in registers cost two instructions a bucket: many buckets are cheaper lane by lane.
constexpr int64_t kMaskedBuckets = 12;
constexpr int kBucketsAtOnce = 6;

template <int count = kBucketsAtOnce, class... Arguments>
void add_some_buckets(int64_t rest, Arguments... arguments) {
  if (count == 1 || rest >= count) return add_buckets<count>(arguments...);
  if constexpr (count > 1) add_some_buckets<count - 1>(rest, arguments...);
}

// Adds gradients of scores to the gradients of the tables of a head. A similarity of NaN has no entry to go to.
void add_to_tables(const Attention& a, const Buckets& buckets, int64_t head, int64_t rows, const int64_t* counts,
                   const float* grad_scores, double* tables) {
  for (int64_t i = 0; i < a.channel_count; ++i) {
    const Channel& c = a.channels[i];
    const uint8_t* values = buckets.of_channel(i);
    double* table = tables + (c.gradient + head * c.buckets) * kLanes;
    if (c.buckets <= kMaskedBuckets) {
      for (int64_t first = 0; first < c.buckets; first += kBucketsAtOnce) {
        add_some_buckets(c.buckets - first, values, grad_scores, rows, counts, first, table);
      }
      continue;
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < counts[row]; ++j) {
        const int64_t bucket = values[row * kBlock + j];
        if (bucket < c.buckets) table[bucket * kLanes + j % kLanes] += grad_scores[row * kBlock + j];
      }
    }
  }
}

void backward(const BackwardUnit& u) {
  const Attention& a = u.attention;
  const Sequence& s = u.sequence;
  BackwardScratch scratch(a, u.heads, s.rows, u.scratch);
  const int64_t width = padded(a.width), columns = least(u.last_key, s.columns);
  const bool need_scores = u.row_sums || u.grad_key.data || u.tables;
  // The first row that sees key j.
  const auto first_row_of = [&](int64_t j) { return a.is_causal ? clamp(j - a.shift, 0, s.rows) : 0; };

  const int64_t first_row = u.first_key < columns ? first_row_of(u.first_key) : s.rows;
  for (int64_t h = 0; h < u.heads; ++h) {
    read_rows(u, scratch, h, first_row);
    if (!u.row_sums) continue;
    float* sums = u.row_sums + h * s.rows * width;
    for (int64_t e = 0; e < s.rows * width; e += kLanes) store(sums + e, Floats{});
  }
  for (int64_t first = u.first_key; first < u.last_key; first += kBlock) {
    const int64_t all_keys = least(kBlock, u.last_key - first), keys = clamp(columns - first, 0, all_keys);
    if (keys > 0) scratch.buckets.set_lanes(s.key_token + first, keys);
    for (int64_t h = 0; h < u.heads; ++h) {
      const int64_t block = h * width * kBlock;
      const int64_t head = u.first_head + h;
      const Rows key_rows = rows_of(rows_from(a.key, a.element, s, head, first), keys, a.width, scratch.keys + block);
      const Rows value_rows = rows_of(rows_from(a.value, a.element, s, head, first), keys, a.width, scratch.values);
      scratch.key_rows[h] = {key_rows, finite(key_rows, keys, width)};
      transpose_rows(key_rows, keys, width, scratch.keys_across + block);
      transpose_rows(value_rows, keys, width, scratch.values_across + block);
      for (int64_t e = 0; e < all_keys * width; e += kLanes) {
        store(scratch.key_sums + block + e, Floats{});
        store(scratch.value_sums + block + e, Floats{});
      }
    }
    for (int64_t row = keys > 0 ? first_row_of(first) : s.rows; row < s.rows; row += kBlock) {
      const int64_t rows = least(kBlock, s.rows - row);
      scratch.buckets.find(s.query_token + row, rows);
      for (int64_t h = 0; h < u.heads; ++h) {
        const int64_t block = h * width * kBlock;
        const BackwardScratch::HeadRows& head = scratch.query_rows[h];
        const BackwardScratch::HeadKeys& head_keys = scratch.key_rows[h];
        const BackwardScratch::RowStatistics* statistics = scratch.statistics + h * s.rows + row;
        const Rows query{head.query.data + (row - first_row) * head.query.stride, head.query.stride};
        const Rows grad{head.grad.data + (row - first_row) * head.grad.stride, head.grad.stride};
        int64_t counts[kBlock];
        bool is_masked = false;
        for (int64_t i = 0; i < rows; ++i) {
          counts[i] = statistics[i].is_live ? visible(a, row + i, first, first + keys) : 0;
          is_masked = is_masked || counts[i] < keys;
        }
        const auto most = [&](int64_t i, int64_t count) {
          int64_t result = 0;
          for (int64_t r = i; r < i + count; ++r) result = counts[r] > result ? counts[r] : result;
          return result;
        };

        for (int64_t i = 0; i < rows; i += kTileRows) {
          const int64_t count = least(kTileRows, rows - i), seen = vectors_of(most(i, count));
          product(count, seen, ByRows{query.data + i * query.stride, query.stride},
                  Rows{scratch.keys_across + block, kBlock}, a.width, scratch.weights + i * kBlock, kBlock, false);
          if (!need_scores) continue;
          product(count, seen, ByRows{grad.data + i * grad.stride, grad.stride},
                  Rows{scratch.values_across + block, kBlock}, a.width, scratch.grad_scores + i * kBlock, kBlock,
                  false);
        }
        for_channels(a.channel_count, [&]<int channels>() BBQ_INLINE_LAMBDA {
          weigh_backward<channels>(a, scratch.buckets, u.first_head + h, keys, rows, statistics, counts,
                                   scratch.weights, scratch.grad_scores);
        });
        if (u.tables) {
          add_to_tables(a, scratch.buckets, u.first_head + h, rows, counts, scratch.grad_scores, u.tables);
        }
        // As in the forward: factors of zero do not keep NaN and infinity out.
        const int64_t step = is_masked && !(head.finite && head_keys.finite) ? 1 : kTileRows;
        for (int64_t i = 0; i < rows && u.row_sums; i += step) {
          const int64_t count = least(step, rows - i);
          product(count, width / kLanes, OfTile{scratch.grad_scores + i * kBlock}, head_keys.key, most(i, count),
                  u.row_sums + (h * s.rows + row + i) * width, width, true);
        }
        for (int64_t j = 0; j < keys; j += step) {
          const int64_t count = least(step, keys - j), skipped = clamp(first_row_of(first + j) - row, 0, rows);
          const auto add = [&](const float* tile, Rows right, float* sums) BBQ_INLINE_LAMBDA {
            product(count, width / kLanes, AcrossTile{tile + j + skipped * kBlock},
                    Rows{right.data + skipped * right.stride, right.stride}, rows - skipped, sums + block + j * width,
                    width, true);
          };
          if (u.grad_value.data) add(scratch.weights, grad, scratch.value_sums);
          if (u.grad_key.data) add(scratch.grad_scores, query, scratch.key_sums);
        }
      }
    }
    for (int64_t h = 0; h < u.heads; ++h) {
      for (int64_t j = 0; j < all_keys; ++j) {
        const auto write = [&](const Heads<void>& grad, const float* sums, float scale) {
          if (!grad.data) return;
          const int64_t offset = offset_of(grad, s, u.first_head + h, first + j);
          store_row(grad.data, a.element, offset, sums + (h * kBlock + j) * width, a.width, scale);
        };
        write(u.grad_key, scratch.key_sums, a.scale);
        write(u.grad_value, scratch.value_sums, 1.0f);
      }
    }
  }
}

void store_rows(const QueryGradient& g) {
  const Attention& a = g.attention;
  const Sequence& s = g.sequence;
  const int64_t width = padded(a.width);
  for (int64_t h = 0; h < g.heads; ++h) {
    for (int64_t i = 0; i < s.all_rows; ++i) {
      const int64_t row = offset_of(g.grad_query, s, g.first_head + h, i);
      if (i < s.rows) {
        store_row(g.grad_query.data, a.element, row, g.row_sums + (h * s.rows + i) * width, a.width, a.scale);
      } else {
        store_zeros(g.grad_query.data, a.element, row, a.width);
      }
    }
  }
}

int64_t backward_scratch(const Attention& a, int64_t heads, int64_t rows) {
  return BackwardScratch(a, heads, rows, nullptr).arena.used();
}

int64_t row_sums(const Attention& a, int64_t heads, int64_t rows) { return heads * rows * padded(a.width); }

}  // namespace

const AttentionKernels similarity_attention = {kLanes,  forward_scratch, backward_scratch, row_sums,
                                               forward, backward,        store_rows};

}  // namespace bbq::BBQ_SIMD
