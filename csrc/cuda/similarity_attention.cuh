// Similarity-reweighted attention on the GPU: kernel bodies, and the sequence in which they run. Free of torch.
//
// A block owns some tokens of one sequence and head, 16 or 32 of them a warp, and walks over the tokens of the other
// side in tiles, which come by asynchronous copies, one tile ahead. A product of two tiles is made of m16n8k16 products
// whose left side is the warp's own: what it weighs stays in its registers from the product of the scores to the
// product with the values, and no two warps ever add to the same element.
//
//   AttentionForward   own: queries   output and logsumexp, with a softmax that is corrected tile by tile
//   AttentionQueries   own: queries   what the backward needs to know of each row, and gradients of queries
//   AttentionKeys      own: keys      gradients of keys, of values, and of the tables: one partial sum a block
//   AddTableGradients                 adds up the partial sums of the tables, in order
//
// So every sum has one owner and one order, there are no atomics, and results have the same bits on every run. A short
// sequence is one block of as many warps as it has rows for: its tensors are read once. Weights are computed twice in
// the backward; that costs 7 products of tiles instead of 5, where a block that held both gradients would need atomics.
//
// The bucket of a pair is computed where its score is, from one word of either token; the tables lie in shared memory.
// Vectors and codes that are not packed are compared by all threads of the block, one byte a pair in shared memory.
//
// float32 is multiplied as three products of tf32: a = high + low, ab = high·high + high·low + low·high. Partial sums
// of 16 products are added in float32, because a tensor core rounds its sums towards zero. Heads of up to 32 elements
// get five products. Scores, softmax, gradients
// of scores and all sums are float32 for every dtype; weights and gradients of scores are rounded to the dtype of the
// query where they enter a product. An infinite float32 may become NaN (its low part is), NaN never anything else.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "cuda/device.cuh"

namespace bbq::attention {

using gpu::Accumulator;
using gpu::Global;
using gpu::Shared;

constexpr int kMaxChannels = 8, kMaxLevels = 16, kMaxBuckets = 64;
constexpr int kTableSlots = kMaxBuckets + 4;  // of a table in shared memory: a NaN for a similarity of NaN behind it
constexpr float kLog2E = 0x1.715476p0f;

BBQ_DEVICE int least(int a, int b) { return a < b ? a : b; }
BBQ_DEVICE int most(int a, int b) { return a > b ? a : b; }
BBQ_DEVICE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// ---- The problem ----

// How the buckets of a channel are found.
enum class Form {
  kNarrowWords,  // packed codes of up to 32 bits
  kWords,
  kPositions,
  kTile,  // vectors, and codes that are not packed: by the whole block
};

// One channel of one term: what is compared, and the table of each head.
struct Channel {
  Kind kind;
  Form form;
  int buckets, bits;                 // bits: of a level in a packed word
  int64_t width;                     // of what is compared, in elements
  int64_t stride;                    // from token to token, in elements
  Global<const int64_t> query, key;  // codes, words or positions of the first token
  Global<const float> query_vectors, key_vectors, boundaries;
  Global<const float> tables;  // of the first head; heads are `buckets` apart
  int64_t gradient;            // where the gradient of the first head's table is, among those of all tables
  int entry;                   // where the table is, among the tables of one head
  int tile;                    // kTile: which of the block's tiles of buckets is this channel's
};

// Sequences padded to one length, or packed one after the other if `starts` is given.
struct Layout {
  Global<const int32_t> starts;                      // (count + 1)
  Global<const int64_t> query_lengths, key_lengths;  // (count), each may be missing
  int64_t count, tokens;                             // tokens: of the packed form
  int rows, columns;                                 // of a padded sequence; at most, of a packed one
};

struct Problem {
  Layout layout;
  int heads, width;
  float scale;
  bool is_causal;
  int channel_count, tile_count, entries;  // entries: of the tables of one head
  Channel channels[kMaxChannels];
};

// The channel that an entry of the tables of one head belongs to.
BBQ_DEVICE int channel_of(const Problem& p, int entry) {
  int c = 0;
  while (c + 1 < p.channel_count && p.channels[c + 1].entry <= entry) ++c;
  return c;
}

// Rows of a tensor (batch, head, token, width) whose last dimension is dense. Strides are in elements.
template <class T>
struct HeadRows {
  Global<T> data;
  int64_t batch, head, token;
  bool aligned;  // pieces of 16 bytes of every row are

  BBQ_DEVICE Global<T> at(int64_t b, int64_t h, int64_t t) const { return data + (b * batch + h * head + t * token); }
};

// One sequence. Tokens past the lengths are in `all_*` only.
struct Sequence {
  int64_t batch, query_start, key_start;  // where it is in the tensors of heads
  int64_t query_token, key_token;         // and in those of channels
  int rows, columns, all_rows, all_columns;
  int shift;            // causal: key j is seen by query i if j <= i + shift
  int64_t beyond_rows;  // tokens of a packed sequence that is longer than it was said to be
};

BBQ_DEVICE Sequence sequence_at(const Layout& l, int64_t b) {
  Sequence s;
  s.beyond_rows = 0;
  if (l.starts) {
    const int64_t start = clamp(l.starts[b], 0, l.tokens), end = clamp(l.starts[b + 1], start, l.tokens);
    const int64_t length = clamp(end - start, 0, l.rows);
    s.batch = 0;
    s.query_start = s.key_start = s.query_token = s.key_token = start;
    s.rows = s.columns = s.all_rows = s.all_columns = static_cast<int>(length);
    s.shift = 0;
    s.beyond_rows = end - start - length;
  } else {
    s.batch = b;
    s.query_start = s.key_start = 0;
    s.query_token = b * l.rows;
    s.key_token = b * l.columns;
    s.all_rows = s.rows = l.rows;
    s.all_columns = s.columns = l.columns;
    s.shift = l.columns - l.rows;
    if (l.query_lengths) s.rows = static_cast<int>(clamp(l.query_lengths[b], 0, l.rows));
    if (l.key_lengths) s.columns = static_cast<int>(clamp(l.key_lengths[b], 0, l.columns));
  }
  return s;
}

// How many keys row i sees: the first ones.
BBQ_DEVICE int seen_by(const Problem& p, const Sequence& s, int i) {
  return p.is_causal ? most(0, least(i + s.shift + 1, s.columns)) : s.columns;
}

// Where the logsumexp and the statistics of row i are: as the rows of a dense query.
BBQ_DEVICE int64_t row_index(const Problem& p, const Sequence& s, int64_t head, int64_t i) {
  return p.layout.starts ? (s.query_start + i) * p.heads + head : (s.batch * p.heads + head) * p.layout.rows + i;
}

// What a block owns: tokens from `first` on. Blocks of the last tokens come first: causal rows there have most to do.
struct Place {
  int64_t sequence, tile;
  int head, first;
};

BBQ_DEVICE Place place_of(const Problem& p, int64_t block, int64_t tiles, int tile_tokens) {
  Place place;
  place.tile = tiles - 1 - block % tiles;
  place.head = static_cast<int>(block / tiles % p.heads);
  place.sequence = block / tiles / p.heads;
  place.first = static_cast<int>(place.tile * tile_tokens);
  return place;
}

// ---- Tiles in shared memory ----

template <class T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));  // elements of an asynchronous copy

// Rows of up to kWidth elements, zeros behind the real ones. Rows are apart so that no product meets a bank twice.
template <class T, int kWidth>
struct Rows {
  static constexpr int kStride = kWidth + kPiece<T>;
  static constexpr int kPieces = kWidth / kPiece<T>;

  // Starts the copies of `count` rows, zeros up to `rows`. Pieces that are not aligned are copied at once.
  static BBQ_DEVICE void copy(Shared<T> tile, const HeadRows<const T>& source, Global<const T> first, int width,
                              int count, int rows) {
    for (int i = gpu::thread_index(); i < rows * kPieces; i += gpu::block_threads()) {
      const int row = i / kPieces, d = (i % kPieces) * kPiece<T>;
      const int valid = row < count ? most(0, least(kPiece<T>, width - d)) : 0;
      const Shared<T> target = tile + row * kStride + d;
      if (valid == 0 || source.aligned) {
        gpu::async_copy16(target, valid ? first + row * source.token + d : first, valid * static_cast<int>(sizeof(T)));
      } else {
        for (int e = 0; e < kPiece<T>; ++e) target[e] = e < valid ? T(first[row * source.token + d + e]) : T{};
      }
    }
  }

  // Puts zeros in place of NaN and infinity in the pieces that this thread copied: f(row, column) for each.
  template <class F>
  static BBQ_DEVICE void clean(Shared<T> tile, int rows, const F& f) {
    for (int i = gpu::thread_index(); i < rows * kPieces; i += gpu::block_threads()) {
      const int row = i / kPieces, d = (i % kPieces) * kPiece<T>;
      const Shared<T> piece = tile + row * kStride + d;
      const gpu::Four<uint32_t> words = gpu::load4(gpu::cast<const uint32_t>(piece));
      uint32_t spoiled = 0;
      BBQ_UNROLL
      for (int w = 0; w < 4; ++w) spoiled |= has_no_number(words.v[w]);
      if (spoiled == 0) continue;
      BBQ_UNROLL_BY(1)
      for (int e = 0; e < kPiece<T>; ++e) {
        const float value = to_float(T(piece[e]));
        if (value - value == 0) continue;
        piece[e] = T{};
        f(row, d + e);
      }
    }
  }

  // Writes kColumns columns of `count` rows of a warp; `width` of them exist.
  template <int kColumns = kWidth>
  static BBQ_DEVICE void store(Shared<const T> tile, const HeadRows<T>& target, Global<T> first, int width, int count) {
    constexpr int kColumnPieces = kColumns / kPiece<T>;
    for (int i = gpu::lane_index(); i < count * kColumnPieces; i += gpu::kLanes) {
      const int row = i / kColumnPieces, d = (i % kColumnPieces) * kPiece<T>;
      const Shared<const T> source = tile + row * kStride + d;
      const Global<T> to = first + row * target.token + d;
      if (target.aligned && d + kPiece<T> <= width) {
        gpu::store4(gpu::cast<uint32_t>(to), gpu::load4(gpu::cast<const uint32_t>(source)));
      } else {
        for (int e = 0; e < kPiece<T> && d + e < width; ++e) to[e] = T(source[e]);
      }
    }
  }

 private:
  static BBQ_DEVICE uint32_t has_no_number(uint32_t word);  // exponents of all ones
};

template <class T>
constexpr uint32_t kExponent = 0;
template <>
inline constexpr uint32_t kExponent<float> = 0x7f800000;
template <>
inline constexpr uint32_t kExponent<BFloat16> = 0x7f80;
template <>
inline constexpr uint32_t kExponent<Half> = 0x7c00;

template <class T, int kWidth>
BBQ_DEVICE uint32_t Rows<T, kWidth>::has_no_number(uint32_t word) {
  constexpr uint32_t e = kExponent<T>;
  return sizeof(T) == 4 ? (word & e) == e : (word & e) == e || (word >> 16 & e) == e;
}

// Zeros in the tokens of a packed tensor that no sequence covers. Blocks behind those of the sequences do it.
constexpr int kTokensToClear = 1024;
template <class T>
BBQ_DEVICE void clear_token(const HeadRows<T>& rows, int64_t head, int64_t token, int width) {
  if (!rows.data) return;
  for (int d = gpu::lane_index(); d < width; d += gpu::kLanes) rows.at(0, head, token)[d] = T{};
}
template <class F>
BBQ_DEVICE void for_uncovered_tokens(const Problem& p, int64_t block, const F& f) {
  const Layout& l = p.layout;
  const int head = static_cast<int>(block % p.heads);
  const int64_t first = block / p.heads * kTokensToClear;
  const int64_t begin = clamp(l.starts[0], 0, l.tokens), end = clamp(l.starts[l.count], begin, l.tokens);
  const int warps = gpu::block_threads() / gpu::kLanes;
  for (int64_t t = first + gpu::warp_index(); t < first + kTokensToClear && t < l.tokens; t += warps) {
    if (t < begin || t >= end) f(head, t);
  }
}
// The same for what is behind the last tile of a sequence that is longer than it was said to be.
template <class F>
BBQ_DEVICE void for_tokens_beyond(const Sequence& s, const F& f) {
  const int warps = gpu::block_threads() / gpu::kLanes;
  for (int64_t t = gpu::warp_index(); t < s.beyond_rows; t += warps) f(s.query_start + s.all_rows + t);
}

// ---- Products of tiles ----

// What m16n8k16 multiplies. Lane 4g + t holds rows g and g + 8 and columns 2t and 2t + 1 of a product. kExact matters
// to float32 alone.
template <class T, bool kExact>
struct Operands {
  using Left = gpu::Left;
  using Right = gpu::Right;
  using Half16 = const uint16_t;

  // 16 rows from `tile` on, by 16 columns.
  static BBQ_DEVICE Left left(Shared<const T> tile, int stride) {
    const int lane = gpu::lane_index();
    Left result;
    gpu::load_matrices(result.v, gpu::cast<Half16>(tile + (lane % 16) * stride + (lane / 16) * 8));
    return result;
  }
  // The same of what a product left in registers.
  static BBQ_DEVICE Left left(const Accumulator& first, const Accumulator& second) {
    return {{pack(first.v[0], first.v[1]), pack(first.v[2], first.v[3]), pack(second.v[0], second.v[1]),
             pack(second.v[2], second.v[3])}};
  }
  // 16 columns of a product are 16 rows of the tile, the 16 steps of its sum their elements.
  static BBQ_DEVICE void right(Shared<const T> tile, int stride, Right (&result)[2]) {
    const int lane = gpu::lane_index();
    uint32_t words[4];
    gpu::load_matrices(words, gpu::cast<Half16>(tile + (lane / 16 * 8 + lane % 8) * stride + (lane / 8 % 2) * 8));
    result[0] = {{words[0], words[1]}};
    result[1] = {{words[2], words[3]}};
  }
  // The steps of the sum are 16 rows of the tile.
  static BBQ_DEVICE void right_across(Shared<const T> tile, int stride, Right (&result)[2]) {
    const int lane = gpu::lane_index();
    uint32_t words[4];
    gpu::load_matrices_across(words, gpu::cast<Half16>(tile + (lane % 16) * stride + (lane / 16) * 8));
    result[0] = {{words[0], words[1]}};
    result[1] = {{words[2], words[3]}};
  }
  static BBQ_DEVICE Accumulator multiply(const Left& a, const Right& b, const Accumulator& c) {
    return kHalf ? gpu::multiply_half(a, b, c) : gpu::multiply_bfloat16(a, b, c);
  }

 private:
  static constexpr bool kHalf = std::is_same_v<T, Half>;

  static BBQ_DEVICE uint32_t pack(float low, float high) {
    return kHalf ? gpu::pack_half(low, high) : gpu::pack_bfloat16(low, high);
  }
};

// Two times m16n8k8, each of three products: of 22 of the 24 bits of a float, and where kExact, of five: of all of
// them. Steps of a sum that come from registers are in the order of a product's columns (2t, 2t + 1), so `right_across`
// names the rows in that order.
template <bool kExact>
struct Operands<float, kExact> {
  template <int kCount>
  struct Split {
    uint32_t high[kCount], low[kCount], rest[kCount];

    BBQ_DEVICE void set(int i, float value) {
      high[i] = gpu::to_tf32(value);
      const float remainder = gpu::add(value, -gpu::bits_float(high[i]));
      low[i] = gpu::to_tf32(remainder);
      if (kExact) rest[i] = gpu::float_bits(gpu::add(remainder, -gpu::bits_float(low[i])));
    }
  };
  using Left = Split<8>;
  using Right = Split<4>;

  static BBQ_DEVICE Left left(Shared<const float> tile, int stride) {
    const int g = gpu::lane_index() / 4, t = gpu::lane_index() % 4;
    Left result;
    BBQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      result.set(i, tile[(g + 8 * (i % 2)) * stride + 8 * (i / 4) + t + 4 * (i / 2 % 2)]);
    }
    return result;
  }
  static BBQ_DEVICE Left left(const Accumulator& first, const Accumulator& second) {
    Left result;
    BBQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      const Accumulator& from = i < 4 ? first : second;
      result.set(i, from.v[i / 2 % 2 + 2 * (i % 2)]);
    }
    return result;
  }
  static BBQ_DEVICE void right(Shared<const float> tile, int stride, Right (&result)[2]) {
    const int g = gpu::lane_index() / 4, t = gpu::lane_index() % 4;
    BBQ_UNROLL
    for (int u = 0; u < 2; ++u) {
      BBQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        result[u].set(i, tile[(8 * u + g) * stride + t + 4 * i]);
      }
    }
  }
  static BBQ_DEVICE void right_across(Shared<const float> tile, int stride, Right (&result)[2]) {
    const int g = gpu::lane_index() / 4, t = gpu::lane_index() % 4;
    BBQ_UNROLL
    for (int u = 0; u < 2; ++u) {
      BBQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        result[u].set(i, tile[(8 * (i / 2) + 2 * t + i % 2) * stride + 8 * u + g]);
      }
    }
  }
  static BBQ_DEVICE Accumulator multiply(const Left& a, const Right& b, Accumulator sum) {
    const auto left_of = [](const uint32_t (&words)[8], int h) {
      return gpu::Left{{words[4 * h], words[4 * h + 1], words[4 * h + 2], words[4 * h + 3]}};
    };
    const auto right_of = [](const uint32_t (&words)[4], int h) {
      return gpu::Right{{words[2 * h], words[2 * h + 1]}};
    };
    Accumulator large{}, left_low{}, right_low{};
    BBQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (kExact) {
        left_low = gpu::multiply_tf32(left_of(a.rest, h), right_of(b.high, h), left_low);
        right_low = gpu::multiply_tf32(left_of(a.high, h), right_of(b.rest, h), right_low);
      }
      left_low = gpu::multiply_tf32(left_of(a.low, h), right_of(b.high, h), left_low);
      right_low = gpu::multiply_tf32(left_of(a.high, h), right_of(b.low, h), right_low);
      large = gpu::multiply_tf32(left_of(a.high, h), right_of(b.high, h), large);
    }
    BBQ_UNROLL
    for (int i = 0; i < 4; ++i) {  // the same bits if the sides are exchanged: all kernels find the same scores
      sum.v[i] = gpu::add(sum.v[i], gpu::add(large.v[i], gpu::add(left_low.v[i], right_low.v[i])));
    }
    return sum;
  }
};

// Products of a warp's kSlabs times 16 rows.
template <class T, int kWidth, int kSlabs>
struct Products {
  using Ops = Operands<T, kWidth <= 32>;  // few products leave budgets nothing to hide an error in
  static constexpr int kStride = Rows<T, kWidth>::kStride;

  // sums = left · rightᵀ, over the width
  template <int kGroups>
  static BBQ_DEVICE void multiply(Shared<const T> left, Shared<const T> right, Accumulator (&sums)[kSlabs][kGroups]) {
    BBQ_UNROLL
    for (int m = 0; m < kSlabs; ++m) {
      BBQ_UNROLL
      for (int n = 0; n < kGroups; ++n) sums[m][n] = {};
    }
    BBQ_UNROLL_BY(4)
    for (int k = 0; k < kWidth; k += 16) {
      typename Ops::Left a[kSlabs];
      BBQ_UNROLL
      for (int m = 0; m < kSlabs; ++m) a[m] = Ops::left(left + 16 * m * kStride + k, kStride);
      BBQ_UNROLL
      for (int n = 0; n < kGroups; n += 2) {
        typename Ops::Right b[2];
        Ops::right(right + 8 * n * kStride + k, kStride, b);
        BBQ_UNROLL
        for (int m = 0; m < kSlabs; ++m) {
          BBQ_UNROLL
          for (int u = 0; u < 2; ++u) sums[m][n + u] = Ops::multiply(a[m], b[u], sums[m][n + u]);
        }
      }
    }
  }

  // sums += left · right, over the rows of right
  template <int kGroups, int kColumnGroups>
  static BBQ_DEVICE void add(const Accumulator (&left)[kSlabs][kGroups], Shared<const T> right,
                             Accumulator (&sums)[kSlabs][kColumnGroups]) {
    BBQ_UNROLL
    for (int k = 0; k < kGroups; k += 2) {
      typename Ops::Left a[kSlabs];
      BBQ_UNROLL
      for (int m = 0; m < kSlabs; ++m) a[m] = Ops::left(left[m][k], left[m][k + 1]);
      BBQ_UNROLL
      for (int n = 0; n < kColumnGroups; n += 2) {
        typename Ops::Right b[2];
        Ops::right_across(right + 8 * k * kStride + 8 * n, kStride, b);
        BBQ_UNROLL
        for (int m = 0; m < kSlabs; ++m) {
          BBQ_UNROLL
          for (int u = 0; u < 2; ++u) sums[m][n + u] = Ops::multiply(a[m], b[u], sums[m][n + u]);
        }
      }
    }
  }

  // Makes NaN of the columns of rows that see what is not a number: sees(slab, half, mark of the column).
  template <int kColumnGroups, class F>
  static BBQ_DEVICE void spoil(Accumulator (&sums)[kSlabs][kColumnGroups], Shared<const int> marks, const F& sees) {
    BBQ_UNROLL
    for (int n = 0; n < kColumnGroups; ++n) {
      const gpu::Two<int> mark = gpu::load2(marks + 8 * n + 2 * (gpu::lane_index() % 4));
      BBQ_UNROLL
      for (int m = 0; m < kSlabs; ++m) {
        BBQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (sees(m, i / 2, mark.v[i % 2])) sums[m][n].v[i] = gpu::quiet_nan();
        }
      }
    }
  }

  // factor · sums into a tile, from where `Rows::store` takes them, and zeros in rows that have none: factor_of(slab,
  // half, factor) says whether there is one.
  template <int kColumnGroups, class F>
  static BBQ_DEVICE void put(const Accumulator (&sums)[kSlabs][kColumnGroups], Shared<T> tile, const F& factor_of) {
    const int g = gpu::lane_index() / 4, t = gpu::lane_index() % 4;
    BBQ_UNROLL
    for (int m = 0; m < kSlabs; ++m) {
      BBQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        float factor = 0;
        const bool is_kept = factor_of(m, half, factor);
        BBQ_UNROLL
        for (int n = 0; n < kColumnGroups; ++n) {
          gpu::Two<T> pair;
          BBQ_UNROLL
          for (int i = 0; i < 2; ++i) {
            pair.v[i] = from_float<T>(is_kept ? sums[m][n].v[2 * half + i] * factor : 0.0f);
          }
          gpu::store2(tile + (16 * m + 8 * half + g) * kStride + 8 * n + 2 * t, pair);
        }
      }
    }
  }
};

// ---- Buckets ----

// Terms of one head in shared memory, with the words of `own_rows` tokens of the block's own side and of two tiles of
// kTile tokens of the other side, of which kOthers are compared at once. kSpare: there are registers for the masks of
// words of 64 bits.
template <int kSlabs, int kTile, int kOthers, bool kSpare = true>
struct Terms {
  static constexpr int kGroups = kOthers / 8;

  struct Plan {
    int own_rows, tables, masks, own_words, other_words, tiles, bytes;
    BBQ_HOST_DEVICE Plan(int begin, int rows, int channels, int tile_channels) {
      own_rows = rows;
      masks = begin;
      own_words = masks + channels * kMaxLevels * 8;
      other_words = own_words + channels * own_rows * 8;
      tables = other_words + 2 * channels * kTile * 8;
      tiles = tables + channels * kTableSlots * 4;
      bytes = tiles + tile_channels * own_rows * kTile;
    }
  };

  const Problem& p;
  Plan plan;
  bool own_is_query;

  BBQ_DEVICE Shared<float> table(int c) const { return gpu::shared_at<float>(plan.tables) + c * kTableSlots; }
  BBQ_DEVICE Shared<uint64_t> masks(int c) const { return gpu::shared_at<uint64_t>(plan.masks) + c * kMaxLevels; }
  BBQ_DEVICE Shared<uint64_t> own_words(int c) const {
    return gpu::shared_at<uint64_t>(plan.own_words) + c * plan.own_rows;
  }
  BBQ_DEVICE Shared<uint64_t> other_words(int c, int stage) const {
    return gpu::shared_at<uint64_t>(plan.other_words) + (stage * p.channel_count + c) * kTile;
  }
  BBQ_DEVICE Shared<uint8_t> tile(int c) const {
    return gpu::shared_at<uint8_t>(plan.tiles) + p.channels[c].tile * plan.own_rows * kTile;
  }

  // Tables and masks; a barrier has to follow. A level of packed codes agrees, and with it all before for a prefix, if
  // no bit of its mask differs: a bucket is a number of levels.
  BBQ_DEVICE void load_tables(int head) const {
    for (int i = gpu::thread_index(); i < p.channel_count * kTableSlots; i += gpu::block_threads()) {
      const int c = i / kTableSlots, b = i % kTableSlots;
      const Channel& channel = p.channels[c];
      table(c)[b] = b < channel.buckets ? float(channel.tables[int64_t{head} * channel.buckets + b]) : gpu::quiet_nan();
    }
    for (int i = gpu::thread_index(); i < p.channel_count * kMaxLevels; i += gpu::block_threads()) {
      const Channel& channel = p.channels[i / kMaxLevels];
      const int l = i % kMaxLevels;
      if (channel.form != Form::kNarrowWords && channel.form != Form::kWords) continue;
      const uint64_t all = ~uint64_t{0};
      const uint64_t field = channel.bits >= 64 ? all : (uint64_t{1} << channel.bits) - 1;
      uint64_t mask = 0;  // levels that do not exist are never asked for
      if (l < channel.buckets - 1) {
        const int end = (l + 1) * channel.bits;
        mask = channel.kind == Kind::kMatches ? field << (l * channel.bits)
               : end >= 64                    ? all
                                              : (uint64_t{1} << end) - 1;
      }
      masks(i / kMaxLevels)[l] = mask;
    }
  }

  // Starts the copies of the words of `count` tokens, zeros up to `rows`.
  BBQ_DEVICE void copy_own(int64_t token, int count) const {
    copy(own_is_query, token, count, plan.own_rows, [&](int c) { return own_words(c); });
  }
  BBQ_DEVICE void copy_others(int64_t token, int count, int stage) const {
    copy(!own_is_query, token, count, kTile, [&](int c) { return other_words(c, stage); });
  }

  // Buckets of a tile in the channels that need all threads of the block, which are there when this returns. Nobody may
  // still be reading those of the last tile.
  BBQ_DEVICE void fill_tiles(int64_t own_token, int own_count, int64_t other_token, int other_count) const {
    if (p.tile_count == 0) return;
    for (int c = 0; c < p.channel_count; ++c) {
      if (p.channels[c].form == Form::kTile) fill_tile(c, own_token, own_count, other_token, other_count);
    }
    gpu::sync_threads();
  }

  // f(slab, group, i, bucket) for every score in the registers of this lane. `warp_row`: the warp's first own row;
  // `part`: the first token of the tile.
  template <class F>
  BBQ_DEVICE void for_buckets(int c, int stage, int warp_row, int part, const F& f) const {
    const Channel& channel = p.channels[c];
    const int levels = channel.buckets - 1;
    if (channel.form == Form::kNarrowWords) {
      const Shared<const uint32_t> own = gpu::cast<const uint32_t>(own_words(c)) + warp_row;
      const Shared<const uint32_t> other = gpu::cast<const uint32_t>(other_words(c, stage)) + part;
      if (levels == 3) {
        count_levels<3>(c, levels, own, other, f);
      } else if (levels == 4) {
        count_levels<4>(c, levels, own, other, f);
      } else {
        count_levels<0>(c, levels, own, other, f);
      }
    } else if (channel.form == Form::kWords) {
      count_levels<0>(c, levels, Shared<const uint64_t>(own_words(c)) + warp_row,
                      Shared<const uint64_t>(other_words(c, stage)) + part, f);
    } else if (channel.form == Form::kPositions) {
      for_pairs<int64_t>(Shared<const int64_t>(gpu::cast<const int64_t>(own_words(c))) + warp_row,
                         Shared<const int64_t>(gpu::cast<const int64_t>(other_words(c, stage))) + part,
                         [&](int m, int n, int i, int64_t a, int64_t b) {
                           f(m, n, i, static_cast<int>(gap_bucket(a, b, channel.buckets)));
                         });
    } else {
      const int g = gpu::lane_index() / 4, t = gpu::lane_index() % 4;
      const Shared<const uint8_t> mine = Shared<const uint8_t>(tile(c)) + (warp_row + g) * kTile + part + 2 * t;
      BBQ_UNROLL
      for (int m = 0; m < kSlabs; ++m) {
        BBQ_UNROLL
        for (int n = 0; n < kGroups; ++n) {
          BBQ_UNROLL
          for (int half = 0; half < 2; ++half) {
            const gpu::Two<uint8_t> pair = gpu::load2(mine + (16 * m + 8 * half) * kTile + 8 * n);
            f(m, n, 2 * half, int{pair.v[0]});
            f(m, n, 2 * half + 1, int{pair.v[1]});
          }
        }
      }
    }
  }

  // scores = scale · scores + what the tables hold
  BBQ_DEVICE void add_biases(int stage, int warp_row, int part, Accumulator (&scores)[kSlabs][kGroups]) const {
    if (p.channel_count == 0) {
      BBQ_UNROLL
      for (int m = 0; m < kSlabs; ++m) {
        BBQ_UNROLL
        for (int n = 0; n < kGroups; ++n) {
          BBQ_UNROLL
          for (int i = 0; i < 4; ++i) scores[m][n].v[i] *= p.scale;
        }
      }
    }
    Shared<const float> values = table(0);
    for (int c = 0; c < p.channel_count; ++c, values = values + kTableSlots) {
      const float factor = c == 0 ? p.scale : 1.0f;
      const auto add = [&](int m, int n, int i, float value) {
        scores[m][n].v[i] = gpu::fused_multiply_add(scores[m][n].v[i], factor, value);
      };
      if (is_nested(p.channels[c])) {  // the table in registers, one choice a level
        with_nested(c, stage, warp_row, part, [&](auto levels, auto word, auto own, auto other) {
          constexpr int kLevels = decltype(levels)::value;
          using Word = decltype(word);
          float value[kLevels + 1];
          BBQ_UNROLL
          for (int l = 0; l <= kLevels; ++l) value[l] = values[l];
          Word mask[kLevels];
          read_masks(c, mask);
          for_pairs<Word>(own, other, [&](int m, int n, int i, Word a, Word b) {
            float chosen = value[0];
            BBQ_UNROLL
            for (int l = 0; l < kLevels; ++l) chosen = ((a ^ b) & mask[l]) == 0 ? value[l + 1] : chosen;
            add(m, n, i, chosen);
          });
        });
      } else {
        for_buckets(c, stage, warp_row, part, [&](int m, int n, int i, int bucket) { add(m, n, i, values[bucket]); });
      }
    }
  }

  // Prefixes of packed codes of the usual numbers of levels, where level l + 1 agrees only if level l does.
  static BBQ_DEVICE bool is_nested(const Channel& c) {
    const int levels = c.buckets - 1;
    if (c.kind != Kind::kPrefix) return false;
    return c.form == Form::kNarrowWords ? levels >= 2 && levels <= 4 : kSpare && c.form == Form::kWords && levels == 4;
  }
  // f(levels as a constant, a word, own words, other words) of such a channel, for `for_pairs`.
  template <class F>
  BBQ_DEVICE void with_nested(int c, int stage, int warp_row, int part, const F& f) const {
    const Channel& channel = p.channels[c];
    if constexpr (kSpare) {
      if (channel.form == Form::kWords) {
        f(std::integral_constant<int, 4>{}, uint64_t{}, Shared<const uint64_t>(own_words(c)) + warp_row,
          Shared<const uint64_t>(other_words(c, stage)) + part);
        return;
      }
    }
    const Shared<const uint32_t> own = gpu::cast<const uint32_t>(own_words(c)) + warp_row;
    const Shared<const uint32_t> other = gpu::cast<const uint32_t>(other_words(c, stage)) + part;
    if (channel.buckets == 3) {
      f(std::integral_constant<int, 2>{}, uint32_t{}, own, other);
    } else if (channel.buckets == 4) {
      f(std::integral_constant<int, 3>{}, uint32_t{}, own, other);
    } else {
      f(std::integral_constant<int, 4>{}, uint32_t{}, own, other);
    }
  }
  template <class Word, int kLevels>
  BBQ_DEVICE void read_masks(int c, Word (&mask)[kLevels]) const {
    const Shared<const uint64_t> all = masks(c);
    BBQ_UNROLL
    for (int l = 0; l < kLevels; ++l) mask[l] = static_cast<Word>(all[l]);
  }

  // f(slab, group, i, own word, other word) for every score in the registers of this lane
  template <class Word, class F>
  static BBQ_DEVICE void for_pairs(Shared<const Word> own, Shared<const Word> other, const F& f) {
    const int g = gpu::lane_index() / 4, t = gpu::lane_index() % 4;
    Word mine[kSlabs][2];
    BBQ_UNROLL
    for (int m = 0; m < kSlabs; ++m) {
      BBQ_UNROLL
      for (int half = 0; half < 2; ++half) mine[m][half] = own[16 * m + 8 * half + g];
    }
    BBQ_UNROLL
    for (int n = 0; n < kGroups; ++n) {
      const gpu::Two<Word> theirs = gpu::load2(other + 8 * n + 2 * t);
      BBQ_UNROLL
      for (int m = 0; m < kSlabs; ++m) {
        BBQ_UNROLL
        for (int i = 0; i < 4; ++i) f(m, n, i, mine[m][i / 2], theirs.v[i % 2]);
      }
    }
  }

 private:
  template <class Words>
  BBQ_DEVICE void copy(bool query, int64_t token, int count, int rows, const Words& words) const {
    for (int i = gpu::thread_index(); i < p.channel_count * rows; i += gpu::block_threads()) {
      const int c = i / rows, row = i % rows;
      const Channel& channel = p.channels[c];
      if (channel.form == Form::kTile) continue;
      const Global<const int64_t> source = query ? channel.query : channel.key;
      const int64_t at = (token + (row < count ? row : 0)) * channel.stride;
      if (channel.form == Form::kNarrowWords) {  // the lower halves
        gpu::async_copy4(gpu::cast<uint32_t>(words(c)) + row, gpu::cast<const uint32_t>(source + at),
                         row < count ? 4 : 0);
      } else {
        gpu::async_copy8(words(c) + row, source + at, row < count ? 8 : 0);
      }
    }
  }

  template <int kLevels, class Word, class F>
  BBQ_DEVICE void count_levels(int c, int levels, Shared<const Word> own, Shared<const Word> other, const F& f) const {
    const Shared<const uint64_t> all = masks(c);
    Word mask[kLevels > 0 ? kLevels : 1];
    if constexpr (kLevels > 0) read_masks(c, mask);
    for_pairs<Word>(own, other, [&](int m, int n, int i, Word a, Word b) {
      const Word different = a ^ b;
      int agree = 0;
      if constexpr (kLevels > 0) {
        BBQ_UNROLL
        for (int l = 0; l < kLevels; ++l) agree += (different & mask[l]) == 0;
      } else {
        BBQ_UNROLL_BY(1)
        for (int l = 0; l < levels; ++l) agree += (different & static_cast<Word>(all[l])) == 0;
      }
      f(m, n, i, agree);
    });
  }

  // Sixteen pairs a thread at a time: four own tokens, four others. Pairs past the counts are not looked at.
  BBQ_DEVICE void fill_tile(int c, int64_t own_token, int own_count, int64_t other_token, int other_count) const {
    const Channel& channel = p.channels[c];
    const Shared<uint8_t> target = tile(c);
    constexpr int kAcross = kTile / 4;
    for (int i = gpu::thread_index(); i < plan.own_rows / 4 * kAcross; i += gpu::block_threads()) {
      const int row = i / kAcross * 4, column = i % kAcross * 4;
      int64_t mine[4], theirs[4];  // offsets of tokens; those past the count are the first one
      BBQ_UNROLL
      for (int e = 0; e < 4; ++e) {
        mine[e] = (own_token + (row + e < own_count ? row + e : 0)) * channel.stride;
        theirs[e] = (other_token + (column + e < other_count ? column + e : 0)) * channel.stride;
      }
      if (channel.kind == Kind::kCosine) {
        const Global<const float> own = own_is_query ? channel.query_vectors : channel.key_vectors;
        const Global<const float> other = own_is_query ? channel.key_vectors : channel.query_vectors;
        float sums[4][4] = {};
        BBQ_UNROLL_BY(1)
        for (int64_t d = 0; d < channel.width; ++d) {
          float a[4], b[4];
          BBQ_UNROLL
          for (int e = 0; e < 4; ++e) {
            a[e] = own[mine[e] + d];
            b[e] = other[theirs[e] + d];
          }
          BBQ_UNROLL
          for (int y = 0; y < 4; ++y) {
            BBQ_UNROLL
            for (int x = 0; x < 4; ++x) sums[y][x] = gpu::fused_multiply_add(a[y], b[x], sums[y][x]);
          }
        }
        BBQ_UNROLL
        for (int y = 0; y < 4; ++y) {
          BBQ_UNROLL
          for (int x = 0; x < 4; ++x) {
            int bucket = channel.buckets;  // NaN: the slot behind the table
            if (sums[y][x] == sums[y][x]) {
              bucket = 0;
              while (bucket < channel.buckets - 1 && channel.boundaries[bucket] <= sums[y][x]) ++bucket;
            }
            target[(row + y) * kTile + column + x] = static_cast<uint8_t>(bucket);
          }
        }
      } else {
        const Global<const int64_t> own = own_is_query ? channel.query : channel.key;
        const Global<const int64_t> other = own_is_query ? channel.key : channel.query;
        BBQ_UNROLL_BY(1)
        for (int pair = 0; pair < 16; ++pair) {
          const int y = pair / 4, x = pair % 4;
          const int64_t a = (own_token + (row + y < own_count ? row + y : 0)) * channel.stride;
          const int64_t b = (other_token + (column + x < other_count ? column + x : 0)) * channel.stride;
          int agree = 0;
          for (int l = 0; l < channel.buckets - 1; ++l) {
            const int64_t code = own[a + l];
            const bool agrees = code == other[b + l] && code >= 0;
            if (!agrees && channel.kind == Kind::kPrefix) break;
            agree += agrees;
          }
          target[(row + y) * kTile + column + x] = static_cast<uint8_t>(agree);
        }
      }
    }
  }
};

// ---- Weights ----

// e^(score - base), where `base` is the highest score: in units of log 2 for 16-bit types, whose weights are rounded
// far beyond the error of the GPU's own 2^x; in units of the score for float32, and with a polynomial.
template <class T>
struct Weight {
  static constexpr bool kExact = sizeof(T) == 4;
  static constexpr float kUnit = kExact ? 1.0f : kLog2E;             // of a score
  static constexpr double kLog = kExact ? 1.0 : 0.6931471805599453;  // of a unit

  // e^x with an error of about 1 ulp, 0 below 2^-126.
  static BBQ_DEVICE float exponential(float x) {
    const float k = rintf(x * kLog2E);
    // Far below everything, without the infinities that a difference of infinities would make NaN.
    if (k < -150.0f) return 0.0f;
    const float r = gpu::fused_multiply_add(k, -0x1.7f7d1cp-20f, gpu::fused_multiply_add(k, -0x1.62e4p-1f, x));
    // The least relative error of all polynomials 1 + r + r²·(...) of degree 6: 3e-9.
    float p = gpu::fused_multiply_add(r, 0x1.6a23ccp-10f, 0x1.123a2p-7f);
    p = gpu::fused_multiply_add(p, r, 0x1.5558f2p-5f);
    p = gpu::fused_multiply_add(p, r, 0x1.555492p-3f);
    p = gpu::fused_multiply_add(p, r, 0x1.fffffcp-2f);
    p = gpu::fused_multiply_add(p, r, 1.0f);
    p = gpu::fused_multiply_add(p, r, 1.0f);
    return p * gpu::exp2(k);  // a power of two, exactly
  }
  // Of a difference of bases.
  static BBQ_DEVICE float of_difference(float difference) {
    return kExact ? exponential(difference) : gpu::exp2(difference);
  }
  static BBQ_DEVICE float of(float score, float base) {
    return kExact ? exponential(score - base) : gpu::exp2(gpu::fused_multiply_add(score, kLog2E, -base));
  }
  // The same with a base in two parts.
  static BBQ_DEVICE float of(float score, float high, float low) {
    return kExact ? exponential((score - high) - low) : gpu::exp2(gpu::fused_multiply_add(score, kLog2E, -high) - low);
  }
};

// ---- Sizes ----

constexpr int kMaxWarps = 8;

// Rows of 16 a warp (slabs), tokens of the other side in a tile, how many of them are worked on at once, and columns of
// the results, as shared memory and registers allow. Where the columns are not all, several blocks share the rows.
template <class T, int kWidth>
struct Sizes {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kForwardSlabs = kWide || kWidth > 64 ? 1 : 2;
  static constexpr int kForwardTile = kWide ? (kWidth > 128 ? 16 : 32) : kWidth > 128 ? 32 : 64;
  static constexpr int kForwardAtOnce = kWidth > 128 || (kWide && kWidth > 64) ? 16 : 32;
  static constexpr int kForwardColumns = kWide && kWidth > 128 ? 128 : kWidth;
  static constexpr int kQueriesTile = kWide ? (kWidth > 128 ? 16 : 32) : kWidth > 64 ? 32 : 64;
  static constexpr int kQueriesAtOnce = kWidth > 128 || (kWide && kWidth > 64) ? 16 : 32;
  static constexpr int kQueriesColumns = kWide && kWidth > 128 ? 128 : kWidth;
  static constexpr int kKeysTile = kWide ? (kWidth > 64 ? 16 : 32) : kWidth > 64 ? 32 : 64;
  static constexpr int kKeysAtOnce = kWide || kWidth > 64 ? 16 : 32;
  static constexpr int kKeysColumns = kWide && kWidth > 64 ? 64 : kWidth > 128 ? 128 : kWidth;
  // Of tiles in shared memory, in the backward. One, where 99 KiB do not hold two: nothing is copied ahead then.
  static constexpr int kLeastStages = kWide && kWidth > 128 ? 1 : 2;
};

// ---- Forward ----

template <class T, int kWidth>
struct AttentionForward {
  static constexpr int kThreads = kMaxWarps * gpu::kLanes, kBlocks = 1;
  static constexpr int kSlabs = Sizes<T, kWidth>::kForwardSlabs, kTile = Sizes<T, kWidth>::kForwardTile,
                       kOthers = Sizes<T, kWidth>::kForwardAtOnce;
  static constexpr int kColumns = Sizes<T, kWidth>::kForwardColumns, kParts = kWidth / kColumns, kLeastStages = 2;
  static constexpr int kGroups = kOthers / 8, kColumnGroups = kColumns / 8, kWarpRows = 16 * kSlabs;
  using TileRows = Rows<T, kWidth>;
  using Product = Products<T, kWidth, kSlabs>;
  using Channels = Terms<kSlabs, kTile, kOthers>;

  struct Params {
    Problem problem;
    HeadRows<const T> query, key, value;
    HeadRows<T> output;
    Global<double> logsumexp;
    int64_t tiles, blocks;  // of queries of a sequence; of all sequences and heads
  };

  struct Plan {
    int queries, keys, values, marks, terms;
    BBQ_HOST_DEVICE explicit Plan(int warps) {
      constexpr int kRowBytes = TileRows::kStride * static_cast<int>(sizeof(T));
      queries = 0;
      keys = queries + warps * kWarpRows * kRowBytes;
      values = keys + 2 * kTile * kRowBytes;
      marks = values + 2 * kTile * kRowBytes;
      terms = marks + kWidth * 4;
    }
  };
  static BBQ_HOST_DEVICE int shared_bytes(int warps, int /*stages*/, const Problem& p) {
    return typename Channels::Plan(Plan(warps).terms, warps * kWarpRows, p.channel_count, p.tile_count).bytes;
  }

  static BBQ_DEVICE void run(const Params& params) {
    const Problem& p = params.problem;
    const auto clear = [&](int64_t head, int64_t token) {
      clear_token(params.output, head, token, p.width);
      if (gpu::lane_index() == 0) params.logsumexp[token * p.heads + head] = -double{gpu::kInfinity};
    };
    if (gpu::block_index() >= params.blocks) {
      for_uncovered_tokens(p, gpu::block_index() - params.blocks, clear);
      return;
    }
    const int warps = gpu::block_threads() / gpu::kLanes, lane = gpu::lane_index(), g = lane / 4, t = lane % 4;
    const int column_part = static_cast<int>(gpu::block_index() % kParts), first_column = column_part * kColumns;
    const Place place = place_of(p, gpu::block_index() / kParts, params.tiles, warps * kWarpRows);
    const Sequence s = sequence_at(p.layout, place.sequence);
    if (place.tile == 0 && column_part == 0) for_tokens_beyond(s, [&](int64_t token) { clear(place.head, token); });
    if (place.first >= s.all_rows) return;

    const Plan plan(warps);
    const Shared<T> queries = gpu::shared_at<T>(plan.queries), keys = gpu::shared_at<T>(plan.keys),
                    values = gpu::shared_at<T>(plan.values);
    const Channels terms{p, {plan.terms, warps * kWarpRows, p.channel_count, p.tile_count}, true};
    const int live = least(s.rows - place.first, warps * kWarpRows);  // rows of the block; none if not above 0
    const int columns = live > 0 ? seen_by(p, s, place.first + live - 1) : 0;
    const int warp_row = gpu::warp_index() * kWarpRows, first_row = place.first + warp_row;
    const int warp_columns = warp_row < live ? seen_by(p, s, place.first + least(live, warp_row + kWarpRows) - 1) : 0;

    const auto copy_tile = [&](int first, int stage) {
      if (first < columns) {
        const int count = least(kTile, columns - first), at = stage * kTile * TileRows::kStride;
        const int64_t token = s.key_start + first;
        TileRows::copy(keys + at, params.key, params.key.at(s.batch, place.head, token), p.width, count, kTile);
        TileRows::copy(values + at, params.value, params.value.at(s.batch, place.head, token), p.width, count, kTile);
        terms.copy_others(s.key_token + first, count, stage);
      }
      gpu::async_commit();
    };

    Accumulator sums[kSlabs][kColumnGroups];
    float highest[kSlabs][2], total[kSlabs][2];
    float base[kSlabs][2];  // the highest, in the units of `Weight`; 0 where there is none
    BBQ_UNROLL
    for (int m = 0; m < kSlabs; ++m) {
      BBQ_UNROLL
      for (int n = 0; n < kColumnGroups; ++n) sums[m][n] = {};
      BBQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        highest[m][half] = -gpu::kInfinity;
        base[m][half] = total[m][half] = 0;
      }
    }
    if (columns > 0) {
      TileRows::copy(queries, params.query, params.query.at(s.batch, place.head, s.query_start + place.first), p.width,
                     live, warps * kWarpRows);
      terms.copy_own(s.query_token + place.first, live);
      terms.load_tables(place.head);
      copy_tile(0, 0);
    }
    // Where a row does not see all of a tile, a zero weight would not keep NaN and infinity out of its sums: values
    // that are no numbers are left out, and marked with the first of their keys, for the rows that do see them.
    const Shared<int> marks = gpu::shared_at<int>(plan.marks);
    for (int d = gpu::thread_index(); d < kWidth; d += gpu::block_threads()) marks[d] = s.columns;
    bool spoiled = false;
    int stage = 0;
    for (int first = 0; first < columns; first += kTile, stage ^= 1) {
      gpu::async_wait<0>();
      gpu::sync_threads();  // the tile is there for all, and nobody reads the one before any more
      copy_tile(first + kTile, stage ^ 1);
      const Shared<T> value = values + stage * kTile * TileRows::kStride;
      const int count = least(kTile, columns - first);
      terms.fill_tiles(s.query_token + place.first, live, s.key_token + first, count);
      const bool on_diagonal = p.is_causal && seen_by(p, s, place.first) < first + count;
      if (on_diagonal) {
        bool found = false;
        TileRows::clean(value, kTile, [&](int row, int d) {
          found = true;
          gpu::atomic_min(marks + d, first + row);
        });
        spoiled = gpu::sync_threads_or(found) || spoiled;
      }
      BBQ_UNROLL_BY(1)
      for (int part = 0; part < kTile && first + part < warp_columns; part += kOthers) {
        Accumulator scores[kSlabs][kGroups];
        Product::multiply(queries + warp_row * TileRows::kStride, keys + (stage * kTile + part) * TileRows::kStride,
                          scores);
        terms.add_biases(stage, warp_row, part, scores);
        const auto seen = [&](int m, int row) { return seen_by(p, s, first_row + 16 * m + row) - (first + part); };
        if (first + part + kOthers > seen_by(p, s, first_row)) {
          BBQ_UNROLL
          for (int m = 0; m < kSlabs; ++m) {
            BBQ_UNROLL
            for (int half = 0; half < 2; ++half) {
              const int limit = seen(m, 8 * half + g) - 2 * t;
              BBQ_UNROLL
              for (int n = 0; n < kGroups; ++n) {
                BBQ_UNROLL
                for (int i = 0; i < 2; ++i) {
                  float& score = scores[m][n].v[2 * half + i];
                  score = 8 * n + i < limit ? score : -gpu::kInfinity;
                }
              }
            }
          }
        }
        bool higher = false;
        float factor[kSlabs][2];
        BBQ_UNROLL
        for (int m = 0; m < kSlabs; ++m) {
          BBQ_UNROLL
          for (int half = 0; half < 2; ++half) {
            float top = highest[m][half];  // a NaN comes through its weight
            BBQ_UNROLL
            for (int n = 0; n < kGroups; ++n) {
              top = fmaxf(top, fmaxf(scores[m][n].v[2 * half], scores[m][n].v[2 * half + 1]));
            }
            top = gpu::max_over<4>(top);
            const float new_base = top == -gpu::kInfinity ? 0.0f : top * Weight<T>::kUnit;
            factor[m][half] =
                highest[m][half] == -gpu::kInfinity ? 0.0f : Weight<T>::of_difference(base[m][half] - new_base);
            higher = higher || factor[m][half] != 1.0f;
            highest[m][half] = top;
            base[m][half] = new_base;
            float sum = 0;
            BBQ_UNROLL
            for (int n = 0; n < kGroups; ++n) {
              BBQ_UNROLL
              for (int i = 0; i < 2; ++i) {
                float& weight = scores[m][n].v[2 * half + i];
                weight = Weight<T>::of(weight, new_base);
                sum += weight;
              }
            }
            total[m][half] = total[m][half] * factor[m][half] + sum;
          }
        }
        if (gpu::ballot(higher)) {  // seldom, once a row has met its highest score
          BBQ_UNROLL
          for (int m = 0; m < kSlabs; ++m) {
            BBQ_UNROLL
            for (int n = 0; n < kColumnGroups; ++n) {
              BBQ_UNROLL
              for (int i = 0; i < 4; ++i) sums[m][n].v[i] *= factor[m][i / 2];
            }
          }
        }
        Product::add(scores, value + part * TileRows::kStride + first_column, sums);
      }
    }
    if (spoiled) {
      Product::spoil(sums, marks + first_column,
                     [&](int m, int half, int key) { return key < seen_by(p, s, first_row + 16 * m + 8 * half + g); });
    }

    gpu::sync_warp();  // the warp's own queries are not read any more: the output goes out through them
    Product::put(sums, queries + warp_row * TileRows::kStride, [&](int m, int half, float& factor) {
      const int row = 16 * m + 8 * half + g;
      const float sum = gpu::sum_over<4>(total[m][half]);
      const bool nothing = sum == 0 || warp_row + row >= live;
      if (t == 0 && column_part == 0 && first_row + row < s.all_rows) {
        params.logsumexp[row_index(p, s, place.head, first_row + row)] =
            nothing ? -double{gpu::kInfinity} : double{base[m][half]} * Weight<T>::kLog + log(double{sum});
      }
      factor = 1.0f / sum;
      return !nothing;
    });
    gpu::sync_warp();
    TileRows::template store<kColumns>(queries + warp_row * TileRows::kStride, params.output,
                                       params.output.at(s.batch, place.head, s.query_start + first_row) + first_column,
                                       p.width - first_column, least(kWarpRows, s.all_rows - first_row));
  }
};

// ---- Backward ----

// What the backward knows of a row: its logsumexp in units of `Weight`, in two parts, and Σ_j p_ij dp_ij. A row that
// attends to nothing has an infinite logsumexp here, which makes its weights zero.
using Statistics = gpu::Four<float>;  // high, low, delta, and nothing

template <class T, int kWidth>
struct AttentionQueries {
  static constexpr int kThreads = kMaxWarps * gpu::kLanes, kBlocks = 1;
  static constexpr int kSlabs = 1, kTile = Sizes<T, kWidth>::kQueriesTile, kOthers = Sizes<T, kWidth>::kQueriesAtOnce;
  static constexpr int kColumns = Sizes<T, kWidth>::kQueriesColumns, kParts = kWidth / kColumns;
  static constexpr int kLeastStages = Sizes<T, kWidth>::kLeastStages;
  static constexpr int kGroups = kOthers / 8, kColumnGroups = kColumns / 8, kWarpRows = 16 * kSlabs;
  using TileRows = Rows<T, kWidth>;
  using Product = Products<T, kWidth, kSlabs>;
  using Channels = Terms<kSlabs, kTile, kOthers>;

  struct Params {
    Problem problem;
    HeadRows<const T> query, key, value, output, grad;
    Global<const double> logsumexp;
    HeadRows<T> grad_query;  // may be missing
    Global<float> statistics;
    int64_t tiles, blocks;
    int stages;
  };

  struct Plan {
    int queries, grads, keys, values, marks, terms;
    BBQ_HOST_DEVICE Plan(int warps, int stages) {
      constexpr int kRowBytes = TileRows::kStride * static_cast<int>(sizeof(T));
      queries = 0;
      grads = queries + warps * kWarpRows * kRowBytes;
      keys = grads + warps * kWarpRows * kRowBytes;
      values = keys + stages * kTile * kRowBytes;
      marks = values + stages * kTile * kRowBytes;
      terms = marks + kWidth * 4;
    }
  };
  static BBQ_HOST_DEVICE int shared_bytes(int warps, int stages, const Problem& p) {
    return typename Channels::Plan(Plan(warps, stages).terms, warps * kWarpRows, p.channel_count, p.tile_count).bytes;
  }

  static BBQ_DEVICE void run(const Params& params) {
    const Problem& p = params.problem;
    const auto clear = [&](int64_t head, int64_t token) { clear_token(params.grad_query, head, token, p.width); };
    if (gpu::block_index() >= params.blocks) {
      for_uncovered_tokens(p, gpu::block_index() - params.blocks, clear);
      return;
    }
    const int warps = gpu::block_threads() / gpu::kLanes, lane = gpu::lane_index(), g = lane / 4, t = lane % 4;
    const int column_part = static_cast<int>(gpu::block_index() % kParts), first_column = column_part * kColumns;
    const Place place = place_of(p, gpu::block_index() / kParts, params.tiles, warps * kWarpRows);
    const Sequence s = sequence_at(p.layout, place.sequence);
    if (place.tile == 0 && column_part == 0) for_tokens_beyond(s, [&](int64_t token) { clear(place.head, token); });
    if (place.first >= s.all_rows) return;

    const int stages = kLeastStages == 2 ? 2 : params.stages;
    const Plan plan(warps, stages);
    const Shared<T> queries = gpu::shared_at<T>(plan.queries), grads = gpu::shared_at<T>(plan.grads),
                    keys = gpu::shared_at<T>(plan.keys), values = gpu::shared_at<T>(plan.values);
    const Channels terms{p, {plan.terms, warps * kWarpRows, p.channel_count, p.tile_count}, true};
    const int live = least(s.rows - place.first, warps * kWarpRows);
    const int columns = live > 0 && params.grad_query.data ? seen_by(p, s, place.first + live - 1) : 0;
    const int warp_row = gpu::warp_index() * kWarpRows, first_row = place.first + warp_row;
    const int warp_columns = warp_row < live ? seen_by(p, s, place.first + least(live, warp_row + kWarpRows) - 1) : 0;

    const auto copy_tile = [&](int first, int stage) {
      if (first < columns) {
        const int count = least(kTile, columns - first), at = stage * kTile * TileRows::kStride;
        const int64_t token = s.key_start + first;
        TileRows::copy(keys + at, params.key, params.key.at(s.batch, place.head, token), p.width, count, kTile);
        TileRows::copy(values + at, params.value, params.value.at(s.batch, place.head, token), p.width, count, kTile);
        terms.copy_others(s.key_token + first, count, stage);
      }
      gpu::async_commit();
    };

    const auto copy_own = [&](Shared<T> tile, const HeadRows<const T>& rows) {
      TileRows::copy(tile, rows, rows.at(s.batch, place.head, s.query_start + place.first), p.width, live,
                     warps * kWarpRows);
    };
    copy_own(grads, params.grad);
    copy_own(queries, params.output);  // until the statistics are known
    gpu::async_commit();
    if (columns > 0) {
      terms.copy_own(s.query_token + place.first, live);
      terms.load_tables(place.head);
    }
    copy_tile(0, 0);
    gpu::async_wait<1>();
    gpu::sync_threads();  // the output and its gradients are there

    // Statistics of the lane's two rows. Σ_j p_ij dp_ij is the gradient of the output times the output, multiplied as
    // the gradients of weights are: where a row sees one key alone, it is that to the last bit.
    Accumulator diagonal[kSlabs][2];
    Product::multiply(grads + warp_row * TileRows::kStride, queries + warp_row * TileRows::kStride, diagonal);
    float high[2], low[2], delta[2];
    BBQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Accumulator& of_half = diagonal[0][half];
      delta[half] = gpu::shuffle(g % 2 == 0 ? of_half.v[2 * half] : of_half.v[2 * half + 1], 4 * g + g / 2);
      high[half] = gpu::kInfinity;
      low[half] = 0;
      const int row = 8 * half + g;
      if (warp_row + row >= live) continue;
      const int64_t index = row_index(p, s, place.head, first_row + row);
      const double logsumexp = params.logsumexp[index];
      if (logsumexp != -double{gpu::kInfinity}) {
        const double in_units = logsumexp / Weight<T>::kLog;
        high[half] = static_cast<float>(in_units);
        low[half] = static_cast<float>(in_units - double{high[half]});
      }
      if (t == 0 && column_part == 0) {
        gpu::store4(params.statistics + 4 * index, Statistics{{high[half], low[half], delta[half], 0.0f}});
      }
    }
    if (!params.grad_query.data) return;
    if (columns > 0) {
      gpu::sync_threads();  // nobody reads the output any more
      copy_own(queries, params.query);
      gpu::async_commit();
    }

    Accumulator sums[kSlabs][kColumnGroups];
    BBQ_UNROLL
    for (int n = 0; n < kColumnGroups; ++n) sums[0][n] = {};
    const Shared<int> marks = gpu::shared_at<int>(plan.marks);  // as in the forward, of keys
    for (int d = gpu::thread_index(); d < kWidth; d += gpu::block_threads()) marks[d] = s.columns;
    bool spoiled = false;
    int stage = 0;
    for (int first = 0; first < columns; first += kTile, stage ^= stages - 1) {
      gpu::async_wait<0>();
      gpu::sync_threads();  // the tile is there for all, and nobody reads the one before any more
      if (stages == 2) copy_tile(first + kTile, stage ^ 1);
      const Shared<T> key = keys + stage * kTile * TileRows::kStride;
      const int count = least(kTile, columns - first);
      terms.fill_tiles(s.query_token + place.first, live, s.key_token + first, count);
      const bool on_diagonal = p.is_causal && seen_by(p, s, place.first) < first + count;
      if (on_diagonal) {
        bool found = false;
        TileRows::clean(key, kTile, [&](int row, int d) {
          found = true;
          gpu::atomic_min(marks + d, first + row);
        });
        spoiled = gpu::sync_threads_or(found) || spoiled;
      }
      BBQ_UNROLL_BY(1)
      for (int part = 0; part < kTile && first + part < warp_columns; part += kOthers) {
        Accumulator scores[kSlabs][kGroups], grad_scores[kSlabs][kGroups];
        Product::multiply(queries + warp_row * TileRows::kStride, key + part * TileRows::kStride, scores);
        terms.add_biases(stage, warp_row, part, scores);
        Product::multiply(grads + warp_row * TileRows::kStride, values + (stage * kTile + part) * TileRows::kStride,
                          grad_scores);
        const auto seen = [&](int row) { return seen_by(p, s, first_row + row) - (first + part); };
        BBQ_UNROLL
        for (int n = 0; n < kGroups; ++n) {
          BBQ_UNROLL
          for (int i = 0; i < 4; ++i) {
            const float weight = Weight<T>::of(scores[0][n].v[i], high[i / 2], low[i / 2]);
            grad_scores[0][n].v[i] = weight * (grad_scores[0][n].v[i] - delta[i / 2]);
          }
        }
        if (first + part + kOthers > seen_by(p, s, first_row)) {
          BBQ_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int limit = seen(8 * half + g) - 2 * t;
            BBQ_UNROLL
            for (int n = 0; n < kGroups; ++n) {
              BBQ_UNROLL
              for (int i = 0; i < 2; ++i) {
                float& grad = grad_scores[0][n].v[2 * half + i];
                grad = 8 * n + i < limit ? grad : 0.0f;
              }
            }
          }
        }
        Product::add(grad_scores, key + part * TileRows::kStride + first_column, sums);
      }
      if (stages == 1) {
        gpu::sync_threads();  // nobody reads the only tile any more
        copy_tile(first + kTile, 0);
      }
    }
    if (spoiled) {
      Product::spoil(sums, marks + first_column,
                     [&](int, int half, int key) { return key < seen_by(p, s, first_row + 8 * half + g); });
    }

    gpu::sync_warp();  // the warp's own queries are not read any more: the gradients go out through them
    Product::put(sums, queries + warp_row * TileRows::kStride, [&](int, int half, float& factor) {
      factor = p.scale;
      return high[half] != gpu::kInfinity;
    });
    gpu::sync_warp();
    TileRows::template store<kColumns>(
        queries + warp_row * TileRows::kStride, params.grad_query,
        params.grad_query.at(s.batch, place.head, s.query_start + first_row) + first_column, p.width - first_column,
        least(kWarpRows, s.all_rows - first_row));
  }
};

// Of the blocks that share keys, the first sums up the gradients of the tables.
template <class T, int kWidth>
struct AttentionKeys {
  static constexpr int kThreads = kMaxWarps * gpu::kLanes, kBlocks = 1;
  static constexpr int kSlabs = 1, kTile = Sizes<T, kWidth>::kKeysTile, kOthers = Sizes<T, kWidth>::kKeysAtOnce,
                       kColumns = Sizes<T, kWidth>::kKeysColumns;
  static constexpr int kGroups = kOthers / 8, kColumnGroups = kColumns / 8, kWarpRows = 16 * kSlabs;
  static constexpr int kParts = kWidth / kColumns, kLeastStages = Sizes<T, kWidth>::kLeastStages;
  using TileRows = Rows<T, kWidth>;
  using Product = Products<T, kWidth, kSlabs>;
  using Channels = Terms<kSlabs, kTile, kOthers, kWidth <= 128>;

  struct Params {
    Problem problem;
    HeadRows<const T> query, key, value, grad;
    Global<const float> statistics;
    HeadRows<T> grad_key, grad_value;  // each may be missing
    Global<float> table_sums;          // (sequences, heads, tiles, entries), or missing
    int64_t tiles, blocks;
    int stages;
  };

  struct Plan {
    int keys, values, queries, grads, statistics, marks, sums, terms;
    BBQ_HOST_DEVICE Plan(int warps, int stages, int entries) {
      constexpr int kRowBytes = TileRows::kStride * static_cast<int>(sizeof(T));
      keys = 0;
      values = keys + warps * kWarpRows * kRowBytes;
      queries = values + warps * kWarpRows * kRowBytes;
      grads = queries + stages * kTile * kRowBytes;
      statistics = grads + stages * kTile * kRowBytes;
      marks = statistics + stages * kTile * static_cast<int>(sizeof(Statistics));
      sums = marks + 2 * kWidth * 4;
      terms = sums + warps * entries * 8;
      terms = (terms + 15) / 16 * 16;
    }
  };
  static BBQ_HOST_DEVICE int shared_bytes(int warps, int stages, const Problem& p) {
    return
        typename Channels::Plan(Plan(warps, stages, p.entries).terms, warps * kWarpRows, p.channel_count, p.tile_count)
            .bytes;
  }

  // Adds gradients of scores to the warp's sums of one channel's table, kMany buckets at a time.
  template <int kMany>
  static BBQ_DEVICE void add_to_table(const uint32_t (&buckets)[kSlabs][kGroups],
                                      const Accumulator (&grad_scores)[kSlabs][kGroups], int first, int count,
                                      Shared<double> table) {
    float sums[kMany];
    BBQ_UNROLL
    for (int b = 0; b < kMany; ++b) sums[b] = 0;
    BBQ_UNROLL
    for (int m = 0; m < kSlabs; ++m) {
      BBQ_UNROLL
      for (int n = 0; n < kGroups; ++n) {
        BBQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int bucket = static_cast<int>(buckets[m][n] >> (8 * i) & 255) - first;
          BBQ_UNROLL
          for (int b = 0; b < kMany; ++b) {
            if (bucket == b) sums[b] += grad_scores[m][n].v[i];
          }
        }
      }
    }
    add_sums(sums, first, count, table);
  }

  // Adds the lanes' sums of kMany buckets to those of the warp.
  template <int kMany>
  static BBQ_DEVICE void add_sums(float (&sums)[kMany], int first, int count, Shared<double> table) {
    const int lane = gpu::lane_index();
    BBQ_UNROLL
    for (int half = kMany / 2; half > 0; half /= 2) {  // lanes that differ in this bit share the sums out
      const bool upper = lane & half;
      BBQ_UNROLL
      for (int b = 0; b < half; ++b) {
        const float other = gpu::shuffle_xor(upper ? sums[b] : sums[b + half], half);
        sums[b] = (upper ? sums[b + half] : sums[b]) + other;
      }
    }
    float mine = sums[0];  // of bucket lane % kMany
    BBQ_UNROLL
    for (int mask = kMany; mask < gpu::kLanes; mask *= 2) mine += gpu::shuffle_xor(mine, mask);
    if (lane < kMany && first + lane < count) table[first + lane] += double{mine};
  }

  static BBQ_DEVICE void run(const Params& params) {
    const Problem& p = params.problem;
    const auto clear = [&](int64_t head, int64_t token) {
      clear_token(params.grad_key, head, token, p.width);
      clear_token(params.grad_value, head, token, p.width);
    };
    if (gpu::block_index() >= params.blocks) {
      for_uncovered_tokens(p, gpu::block_index() - params.blocks, clear);
      return;
    }
    const int warps = gpu::block_threads() / gpu::kLanes, lane = gpu::lane_index(), g = lane / 4, t = lane % 4;
    const int64_t unit = gpu::block_index() / kParts;
    const int column_part = static_cast<int>(gpu::block_index() % kParts), first_column = column_part * kColumns;
    const Place place = place_of(p, unit, params.tiles, warps * kWarpRows);
    const Sequence s = sequence_at(p.layout, place.sequence);
    if (place.tile == 0 && column_part == 0) for_tokens_beyond(s, [&](int64_t token) { clear(place.head, token); });

    const int stages = kLeastStages == 2 ? 2 : params.stages;
    const Plan plan(warps, stages, p.entries);
    const Shared<T> keys = gpu::shared_at<T>(plan.keys), values = gpu::shared_at<T>(plan.values),
                    queries = gpu::shared_at<T>(plan.queries), grads = gpu::shared_at<T>(plan.grads);
    const Shared<float> statistics = gpu::shared_at<float>(plan.statistics);
    const Channels terms{p, {plan.terms, warps * kWarpRows, p.channel_count, p.tile_count}, false};
    const bool sum_tables = params.table_sums && column_part == 0;
    const Shared<double> table_sums = gpu::shared_at<double>(plan.sums) + gpu::warp_index() * p.entries;
    if (sum_tables) {
      for (int e = lane; e < p.entries; e += gpu::kLanes) table_sums[e] = 0.0;
    }
    const bool need_scores = params.grad_key.data || sum_tables;

    const int live = least(s.columns - place.first, warps * kWarpRows);  // keys of the block; none if not above 0
    const int first_seeing = p.is_causal ? most(0, least(place.first - s.shift, s.rows)) : 0;
    const int begin = live > 0 ? first_seeing : s.rows;
    const int warp_row = gpu::warp_index() * kWarpRows, first_key = place.first + warp_row;

    const auto copy_tile = [&](int first, int stage) {
      if (first < s.rows) {
        const int count = least(kTile, s.rows - first), at = stage * kTile * TileRows::kStride;
        const int64_t token = s.query_start + first;
        TileRows::copy(queries + at, params.query, params.query.at(s.batch, place.head, token), p.width, count, kTile);
        TileRows::copy(grads + at, params.grad, params.grad.at(s.batch, place.head, token), p.width, count, kTile);
        terms.copy_others(s.query_token + first, count, stage);
        for (int i = gpu::thread_index(); i < kTile; i += gpu::block_threads()) {
          const int64_t index = row_index(p, s, place.head, first + (i < count ? i : 0));
          gpu::async_copy16(statistics + 4 * (stage * kTile + i), params.statistics + 4 * index, i < count ? 16 : 0);
        }
      }
      gpu::async_commit();
    };

    Accumulator key_sums[kSlabs][kColumnGroups], value_sums[kSlabs][kColumnGroups];
    BBQ_UNROLL
    for (int n = 0; n < kColumnGroups; ++n) key_sums[0][n] = value_sums[0][n] = {};
    if (begin < s.rows) {
      TileRows::copy(keys, params.key, params.key.at(s.batch, place.head, s.key_start + place.first), p.width, live,
                     warps * kWarpRows);
      TileRows::copy(values, params.value, params.value.at(s.batch, place.head, s.key_start + place.first), p.width,
                     live, warps * kWarpRows);
      terms.copy_own(s.key_token + place.first, live);
      terms.load_tables(place.head);
      copy_tile(begin, 0);
    }
    // As in the forward, of queries and of gradients of the output: the last of their rows.
    const Shared<int> marks = gpu::shared_at<int>(plan.marks);
    for (int d = gpu::thread_index(); d < 2 * kWidth; d += gpu::block_threads()) marks[d] = -1;
    bool spoiled = false;
    int stage = 0;
    for (int first = begin; first < s.rows; first += kTile, stage ^= stages - 1) {
      gpu::async_wait<0>();
      bool attends_to_nothing = false;  // a row whose statistics this thread copied
      for (int i = gpu::thread_index(); i < kTile; i += gpu::block_threads()) {
        attends_to_nothing |= statistics[4 * (stage * kTile + i)] == gpu::kInfinity;
      }
      // The tile is there for all, and nobody reads the one before any more.
      const bool some_dead = gpu::sync_threads_or(attends_to_nothing);
      if (stages == 2) copy_tile(first + kTile, stage ^ 1);
      const Shared<T> query = queries + stage * kTile * TileRows::kStride;
      const Shared<T> grad = grads + stage * kTile * TileRows::kStride;
      const Shared<const float> known = statistics + 4 * stage * kTile;
      const int count = least(kTile, s.rows - first);
      terms.fill_tiles(s.key_token + place.first, live, s.query_token + first, count);
      const bool on_diagonal = p.is_causal && seen_by(p, s, first) < place.first + live;
      if (on_diagonal || some_dead) {
        bool found = false;
        const auto clean = [&](Shared<T> tile, Shared<int> of_columns) {
          TileRows::clean(tile, kTile, [&](int row, int d) {
            if (known[4 * row] == gpu::kInfinity) return;  // attends to nothing: nobody sees it
            found = true;
            gpu::atomic_max(of_columns + d, first + row);
          });
        };
        clean(query, marks);
        clean(grad, marks + kWidth);
        spoiled = gpu::sync_threads_or(found) || spoiled;
      }
      BBQ_UNROLL_BY(1)
      for (int part = 0; part < count && warp_row < live; part += kOthers) {
        const int first_row = first + part, rows = least(kOthers, count - part), at = part * TileRows::kStride;
        if (seen_by(p, s, first_row + rows - 1) <= first_key) continue;
        const Shared<const float> row_statistics = known + 4 * part;
        Accumulator weights[kSlabs][kGroups], grad_scores[kSlabs][kGroups];
        Product::multiply(keys + warp_row * TileRows::kStride, query + at, weights);
        terms.add_biases(stage, warp_row, part, weights);
        if (need_scores) Product::multiply(values + warp_row * TileRows::kStride, grad + at, grad_scores);
        BBQ_UNROLL
        for (int n = 0; n < kGroups; ++n) {
          BBQ_UNROLL
          for (int x = 0; x < 2; ++x) {
            const Statistics row = gpu::load4(row_statistics + 4 * (8 * n + 2 * t + x));
            BBQ_UNROLL
            for (int half = 0; half < 2; ++half) {
              float& weight = weights[0][n].v[2 * half + x];
              weight = Weight<T>::of(weight, row.v[0], row.v[1]);
              if (need_scores) {
                float& grad_score = grad_scores[0][n].v[2 * half + x];
                grad_score = weight * (grad_score - row.v[2]);
              }
            }
          }
        }
        // Whether a row of the warp and a step of its sums meet.
        const auto sees = [&](int row, int step) {
          return step < rows && first_key + row < seen_by(p, s, first_row + step) &&
                 row_statistics[4 * step] != gpu::kInfinity;
        };
        if (some_dead || rows < kOthers || first_key + kWarpRows > seen_by(p, s, first_row)) {
          BBQ_UNROLL
          for (int n = 0; n < kGroups; ++n) {
            BBQ_UNROLL
            for (int i = 0; i < 4; ++i) {
              const bool seen = sees(8 * (i / 2) + g, 8 * n + 2 * t + i % 2);
              weights[0][n].v[i] = seen ? weights[0][n].v[i] : 0.0f;
              if (need_scores) grad_scores[0][n].v[i] = seen ? grad_scores[0][n].v[i] : 0.0f;
            }
          }
        }
        if (sum_tables) {
          for (int c = 0; c < p.channel_count; ++c) {
            const Shared<double> table = table_sums + p.channels[c].entry;
            const int size = p.channels[c].buckets;
            if (Channels::is_nested(p.channels[c])) {  // sums of what agrees up to a level, or further
              terms.with_nested(c, stage, warp_row, part, [&](auto levels, auto word, auto own, auto other) {
                constexpr int kLevels = decltype(levels)::value;
                using Word = decltype(word);
                float sums[kLevels < 4 ? 4 : 8] = {};
                Word mask[kLevels];
                terms.read_masks(c, mask);
                Channels::template for_pairs<Word>(own, other, [&](int m, int n, int i, Word a, Word b) {
                  const float grad = grad_scores[m][n].v[i];
                  sums[0] += grad;
                  BBQ_UNROLL
                  for (int l = 0; l < kLevels; ++l) {
                    if (((a ^ b) & mask[l]) == 0) sums[l + 1] += grad;
                  }
                });
                add_sums(sums, 0, size, table);
              });
              continue;
            }
            uint32_t buckets[kSlabs][kGroups] = {};
            terms.for_buckets(c, stage, warp_row, part, [&](int m, int n, int i, int bucket) {
              buckets[m][n] |= static_cast<uint32_t>(bucket) << (8 * i);
            });
            if (size <= 4) {
              add_to_table<4>(buckets, grad_scores, 0, size, table);
            } else {
              for (int bucket = 0; bucket < size; bucket += 8) {
                add_to_table<8>(buckets, grad_scores, bucket, size, table);
              }
            }
          }
        }
        if (params.grad_value.data) Product::add(weights, grad + at + first_column, value_sums);
        if (params.grad_key.data) Product::add(grad_scores, query + at + first_column, key_sums);
      }
      if (stages == 1) {
        gpu::sync_threads();  // as in AttentionQueries
        copy_tile(first + kTile, 0);
      }
    }
    if (spoiled) {
      const auto sees = [&](int, int half, int row) {
        return row >= 0 && first_key + 8 * half + g < seen_by(p, s, row);
      };
      Product::spoil(key_sums, marks + first_column, sees);
      Product::spoil(value_sums, marks + kWidth + first_column, sees);
    }

    if (sum_tables) {
      gpu::sync_threads();
      const Shared<double> all = gpu::shared_at<double>(plan.sums);
      const int64_t at = ((place.sequence * p.heads + place.head) * params.tiles + place.tile) * p.entries;
      for (int e = gpu::thread_index(); e < p.entries; e += gpu::block_threads()) {
        const auto sum_of = [&](int entry) {
          double sum = 0;
          for (int warp = 0; warp < warps; ++warp) sum += all[warp * p.entries + entry];
          return sum;
        };
        const Channel& channel = p.channels[channel_of(p, e)];
        const bool less = Channels::is_nested(channel) && e + 1 < channel.entry + channel.buckets;
        params.table_sums[at + e] = static_cast<float>(less ? sum_of(e) - sum_of(e + 1) : sum_of(e));
      }
    }
    const int count = least(kWarpRows, s.all_columns - first_key);
    if (count <= 0) return;
    gpu::sync_warp();  // the warp's own keys and values are not read any more: gradients go out through them
    const auto store = [&](const Accumulator(&sums)[kSlabs][kColumnGroups], Shared<T> tile, const HeadRows<T>& target,
                           float factor) {
      if (!target.data) return;
      tile = tile + warp_row * TileRows::kStride;
      Product::put(sums, tile, [&](int, int half, float& factor_of_row) {
        factor_of_row = factor;
        return warp_row + 8 * half + g < live;
      });
      gpu::sync_warp();
      TileRows::template store<kColumns>(tile, target,
                                         target.at(s.batch, place.head, s.key_start + first_key) + first_column,
                                         p.width - first_column, count);
    };
    store(key_sums, keys, params.grad_key, p.scale);
    store(value_sums, values, params.grad_value, 1.0f);
  }
};

// Adds up what the blocks of AttentionKeys left of each entry of each head, a warp to an entry.
struct AddTableGradients {
  static constexpr int kThreads = 256, kBlocks = 4;
  struct Params {
    Problem problem;
    Global<const float> table_sums;
    Global<float> grad_biases;
    int64_t tiles;
  };
  static BBQ_DEVICE void run(const Params& params) {
    const Problem& p = params.problem;
    const int64_t warp = gpu::block_index() * (kThreads / gpu::kLanes) + gpu::warp_index();
    if (warp >= int64_t{p.heads} * p.entries) return;
    const int64_t head = warp / p.entries;
    const int entry = static_cast<int>(warp % p.entries);
    double sum = 0;
    for (int64_t unit = gpu::lane_index(); unit < p.layout.count * params.tiles; unit += gpu::kLanes) {
      const int64_t sequence = unit / params.tiles, tile = unit % params.tiles;
      sum += double{params.table_sums[((sequence * p.heads + head) * params.tiles + tile) * p.entries + entry]};
    }
    for (int mask = gpu::kLanes / 2; mask > 0; mask /= 2) sum += gpu::shuffle_xor(sum, mask);
    if (gpu::lane_index() != 0) return;
    const Channel& channel = p.channels[channel_of(p, entry)];
    params.grad_biases[channel.gradient + head * channel.buckets + entry - channel.entry] = static_cast<float>(sum);
  }
};

// Below: which kernels run, in which sizes, on any `Queue` (see residual_quantization.cuh).

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every row starts at a multiple of 16 bytes.
template <class T>
bool is_aligned(uintptr_t address, int64_t batch, int64_t head, int64_t token) {
  const auto whole = [](int64_t stride) { return stride % kPiece<T> == 0; };
  return address % 16 == 0 && whole(batch) && whole(head) && whole(token);
}

// A term as it comes: what its channels compare, in contiguous memory.
struct TermData {
  Kind kind;
  int64_t channels, buckets, width, bits;  // width: of what is compared, in one channel
  Global<const int64_t> query = nullptr, key = nullptr;
  Global<const float> query_vectors = nullptr, key_vectors = nullptr, boundaries = nullptr;
};

// Adds the channels of a term. Tables of terms lie one after the other, (channels, heads, buckets) each.
inline void add_channels(Problem& p, const TermData& term, Global<const float> tables) {
  int64_t offset = 0;  // of the term's tables
  if (p.channel_count > 0) {
    const Channel& last = p.channels[p.channel_count - 1];
    offset = last.gradient + int64_t{p.heads} * last.buckets;
  }
  for (int64_t m = 0; m < term.channels; ++m) {
    if (p.channel_count == kMaxChannels) throw std::invalid_argument("terms: expected at most 8 channels together");
    Channel& c = p.channels[p.channel_count++];
    c.kind = term.kind;
    c.buckets = static_cast<int>(term.buckets);
    c.bits = static_cast<int>(term.bits);
    c.width = term.width;
    c.stride = term.channels * term.width;
    c.form = term.kind == Kind::kGap                ? Form::kPositions
             : term.bits == 0                       ? Form::kTile
             : term.bits * (term.buckets - 1) <= 32 ? Form::kNarrowWords
                                                    : Form::kWords;
    const int64_t first = m * term.width;
    c.query = term.query ? term.query + first : term.query;
    c.key = term.key ? term.key + first : term.key;
    c.query_vectors = term.query_vectors ? term.query_vectors + first : term.query_vectors;
    c.key_vectors = term.key_vectors ? term.key_vectors + first : term.key_vectors;
    c.boundaries = term.boundaries;
    c.gradient = offset + m * p.heads * term.buckets;
    c.tables = tables + c.gradient;
    c.entry = p.entries;
    p.entries += c.buckets;
    c.tile = c.form == Form::kTile ? p.tile_count++ : 0;
  }
}

template <class T>
struct ForwardArguments {
  Problem problem;
  HeadRows<const T> query, key, value;
  HeadRows<T> output;
  Global<double> logsumexp;
};

template <class T>
struct BackwardArguments {
  Problem problem;
  HeadRows<const T> query, key, value, output, grad;
  Global<const double> logsumexp;
  HeadRows<T> grad_query, grad_key, grad_value;  // each may be missing
  Global<float> grad_biases;                     // may be missing
};

struct Grid {
  int warps, stages;
  int64_t tiles, blocks, tail;  // tail: blocks for tokens that no sequence covers
};

// A block of all `tokens` of a sequence if its warps can be so many, else one of four warps; fewer where the machine
// has less shared memory, and where it does not hold one, fewer tiles at once.
template <class Kernel>
Grid grid_of(const Machine& machine, const Problem& p, int tokens) {
  const int64_t needed = divide_up(tokens, Kernel::kWarpRows);
  const int most_warps = needed <= 1 ? 1 : needed <= kMaxWarps ? static_cast<int>(needed) : 4;
  int warps = most_warps, stages = 2;
  while (Kernel::shared_bytes(warps, stages, p) > machine.shared_per_block) {
    if (--warps > 0) continue;
    warps = most_warps;
    if (--stages >= Kernel::kLeastStages) continue;
    throw std::invalid_argument(
        "query: this device has too little shared memory for the head size and the terms; "
        "choose impl='triton' or 'reference'");
  }
  Grid grid{warps, stages, divide_up(tokens, int64_t{warps} * Kernel::kWarpRows), 0, 0};
  if (grid.tiles == 0) grid.tiles = 1;
  grid.blocks = p.layout.count * p.heads * grid.tiles;
  if (p.layout.starts) grid.tail = p.heads * divide_up(p.layout.tokens, kTokensToClear);
  return grid;
}

template <class Kernel, class Queue>
void launch(Queue& queue, const Grid& grid, const typename Kernel::Params& params) {
  if (params.blocks + grid.tail == 0) return;
  queue.template run<Kernel>(params.blocks + grid.tail, 1, grid.warps * gpu::kLanes,
                             Kernel::shared_bytes(grid.warps, grid.stages, params.problem), params);
}

// Calls f of the least of the widths that kernels are made for.
template <class F>
void with_width(int width, const F& f) {
  if (width <= 32) {
    f(std::integral_constant<int, 32>{});
  } else if (width <= 64) {
    f(std::integral_constant<int, 64>{});
  } else if (width <= 128) {
    f(std::integral_constant<int, 128>{});
  } else {
    f(std::integral_constant<int, 256>{});
  }
}

template <class T, class Queue>
void forward(Queue& queue, const ForwardArguments<T>& a) {
  with_width(a.problem.width, [&](auto width) {
    using Kernel = AttentionForward<T, decltype(width)::value>;
    const Grid grid = grid_of<Kernel>(queue.machine(), a.problem, a.problem.layout.rows);
    launch<Kernel>(
        queue, grid,
        {a.problem, a.query, a.key, a.value, a.output, a.logsumexp, grid.tiles, grid.blocks * Kernel::kParts});
  });
}

template <class T, class Queue>
void backward(Queue& queue, const BackwardArguments<T>& a) {
  const Problem& p = a.problem;
  const bool need_keys = a.grad_key.data || a.grad_value.data || a.grad_biases;
  if (!need_keys && !a.grad_query.data) return;
  const int64_t rows = p.layout.starts ? p.layout.tokens : p.layout.count * p.layout.rows;
  const auto statistics = queue.template scratch<float>(4 * p.heads * rows);
  with_width(p.width, [&](auto width) {
    {
      using Kernel = AttentionQueries<T, decltype(width)::value>;
      const Grid grid = grid_of<Kernel>(queue.machine(), p, p.layout.rows);
      launch<Kernel>(queue, grid,
                     {p, a.query, a.key, a.value, a.output, a.grad, a.logsumexp, a.grad_query, statistics, grid.tiles,
                      grid.blocks * Kernel::kParts, grid.stages});
    }
    if (!need_keys) return;
    using Kernel = AttentionKeys<T, decltype(width)::value>;
    const Grid grid = grid_of<Kernel>(queue.machine(), p, p.layout.columns);
    // Without a sequence as well: there are no sums then, and no memory for them, but gradients to be set to zero.
    const bool sum_tables = a.grad_biases && p.heads > 0 && p.entries > 0;
    Global<float> table_sums = nullptr;
    if (sum_tables) table_sums = queue.template scratch<float>(grid.blocks * p.entries);
    launch<Kernel>(queue, grid,
                   {p, a.query, a.key, a.value, a.grad, statistics, a.grad_key, a.grad_value, table_sums, grid.tiles,
                    grid.blocks * Kernel::kParts, grid.stages});
    if (sum_tables) {
      queue.template run<AddTableGradients>(divide_up(p.heads * p.entries, AddTableGradients::kThreads / gpu::kLanes),
                                            1, AddTableGradients::kThreads, 0,
                                            {p, table_sums, a.grad_biases, grid.tiles});
    }
  });
}

}  // namespace bbq::attention
