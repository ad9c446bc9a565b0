// Residual quantization on the GPU: kernel bodies, and the sequence in which they run. Free of torch.
//
// The search (`Encode`) lets tensor cores score all codewords in float16 and keeps, per row, those that its error
// bound cannot rule out; these are scored again in float32. The bound covers the float32 rounding too, so the code
// that comes out is the one that a float32 search of all codewords finds, bit for bit: tiles, neighbours and scales
// only decide how much is scored twice. README.md derives the bound.
//
// Sums over rows that share a codeword (`SumRows`) have one owner per element and a fixed order, without atomics.
#pragma once

#include "cuda/device.cuh"

namespace bbq {

using gpu::Global;
using gpu::Shared;

struct RowShape {
  int64_t rows, width;  // width: D
  int levels;
  int64_t size;  // K
};

// While |r|² + |c|² stays below this, no partial sum of r·c overflows, and neither does the score.
constexpr float kSafeSquare = 8.5e37f;
constexpr int64_t kMaxTensorSize =
    1 << 16;                    // codewords: their index fits in the lower bits of a score, and in a candidate
constexpr int64_t kSteps = 32;  // products that a lane adds up in one go

// What the search needs to know of a level's codewords.
struct Level {
  float largest;  // max ‖c‖, rounded up
  int exponent;   // multiplied by 2^exponent, their largest element is in [2^13, 2^14): float16 without overflow
  int finite;
};

BBQ_DEVICE float power_of_two(int exponent) { return gpu::bits_float(static_cast<uint32_t>(exponent + 127) << 23); }

// The exponent that moves `peak` to [2^13, 2^14), as far as the powers of two of float32 reach.
BBQ_DEVICE int exponent_for(float peak) {
  if (!(peak > 0)) return 0;
  const int exponent = 13 + 127 - static_cast<int>(gpu::float_bits(peak) >> 23);
  return exponent < 126 ? exponent : 126;
}

BBQ_DEVICE bool is_finite(float value) { return fabsf(value) <= 3.402823466e38f; }

// Rows of any of the three dtypes: kernels are compiled once, and branch where they load and store.
enum class Float { kFloat32, kBFloat16, kHalf };
template <class Byte>
struct AnyRows {
  Global<Byte> data;
  Float type;
  int64_t width;

  BBQ_DEVICE bool aligned() const {  // so that four elements of a row move at once
    return width % 4 == 0 && gpu::address_of(data) % (type == Float::kFloat32 ? 16 : 8) == 0;
  }
};
using InputRows = AnyRows<const unsigned char>;
using OutputRows = AnyRows<unsigned char>;

template <class F>
BBQ_DEVICE void with_type(Float type, const F& f) {
  if (type == Float::kFloat32) {
    f(float{});
  } else if (type == Float::kBFloat16) {
    f(BFloat16{});
  } else {
    f(Half{});
  }
}

// Four elements of a row as float32, zeros past its end.
template <class T>
BBQ_DEVICE void load_four(Global<const T> row, int64_t first, int64_t width, bool aligned, float (&v)[4]) {
  if (aligned && first + 4 <= width) {
    const gpu::Four<T> four = gpu::load4(row + first);
    BBQ_UNROLL
    for (int i = 0; i < 4; ++i) v[i] = to_float(four.v[i]);
  } else {
    BBQ_UNROLL
    for (int i = 0; i < 4; ++i) v[i] = first + i < width ? to_float(T(row[first + i])) : 0.0f;
  }
}
BBQ_DEVICE void load_four(const InputRows& rows, int64_t row, int64_t first, bool aligned, float (&v)[4]) {
  with_type(rows.type, [&](auto type) {
    using T = decltype(type);
    load_four<T>(gpu::cast<const T>(rows.data) + row * rows.width, first, rows.width, aligned, v);
  });
}
BBQ_DEVICE void store_four(const OutputRows& rows, int64_t row, int64_t first, bool aligned, const float (&v)[4]) {
  with_type(rows.type, [&](auto type) {
    using T = decltype(type);
    const Global<T> target = gpu::cast<T>(rows.data) + row * rows.width + first;
    if (aligned && first + 4 <= rows.width) {
      gpu::Four<T> four;
      BBQ_UNROLL
      for (int i = 0; i < 4; ++i) four.v[i] = from_float<T>(v[i]);
      gpu::store4(target, four);
    } else {
      BBQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (first + i < rows.width) target[i] = from_float<T>(v[i]);
      }
    }
  });
}
BBQ_DEVICE float load_one(const InputRows& rows, int64_t i) {
  float value = 0;
  with_type(rows.type, [&](auto type) {
    using T = decltype(type);
    value = to_float(T(gpu::cast<const T>(rows.data)[i]));
  });
  return value;
}
BBQ_DEVICE void store_one(const OutputRows& rows, int64_t i, float value) {
  with_type(rows.type, [&](auto type) {
    using T = decltype(type);
    gpu::cast<T>(rows.data)[i] = from_float<T>(value);
  });
}

// One warp per codeword: |c|²/2 as a score wants it, ‖c‖ rounded up, and the largest element.
struct MeasureCodewords {
  static constexpr int kThreads = 256, kBlocks = 4;
  struct Params {
    Global<const float> codebooks;
    Global<float> half_squares, norms, peaks;  // (L, K)
    int64_t words, width;
  };
  static BBQ_DEVICE void run(const Params& p) {
    const int lane = gpu::lane_index();
    const int64_t word = gpu::block_index() * (kThreads / gpu::kLanes) + gpu::warp_index();
    double square = 0;
    float peak = 0;
    bool finite = true;
    if (word < p.words) {
      for (int64_t d = lane; d < p.width; d += gpu::kLanes) {
        const float value = p.codebooks[word * p.width + d];
        square += double(value) * value;
        peak = fmaxf(peak, fabsf(value));
        finite = finite && is_finite(value);
      }
    }
    for (int mask = gpu::kLanes / 2; mask > 0; mask /= 2) square += gpu::shuffle_xor(square, mask);
    peak = gpu::max_over<gpu::kLanes>(peak);
    finite = gpu::ballot(finite) == 0xffffffff;
    if (lane == 0 && word < p.words) {
      p.half_squares[word] = static_cast<float>(0.5 * square);
      p.norms[word] = finite ? static_cast<float>(sqrt(square)) * (1 + 0x1p-20f) : gpu::quiet_nan();
      p.peaks[word] = peak;
    }
  }
};

// One block per level: the maxima of its codewords.
struct MeasureLevels {
  static constexpr int kThreads = 256, kBlocks = 4;
  static constexpr int kSharedBytes = 3 * kThreads * 4;
  struct Params {
    Global<const float> norms, peaks;
    Global<Level> levels;
    int64_t size;
  };
  static BBQ_DEVICE void run(const Params& p) {
    const Shared<float> norms = gpu::shared_at<float>(0);
    const Shared<float> peaks = gpu::shared_at<float>(kThreads * 4);
    const Shared<int> finites = gpu::shared_at<int>(kThreads * 8);
    const int thread = gpu::thread_index();
    const int64_t first = gpu::block_index() * p.size;
    float norm = 0, peak = 0;
    bool finite = true;
    for (int64_t k = thread; k < p.size; k += kThreads) {
      const float value = p.norms[first + k];
      finite = finite && value == value;
      norm = fmaxf(norm, value);
      peak = fmaxf(peak, p.peaks[first + k]);
    }
    norms[thread] = norm;
    peaks[thread] = peak;
    finites[thread] = finite;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      gpu::sync_threads();
      if (thread < half) {
        norms[thread] = fmaxf(norms[thread], norms[thread + half]);
        peaks[thread] = fmaxf(peaks[thread], peaks[thread + half]);
        finites[thread] = finites[thread] & finites[thread + half];
      }
    }
    if (thread == 0) {
      Level level;
      level.largest = norms[0];
      level.finite = finites[0];
      level.exponent = level.finite ? exponent_for(peaks[0]) : 0;
      p.levels[gpu::block_index()] = level;
    }
  }
};

// Codebooks as Encode reads them: rows of `padded_width` elements and `padded_size` codewords, zeros beyond the real
// ones; in float32, and scaled and rounded to float16 with |c|²/2 scaled alike (huge for codewords that are padding).
struct ConvertCodebooks {
  static constexpr int kThreads = 256, kBlocks = 4;
  static constexpr float kNever = 1e38f;
  struct Params {
    Global<const float> codebooks, half_squares;
    Global<const Level> levels;
    Global<float> words;
    Global<uint16_t> half_words;
    Global<float> scaled_half_squares;
    int64_t size, width, padded_size, padded_width;
  };
  // The grid's x covers the padded codewords of a level, its y the levels; a warp takes one codeword.
  static BBQ_DEVICE void run(const Params& p) {
    const int lane = gpu::lane_index();
    const int64_t level = gpu::block_index_y();
    const int64_t k = gpu::block_index() * (kThreads / gpu::kLanes) + gpu::warp_index();
    if (k >= p.padded_size) return;
    const Level measured = p.levels[level];
    const float scale = power_of_two(measured.exponent);
    const int64_t target = (level * p.padded_size + k) * p.padded_width;
    for (int64_t d = lane; d < p.padded_width; d += gpu::kLanes) {
      float value = 0;
      if (k < p.size && d < p.width) value = p.codebooks[(level * p.size + k) * p.width + d];
      p.words[target + d] = value;
      p.half_words[target + d] = from_float<Half>(value * scale).bits;
    }
    if (lane == 0) {
      const float scaled = k < p.size ? p.half_squares[level * p.size + k] * scale : kNever;
      p.scaled_half_squares[level * p.padded_size + k] = fminf(scaled, kNever);
    }
  }
};

// The float32 scores |c|²/2 - r·c of one row for kMany codewords, in every lane of the warp. Products are summed in the
// same order whatever the codeword, the row and the caller.
template <int kMany, class Residual, class Word>
BBQ_DEVICE void score_exactly(int64_t width, const Residual& residual, const Word& word,
                              const float (&half_squares)[kMany], float (&scores)[kMany]) {
  float dot[kMany];
  BBQ_UNROLL
  for (int i = 0; i < kMany; ++i) dot[i] = 0;
  const int lane = gpu::lane_index();
  for (int64_t first = 0; first < width; first += kSteps * gpu::kLanes) {
    const int64_t last = first + kSteps * gpu::kLanes < width ? first + kSteps * gpu::kLanes : width;
    float part[kMany];
    BBQ_UNROLL
    for (int i = 0; i < kMany; ++i) part[i] = 0;
    for (int64_t d = first + lane; d < last; d += gpu::kLanes) {
      BBQ_UNROLL
      for (int i = 0; i < kMany; ++i) part[i] = gpu::fused_multiply_add(residual(i, d), word(i, d), part[i]);
    }
    BBQ_UNROLL
    for (int i = 0; i < kMany; ++i) dot[i] = gpu::add(dot[i], part[i]);
  }
  BBQ_UNROLL
  for (int i = 0; i < kMany; ++i) scores[i] = gpu::add(half_squares[i], -gpu::sum_over<gpu::kLanes>(dot[i]));
}

// The nearest codeword by sums of squared differences, which stay finite where a score overflows.
template <class Residual>
BBQ_DEVICE int64_t search_by_distance(int64_t width, int64_t size, const Residual& residual, Global<const float> words,
                                      int64_t word_stride) {
  float best = gpu::kInfinity;
  int64_t code = 0;
  for (int64_t k = 0; k < size; ++k) {
    float distance = 0;
    for (int64_t d = gpu::lane_index(); d < width; d += gpu::kLanes) {
      const float rest = gpu::add(residual(d), -words[k * word_stride + d]);
      distance = gpu::fused_multiply_add(rest, rest, distance);
    }
    distance = gpu::sum_over<gpu::kLanes>(distance);
    if (distance < best) {
      best = distance;
      code = k;
    }
  }
  return code;
}

// Adds up the squares of a warp's 32 rows, one in each lane, NaN if a row is bad.
BBQ_DEVICE double sum_of_squares(float square, bool bad) {
  double sum = bad ? double(gpu::quiet_nan()) : double(square);
  for (int mask = gpu::kLanes / 2; mask > 0; mask /= 2) sum += gpu::shuffle_xor(sum, mask);
  return sum;
}

// Codes, quantized rows and squared rests of rows up to kWidth wide. A warp owns 32 rows: their residuals stay in
// shared memory in float32 over all levels, and in registers in float16 during a level's sweep over the codewords,
// which come in tiles that all warps of the block share, by asynchronous copies.
//
// In a product of 16 rows and 8 codewords, lane 4g + t holds rows g and g + 8 and codewords 2t and 2t + 1. Sweeping two
// such products at a time, a lane meets, for each of its four rows, four classes of codewords (k mod 16), and keeps the
// best and the second best score of each class, with k / 16 in their lowest bits.
template <int kWidth>
struct Encode {
  static constexpr int kThreads = kWidth <= 64 ? 256 : 128;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBlocks = kWidth == 64 || kWidth == 256 ? 1 : 2;  // shared memory holds no second one of 64
#else
  static constexpr int kBlocks = kWidth <= 128 ? 2 : 1;
#endif
  static constexpr int kTile = kWidth <= 128 ? 64 : 32;  // codewords of one copy
  static constexpr int kStages = 2;                      // tiles in shared memory
  static constexpr int kClasses = 16;
  static constexpr int kOpen = -1;                // no code yet: the sweep left several candidates
  static constexpr int kRowStride = kWidth + 8;   // floats; lanes of a product meet no bank twice
  static constexpr int kWordStride = kWidth + 8;  // halves; so do the rows of a matrix load
  static constexpr int kProducts = kWidth / 16;

  struct Params {
    InputRows x;
    Global<const float> words;                // (L, padded K, kWidth)
    Global<const uint16_t> half_words;        // the same in float16, scaled
    Global<const float> half_squares;         // (L, K)
    Global<const float> scaled_half_squares;  // (L, padded K)
    Global<const Level> levels;
    OutputRows quantized;
    Global<int64_t> codes;
    Global<double> losses;  // (blocks, L)
    RowShape shape;
    int64_t padded_size;
    int tiles;       // of one level
    int index_bits;  // bits of the largest k / 16
  };

  // Byte offsets in shared memory, for blocks of `threads` threads.
  struct Plan {
    int residuals, tiles, squares, peaks, bands, bad, found, candidates, losses, codes, bytes;
    BBQ_HOST_DEVICE Plan(int threads, int levels) {
      residuals = 0;
      tiles = residuals + threads * kRowStride * 4;
      squares = tiles + kStages * kTile * kWordStride * 2;
      peaks = squares + kStages * kTile * 4 + threads * 4;
      bands = peaks + threads * 4;
      bad = bands + threads * 4;
      found = bad + threads * 4;
      candidates = found + threads * 4;
      losses = candidates + threads * kClasses * 2;
      codes = losses + threads / gpu::kLanes * levels * 8;
      bytes = codes + threads * levels * 4;
    }
  };

  // The rows of one warp in shared memory.
  struct Rows {
    Shared<float> residuals, squares, peaks, bands;
    Shared<int> bad, found, codes;
    Shared<uint16_t> candidates;  // of each class, 0: none, 1 + 2 k / 16, one more if the second best is one too
  };

  static BBQ_DEVICE void copy_tile(const Params& p, int tile) {
    const Plan plan(gpu::block_threads(), p.shape.levels);
    if (tile < p.tiles * p.shape.levels) {  // tiles of all levels lie one after another
      const int stage = tile % kStages;
      const Shared<uint16_t> words = gpu::shared_at<uint16_t>(plan.tiles) + stage * kTile * kWordStride;
      const Shared<float> squares = gpu::shared_at<float>(plan.squares) + stage * kTile;
      constexpr int kPieces = kWidth / 8;  // of 16 bytes, in one codeword
      for (int i = gpu::thread_index(); i < kTile * kPieces; i += gpu::block_threads()) {
        gpu::async_copy16(words + (i / kPieces) * kWordStride + (i % kPieces) * 8,
                          p.half_words + int64_t{tile} * (kTile * kWidth) + i * 8);
      }
      for (int i = gpu::thread_index(); i < kTile; i += gpu::block_threads()) {
        gpu::async_copy4(squares + i, p.scaled_half_squares + int64_t{tile} * kTile + i);
      }
    }
    gpu::async_commit();  // an empty group too: waits count groups
  }

  // Eight lanes share a row, four rows at a time. f(row, d, v) sees the row's index in the warp and four elements.
  template <class F>
  static BBQ_DEVICE void for_rows(const F& f) {
    const int lane = gpu::lane_index();
    BBQ_UNROLL_BY(2)
    for (int pass = 0; pass < 8; ++pass) f(pass * 4 + lane / 8, (lane % 8) * 4);
  }

  static BBQ_DEVICE void store_measures(const Rows& rows, int row, float square, float peak) {
    square = gpu::sum_over<8>(square);
    peak = gpu::max_over<8>(peak);
    if (gpu::lane_index() % 8 == 0) {
      rows.squares[row] = square;
      rows.peaks[row] = peak;
      if (!is_finite(square)) rows.bad[row] = 1;
    }
  }

  static BBQ_DEVICE void load_rows(const Params& p, const Rows& rows, int64_t first) {
    const bool aligned = p.x.aligned();
    for_rows([&](int row, int column) {
      float square = 0, peak = 0;
      BBQ_UNROLL
      for (int d = column; d < kWidth; d += 32) {
        float v[4] = {0, 0, 0, 0};
        if (first + row < p.shape.rows) load_four(p.x, first + row, d, aligned, v);
        gpu::Four<float> four;
        BBQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          four.v[i] = v[i];
          square = gpu::fused_multiply_add(v[i], v[i], square);
          peak = fmaxf(peak, fabsf(v[i]));
        }
        gpu::store4(rows.residuals + row * kRowStride + d, four);
      }
      square = gpu::sum_over<8>(square);
      peak = gpu::max_over<8>(peak);
      if (gpu::lane_index() % 8 == 0) {
        rows.squares[row] = square;
        rows.peaks[row] = peak;
      }
    });
  }

  // How far a score may be from the least one and still belong to the nearest codeword: twice the error bound of the
  // float16 score and the float32 score together, in the scaled units of the sweep.
  static BBQ_DEVICE float band(const Level& level, float square, float peak, int exponent, int index_bits) {
    const float scale = power_of_two(exponent), root = sqrtf(static_cast<float>(kWidth));
    // Where squares vanish in float32, the largest element bounds the norm.
    const float norm = square > 1e-30f ? sqrtf(square) * (1 + 0x1p-18f) : root * peak;
    const float r = norm * scale, c = level.largest * power_of_two(level.exponent);
    // What grows with the size of the score: the rounding of tile products and float32, and the index in the last bits.
    const float relative = 0x1p-17f + kProducts * 0x1p-18f + power_of_two(index_bits - 23);
    const int above = exponent - level.exponent;  // at most 30
    const float half_square = 0.5f * c * (c * power_of_two(above > -126 ? above : -126));
    const float error = r * c * 0x1p-10f + (r * c + half_square) * relative + 0x1p-24f * root * c + 0x1p-100f;
    return 2 * error * (1 + 0x1p-16f);
  }

  static BBQ_DEVICE void load_left(const Rows& rows, float scale, gpu::Left (&left)[2][kProducts]) {
    const int group = gpu::lane_index() / 4, member = gpu::lane_index() % 4;
    BBQ_UNROLL
    for (int m = 0; m < 2; ++m) {
      BBQ_UNROLL
      for (int k = 0; k < kProducts; ++k) {
        BBQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          const Shared<float> pair =
              rows.residuals + (16 * m + 8 * (i % 2) + group) * kRowStride + 16 * k + 8 * (i / 2) + 2 * member;
          left[m][k].v[i] = gpu::pack_half(pair[0] * scale, pair[1] * scale);
        }
      }
    }
  }

  // Scores of all codewords of a level: the best and second best of each row slot and class.
  static BBQ_DEVICE void sweep(const Params& p, const Rows& rows, int level, int exponent, float (&best)[4][4],
                               float (&second)[4][4]) {
    const Plan plan(gpu::block_threads(), p.shape.levels);
    const int lane = gpu::lane_index(), member = lane % 4;
    const float scale = power_of_two(exponent);
    const uint32_t mask = ~((1u << p.index_bits) - 1);
    gpu::Left left[2][kProducts];
    load_left(rows, scale, left);
    BBQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      BBQ_UNROLL
      for (int j = 0; j < 4; ++j) best[i][j] = second[i][j] = -3e38f;
    }
    for (int tile = 0; tile < p.tiles; ++tile) {
      const int t = level * p.tiles + tile;
      gpu::async_wait<kStages - 2>();
      gpu::sync_threads();  // the tile is there for all, and nobody reads the one before any more
      copy_tile(p, t + kStages - 1);
      const int stage = t % kStages;
      const Shared<const uint16_t> words = gpu::shared_at<uint16_t>(plan.tiles) + stage * kTile * kWordStride;
      const Shared<const float> squares = gpu::shared_at<float>(plan.squares) + stage * kTile;
      BBQ_UNROLL_BY(1)
      for (int n = 0; n < kTile; n += kClasses) {
        gpu::Accumulator sums[2][2];
        BBQ_UNROLL
        for (int u = 0; u < 2; ++u) {  // sums start at -|c|²/2, so that the best score is the largest
          const float low = fmaxf(squares[n + 8 * u + 2 * member] * -scale, -ConvertCodebooks::kNever);
          const float high = fmaxf(squares[n + 8 * u + 2 * member + 1] * -scale, -ConvertCodebooks::kNever);
          BBQ_UNROLL
          for (int m = 0; m < 2; ++m) sums[m][u] = {{low, high, low, high}};
        }
        BBQ_UNROLL
        for (int k = 0; k < kProducts; k += 2) {
          BBQ_UNROLL
          for (int u = 0; u < 2; ++u) {
            uint32_t right[4];
            gpu::load_matrices(right, words + (n + 8 * u + lane % 8) * kWordStride + 16 * k + (lane / 8) * 8);
            BBQ_UNROLL
            for (int m = 0; m < 2; ++m) {
              sums[m][u] = gpu::multiply_half(left[m][k], gpu::Right{{right[0], right[1]}}, sums[m][u]);
              sums[m][u] = gpu::multiply_half(left[m][k + 1], gpu::Right{{right[2], right[3]}}, sums[m][u]);
            }
          }
        }
        const uint32_t index = static_cast<uint32_t>((tile * kTile + n) / kClasses);
        BBQ_UNROLL
        for (int m = 0; m < 2; ++m) {
          BBQ_UNROLL
          for (int u = 0; u < 2; ++u) {
            BBQ_UNROLL
            for (int i = 0; i < 4; ++i) {
              const int slot = 2 * m + i / 2, c = 2 * u + i % 2;
              const float score = gpu::bits_float((gpu::float_bits(sums[m][u].v[i]) & mask) | index);
              second[slot][c] = fmaxf(second[slot][c], fminf(best[slot][c], score));
              best[slot][c] = fmaxf(best[slot][c], score);
            }
          }
        }
      }
    }
  }

  // Scores kMany codewords of a row: k, k + kClasses, ...; those past the last are left out.
  template <int kMany>
  static BBQ_DEVICE void consider(const Params& p, Shared<const float> residual, int level, int64_t k, float& best,
                                  int64_t& code) {
    const Global<const float> words = p.words + level * p.padded_size * kWidth;
    float half_squares[kMany], scores[kMany];
    BBQ_UNROLL
    for (int i = 0; i < kMany; ++i) {
      const int64_t candidate = k + i * kClasses;
      half_squares[i] = candidate < p.shape.size ? p.half_squares[level * p.shape.size + candidate] : gpu::kInfinity;
    }
    score_exactly<kMany>(
        kWidth, [&](int, int64_t d) -> float { return residual[d]; },
        [&](int i, int64_t d) -> float {
          const int64_t candidate = k + i * kClasses;
          return words[(candidate < p.shape.size ? candidate : k) * kWidth + d];
        },
        half_squares, scores);
    BBQ_UNROLL
    for (int i = 0; i < kMany; ++i) {
      const int64_t candidate = k + i * kClasses;
      // Candidates do not come in order: of equal scores the lowest code wins.
      if (scores[i] < best || (scores[i] == best && candidate < code)) {
        best = scores[i];
        code = candidate;
      }
    }
  }

  // The codes of the warp's rows, from what the sweep left over.
  static BBQ_DEVICE void resolve(const Params& p, const Rows& rows, int level, const float (&best)[4][4],
                                 const float (&second)[4][4]) {
    const int lane = gpu::lane_index(), group = lane / 4, member = lane % 4;
    const uint32_t mask = (1u << p.index_bits) - 1;
    BBQ_UNROLL
    for (int slot = 0; slot < 4; ++slot) {
      const int row = 16 * (slot / 2) + 8 * (slot % 2) + group;
      float top = fmaxf(fmaxf(best[slot][0], best[slot][1]), fmaxf(best[slot][2], best[slot][3]));
      top = gpu::max_over<4>(top);
      const float limit = top - rows.bands[row];
      int count = 0, code = -1;  // over the four lanes of the row; in this lane
      BBQ_UNROLL
      for (int c = 0; c < 4; ++c) {
        const bool candidate = best[slot][c] >= limit, several = second[slot][c] >= limit;
        const int index = static_cast<int>(gpu::float_bits(best[slot][c]) & mask);
        if (candidate) code = index * kClasses + 8 * (c / 2) + 2 * member + c % 2;
        count += candidate + several;
        rows.candidates[row * kClasses + 8 * (c / 2) + 2 * member + c % 2] =
            static_cast<uint16_t>(candidate ? 1 + 2 * index + several : 0);
      }
      count += gpu::shuffle_xor(count, 1);
      count += gpu::shuffle_xor(count, 2);
      if (count == 1 && code >= 0) rows.found[row] = code;
      if (count != 1 && member == 0) rows.found[row] = kOpen;
    }
    gpu::sync_warp();
    // Rows with several candidates, one after another by all lanes. Rows too large for scores have no band.
    const bool open = rows.found[lane] == kOpen;
    uint32_t open_rows = gpu::ballot(open && rows.bands[lane] >= 0);
    if (open) rows.found[lane] = 0;
    gpu::sync_warp();
    for (; open_rows; open_rows &= open_rows - 1) {
      const int row = gpu::lowest_bit(open_rows);
      const Shared<const float> residual = rows.residuals + row * kRowStride;
      float least = gpu::kInfinity;
      int64_t code = 0;
      const int mine = lane < kClasses ? int(rows.candidates[row * kClasses + lane]) : 0;
      for (uint32_t classes = gpu::ballot(mine != 0); classes; classes &= classes - 1) {
        const int first = gpu::lowest_bit(classes), candidate = gpu::shuffle(mine, first) - 1;
        if (candidate & 1) {  // a third could hide behind the second: all of the class
          for (int64_t k = first; k < p.shape.size; k += 4 * kClasses) {
            consider<4>(p, residual, level, k, least, code);
          }
        } else {
          consider<1>(p, residual, level, (candidate >> 1) * kClasses + first, least, code);
        }
      }
      if (lane == 0) rows.found[row] = static_cast<int>(code);
    }
  }

  // Subtracts the codewords that were found.
  static BBQ_DEVICE void update(const Params& p, const Rows& rows, int level) {
    for_rows([&](int row, int column) {
      const int64_t code = rows.found[row];
      const Global<const float> word = p.words + (level * p.padded_size + code) * kWidth;
      float square = 0, peak = 0;
      BBQ_UNROLL
      for (int d = column; d < kWidth; d += 32) {
        const gpu::Four<float> c = gpu::load4(word + d);
        gpu::Four<float> r = gpu::load4(rows.residuals + row * kRowStride + d);
        BBQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.v[i] = gpu::add(r.v[i], -c.v[i]);
          square = gpu::fused_multiply_add(r.v[i], r.v[i], square);
          peak = fmaxf(peak, fabsf(r.v[i]));
        }
        gpu::store4(rows.residuals + row * kRowStride + d, r);
      }
      store_measures(rows, row, square, peak);
      if (column == 0) rows.codes[row * p.shape.levels + level] = static_cast<int>(code);
    });
  }

  static BBQ_DEVICE void store_rows(const Params& p, const Rows& rows, int64_t first) {
    const bool aligned = p.quantized.aligned();
    for_rows([&](int row, int column) {
      if (first + row >= p.shape.rows) return;
      const bool bad = rows.bad[row];
      BBQ_UNROLL
      for (int d = column; d < kWidth; d += 32) {
        float sum[4] = {0, 0, 0, 0};
        for (int l = 0; l < p.shape.levels; ++l) {
          const int64_t code = rows.codes[row * p.shape.levels + l];
          const gpu::Four<float> word = gpu::load4(p.words + (l * p.padded_size + code) * kWidth + d);
          BBQ_UNROLL
          for (int i = 0; i < 4; ++i) sum[i] = gpu::add(sum[i], word.v[i]);
        }
        BBQ_UNROLL
        for (int i = 0; i < 4; ++i) sum[i] = bad ? gpu::quiet_nan() : sum[i];
        store_four(p.quantized, first + row, d, aligned, sum);
      }
    });
    for (int i = gpu::lane_index(); i < gpu::kLanes * p.shape.levels; i += gpu::kLanes) {
      const int row = i / p.shape.levels;
      if (first + row < p.shape.rows) p.codes[first * p.shape.levels + i] = rows.bad[row] ? -1 : rows.codes[i];
    }
  }

  static BBQ_DEVICE void run(const Params& p) {
    const Plan plan(gpu::block_threads(), p.shape.levels);
    const int lane = gpu::lane_index(), warp_row = gpu::warp_index() * gpu::kLanes;
    const int64_t first = gpu::block_index() * gpu::block_threads() + warp_row;
    const Rows rows{gpu::shared_at<float>(plan.residuals) + warp_row * kRowStride,
                    gpu::shared_at<float>(plan.squares) + kStages * kTile + warp_row,
                    gpu::shared_at<float>(plan.peaks) + warp_row,
                    gpu::shared_at<float>(plan.bands) + warp_row,
                    gpu::shared_at<int>(plan.bad) + warp_row,
                    gpu::shared_at<int>(plan.found) + warp_row,
                    gpu::shared_at<int>(plan.codes) + warp_row * p.shape.levels,
                    gpu::shared_at<uint16_t>(plan.candidates) + warp_row * kClasses};
    const Shared<double> losses = gpu::shared_at<double>(plan.losses);
    for (int tile = 0; tile < kStages - 1; ++tile) copy_tile(p, tile);
    bool finite = true;
    for (int l = 0; l < p.shape.levels; ++l) finite = finite && Level(p.levels[l]).finite;
    load_rows(p, rows, first);
    rows.bad[lane] = !finite;
    rows.found[lane] = 0;
    for (int level = 0; level < p.shape.levels; ++level) {
      gpu::sync_warp();
      const Level measured = p.levels[level];
      const float square = rows.squares[lane], peak = rows.peaks[lane];
      const bool good = !rows.bad[lane], safe = good && square + measured.largest * measured.largest < kSafeSquare;
      // One scale for the warp's 32 rows. More than 2^30 above that of the codewords would serve no code.
      const float tile_peak = gpu::max_over<gpu::kLanes>(safe ? peak : 0.0f);
      int exponent = measured.exponent + 30;
      if (tile_peak > 0 && exponent_for(tile_peak) < exponent) exponent = exponent_for(tile_peak);
      exponent = exponent < 126 ? exponent : 126;
      rows.bands[lane] = safe ? band(measured, square, peak, exponent, p.index_bits) : -1.0f;
      gpu::sync_warp();
      float best[4][4], second[4][4];
      sweep(p, rows, level, exponent, best, second);
      resolve(p, rows, level, best, second);
      gpu::sync_warp();
      for (uint32_t large = gpu::ballot(good && !safe); large; large &= large - 1) {
        const int row = gpu::lowest_bit(large);
        const int64_t code = search_by_distance(
            kWidth, p.shape.size, [&](int64_t d) -> float { return rows.residuals[row * kRowStride + d]; },
            p.words + (level * p.padded_size) * kWidth, kWidth);
        if (lane == 0) rows.found[row] = static_cast<int>(code);
      }
      gpu::sync_warp();
      update(p, rows, level);
      gpu::sync_warp();
      const bool counts = first + lane < p.shape.rows;
      const double sum = sum_of_squares(counts ? float(rows.squares[lane]) : 0.0f, counts && rows.bad[lane]);
      if (lane == 0) losses[gpu::warp_index() * p.shape.levels + level] = sum;
    }
    gpu::async_wait<0>();
    store_rows(p, rows, first);
    gpu::sync_threads();
    for (int level = gpu::thread_index(); level < p.shape.levels; level += gpu::block_threads()) {
      double sum = 0;
      for (int warp = 0; warp < gpu::block_threads() / gpu::kLanes; ++warp)
        sum += losses[warp * p.shape.levels + level];
      p.losses[gpu::block_index() * p.shape.levels + level] = sum;
    }
  }
};

// The same for rows of any width and codebooks of any size, in float32 without tensor cores. A warp owns four rows;
// their residuals are in global memory.
struct EncodeWide {
  static constexpr int kThreads = 128, kBlocks = 4;
  static constexpr int kRows = 4;  // of a warp
  struct Params {
    InputRows x;
    Global<const float> codebooks, half_squares;
    Global<const Level> levels;
    Global<float> residuals;
    OutputRows quantized;
    Global<int64_t> codes;
    Global<double> losses;  // (warps of the grid, L)
    RowShape shape;
  };

  static BBQ_DEVICE void run(const Params& p) {
    const int lane = gpu::lane_index();
    const int64_t width = p.shape.width, size = p.shape.size;
    const int64_t warp = gpu::block_index() * (kThreads / gpu::kLanes) + gpu::warp_index(), first = warp * kRows;
    if (first >= p.shape.rows) return;
    const int rows = p.shape.rows - first < kRows ? static_cast<int>(p.shape.rows - first) : kRows;
    bool finite = true;
    for (int l = 0; l < p.shape.levels; ++l) finite = finite && Level(p.levels[l]).finite;
    bool bad[kRows];
    float squares[kRows];
    // Every lane reads back only what it wrote itself.
    BBQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      bad[i] = !finite;
      float square = 0;
      for (int64_t d = lane; i < rows && d < width; d += gpu::kLanes) {
        const float value = load_one(p.x, (first + i) * width + d);
        p.residuals[(first + i) * width + d] = value;
        square = gpu::fused_multiply_add(value, value, square);
      }
      squares[i] = gpu::sum_over<gpu::kLanes>(square);
    }
    const auto row_of = [&](int i) { return first + (i < rows ? i : 0); };
    for (int level = 0; level < p.shape.levels; ++level) {
      const Global<const float> words = p.codebooks + level * size * width;
      const float largest = Level(p.levels[level]).largest;
      float best[kRows];
      int64_t codes[kRows];
      BBQ_UNROLL
      for (int i = 0; i < kRows; ++i) {
        best[i] = gpu::kInfinity;
        codes[i] = 0;
      }
      for (int64_t k = 0; k < size; ++k) {
        float half_squares[kRows], scores[kRows];
        BBQ_UNROLL
        for (int i = 0; i < kRows; ++i) half_squares[i] = p.half_squares[level * size + k];
        score_exactly<kRows>(
            width, [&](int i, int64_t d) -> float { return p.residuals[row_of(i) * width + d]; },
            [&](int, int64_t d) -> float { return words[k * width + d]; }, half_squares, scores);
        BBQ_UNROLL
        for (int i = 0; i < kRows; ++i) {
          if (scores[i] < best[i]) {
            best[i] = scores[i];
            codes[i] = k;
          }
        }
      }
      double loss = 0;
      BBQ_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (i >= rows) break;
        const Global<float> residual = p.residuals + (first + i) * width;
        if (!bad[i] && !(squares[i] + largest * largest < kSafeSquare)) {
          codes[i] = search_by_distance(width, size, [&](int64_t d) -> float { return residual[d]; }, words, width);
        }
        float square = 0;
        for (int64_t d = lane; d < width; d += gpu::kLanes) {
          const float rest = gpu::add(residual[d], -words[codes[i] * width + d]);
          residual[d] = rest;
          square = gpu::fused_multiply_add(rest, rest, square);
        }
        squares[i] = gpu::sum_over<gpu::kLanes>(square);
        bad[i] = bad[i] || !is_finite(squares[i]);
        loss += bad[i] ? double(gpu::quiet_nan()) : double(squares[i]);
        if (lane == 0) p.codes[(first + i) * p.shape.levels + level] = codes[i];
      }
      if (lane == 0) p.losses[warp * p.shape.levels + level] = loss;
    }
    gpu::sync_warp();
    BBQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      const Global<int64_t> codes = p.codes + (first + i) * p.shape.levels;
      for (int64_t d = lane; d < width; d += gpu::kLanes) {
        float sum = 0;
        for (int l = 0; l < p.shape.levels; ++l) {
          sum = gpu::add(sum, p.codebooks[(l * size + codes[l]) * width + d]);
        }
        store_one(p.quantized, (first + i) * width + d, bad[i] ? gpu::quiet_nan() : sum);
      }
      gpu::sync_warp();
      for (int l = lane; bad[i] && l < p.shape.levels; l += gpu::kLanes) codes[l] = -1;
    }
  }
};

// One block per level: the mean of the squared rests, into both losses.
struct FinishLosses {
  static constexpr int kThreads = 256, kBlocks = 4;
  static constexpr int kSharedBytes = kThreads * 8;
  struct Params {
    Global<const double> partials;  // (count, L)
    Global<float> commitment_loss, codebook_loss;
    int64_t count;
    RowShape shape;
  };
  static BBQ_DEVICE void run(const Params& p) {
    const Shared<double> sums = gpu::shared_at<double>(0);
    const int thread = gpu::thread_index();
    const int64_t level = gpu::block_index();
    double sum = 0;
    for (int64_t i = thread; i < p.count; i += kThreads) sum += p.partials[i * p.shape.levels + level];
    sums[thread] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      gpu::sync_threads();
      if (thread < half) sums[thread] = sums[thread] + sums[thread + half];
    }
    if (thread == 0) {
      const double elements = double(p.shape.rows) * double(p.shape.width);
      const float mean = static_cast<float>(elements > 0 ? sums[0] / elements : 0.0);
      p.commitment_loss[level] = mean;
      p.codebook_loss[level] = mean;
    }
  }
};

// Eight lanes share a row. f(row, d) is called for every row of the grid and each of its groups of four columns.
template <int kThreads, class F>
BBQ_DEVICE void for_row_quads(const RowShape& shape, const F& f) {
  const int64_t stride = gpu::grid_blocks() * (kThreads / 8);
  for (int64_t row = gpu::block_index() * (kThreads / 8) + gpu::thread_index() / 8; row < shape.rows; row += stride) {
    for (int64_t d = (gpu::thread_index() % 8) * 4; d < shape.width; d += 32) f(row, d);
  }
}

BBQ_DEVICE bool words_are_aligned(Global<const float> codebooks, int64_t width) {
  return width % 4 == 0 && gpu::address_of(codebooks) % 16 == 0;
}

struct Decode {
  static constexpr int kThreads = 256, kBlocks = 4;
  struct Params {
    Global<const int64_t> codes;
    Global<const float> codebooks;
    OutputRows output;
    RowShape shape;
  };
  static BBQ_DEVICE void run(const Params& p) {
    const RowShape& s = p.shape;
    const bool aligned = p.output.aligned(), aligned_words = words_are_aligned(p.codebooks, s.width);
    for_row_quads<kThreads>(s, [&](int64_t row, int64_t d) {
      float sum[4] = {0, 0, 0, 0};
      for (int l = 0; l < s.levels; ++l) {
        const int64_t code = gpu::checked_code(p.codes[row * s.levels + l], s.size);
        if (code < 0) continue;
        float word[4];
        load_four<float>(p.codebooks + (l * s.size + code) * s.width, d, s.width, aligned_words, word);
        BBQ_UNROLL
        for (int i = 0; i < 4; ++i) sum[i] = gpu::add(sum[i], word[i]);
      }
      store_four(p.output, row, d, aligned, sum);
    });
  }
};

// 2 g / (N D), the factor of a rest in the gradient of a loss.
BBQ_DEVICE float loss_scale(Global<const float> gradients, int level, const RowShape& s) {
  return gradients ? static_cast<float>(2.0 * gradients[level] / (double(s.rows) * double(s.width))) : 0.0f;
}

// grad_x = g + Σ_l scale_l r_{l+1}.
struct GradientOfRows {
  static constexpr int kThreads = 256, kBlocks = 4;
  static constexpr int kMaxLevels = 16;  // whose scales are in shared memory
  static constexpr int kSharedBytes = kMaxLevels * 4;
  struct Params {
    InputRows x;
    Global<const float> codebooks;
    Global<const int64_t> codes;
    InputRows grad_quantized;             // data may be null
    Global<const float> grad_commitment;  // may be null
    OutputRows grad_x;
    RowShape shape;
  };
  static BBQ_DEVICE void run(const Params& p) {
    const RowShape& s = p.shape;
    const Shared<float> scales = gpu::shared_at<float>(0);
    for (int l = gpu::thread_index(); l < s.levels && l < kMaxLevels; l += kThreads) {
      scales[l] = loss_scale(p.grad_commitment, l, s);
    }
    gpu::sync_threads();
    const bool has_upstream = static_cast<bool>(p.grad_quantized.data);
    const bool aligned = p.x.aligned() && p.grad_x.aligned() && (!has_upstream || p.grad_quantized.aligned());
    const bool aligned_words = words_are_aligned(p.codebooks, s.width);
    for_row_quads<kThreads>(s, [&](int64_t row, int64_t d) {
      float rest[4], sum[4] = {0, 0, 0, 0};
      load_four(p.x, row, d, aligned, rest);
      if (has_upstream) load_four(p.grad_quantized, row, d, aligned, sum);
      bool bad = false;
      for (int l = 0; l < s.levels; ++l) {
        const int64_t code = gpu::checked_code(p.codes[row * s.levels + l], s.size);
        if (l == 0) bad = code < 0;
        if (code < 0) continue;
        const float scale = l < kMaxLevels ? float(scales[l]) : loss_scale(p.grad_commitment, l, s);
        float word[4];
        load_four<float>(p.codebooks + (l * s.size + code) * s.width, d, s.width, aligned_words, word);
        BBQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          rest[i] = gpu::add(rest[i], -word[i]);
          sum[i] = gpu::fused_multiply_add(scale, rest[i], sum[i]);
        }
      }
      BBQ_UNROLL
      for (int i = 0; i < 4; ++i) sum[i] = bad ? gpu::quiet_nan() : sum[i];
      store_four(p.grad_x, row, d, aligned, sum);
    });
  }
};

// What SumRows adds up per codeword: a given row (the backward of decode), the residual before the codeword is
// subtracted (statistics), or the rest after it, times -scale (the backward of the codebook loss).
enum class Sum { kRow, kResidual, kRest };

// Sums of rows that chose the same codeword. The grid's x covers chunks of rows, its y slices of columns. A block adds
// its rows to a table (L, K, slice) in shared memory, or in global memory where that is too small. Each element of the
// table belongs to one thread, which takes the rows in order.
//
// Tiles of rows pass through three hands, one barrier apart: asynchronous copies bring tile t + 2 while threads without
// table elements prepare tile t + 1 and the others add up tile t.
template <Sum kSum>
struct SumRows {
  static constexpr int kThreads = 256, kBlocks = 2;
  static constexpr int kBatch = 8;   // rows whose table elements are fetched together
  static constexpr int kStages = 3;  // tiles in shared memory, of which two are prepared
  struct Params {
    InputRows source;  // rows x, or gradients; kRow: float32
    Global<const int64_t> codes;
    Global<const float> codebooks;      // kRow: not used
    Global<const float> grad_codebook;  // kRest only
    Global<float> partials;             // (chunks, L, K, D)
    RowShape shape;
    int64_t chunk_rows;
    int slice_bits;  // log2 of the columns of a slice
    int tile_rows;   // a multiple of kBatch
    bool table_is_shared;
  };

  // Byte offsets in shared memory.
  struct Plan {
    int source, source_bytes, codes, checked, values, scales, table;
    int64_t bytes;
    BBQ_HOST_DEVICE Plan(const RowShape& s, int slice, int tile_rows, int element_bytes, bool table_is_shared) {
      source_bytes = (tile_rows * slice * element_bytes + 15) / 16 * 16;
      source = 0;                                            // tiles as they come
      codes = source + kStages * source_bytes;               // int64, as they come
      checked = codes + kStages * tile_rows * s.levels * 8;  // int32
      values = checked + 2 * tile_rows * s.levels * 4;       // what each level adds up
      scales = values + (kSum == Sum::kRow ? 0 : 2 * s.levels * tile_rows * slice * 4);
      table = scales + s.levels * 4;
      bytes = table + (table_is_shared ? s.levels * s.size * slice * 4 : 0);
    }
  };

  static BBQ_DEVICE int element_bytes(Float type) { return type == Float::kFloat32 ? 4 : 2; }

  // Starts to copy the tile of rows [first, last) at most.
  static BBQ_DEVICE void copy_tile(const Params& p, const Plan& plan, int stage, int64_t first, int64_t last) {
    const RowShape& s = p.shape;
    const int slice = 1 << p.slice_bits, size = element_bytes(p.source.type);
    const int64_t first_column = gpu::block_index_y() * slice, columns = s.width - first_column;
    const Shared<unsigned char> target = gpu::shared_at<unsigned char>(plan.source + stage * plan.source_bytes);
    const Global<const unsigned char> rows = p.source.data + (first * s.width + first_column) * size;
    if (gpu::address_of(rows) % 16 == 0 && s.width * size % 16 == 0 && slice * size >= 16) {
      const int pieces = slice * size / 16;  // a power of two
      for (int i = gpu::thread_index(); i < p.tile_rows * pieces; i += kThreads) {
        const int row = i / pieces, piece = i & (pieces - 1);
        const int64_t left = columns * size - piece * 16;
        const int valid = first + row >= last || left <= 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
        gpu::async_copy16(target + i * 16, valid ? rows + (row * s.width * size + piece * 16) : p.source.data, valid);
      }
    } else {
      with_type(p.source.type, [&](auto type) {
        using T = decltype(type);
        for (int i = gpu::thread_index(); i < p.tile_rows * slice; i += kThreads) {
          const int row = i >> p.slice_bits, column = i & (slice - 1);
          const bool inside = first + row < last && column < columns;
          gpu::cast<T>(target)[i] =
              inside ? T(gpu::cast<const T>(p.source.data)[(first + row) * s.width + first_column + column]) : T{};
        }
      });
    }
    const Shared<int64_t> codes = gpu::shared_at<int64_t>(plan.codes) + stage * p.tile_rows * s.levels;
    for (int i = gpu::thread_index(); i < p.tile_rows * s.levels; i += kThreads) {
      const int64_t at = first * s.levels + i;
      const bool inside = at < last * s.levels;
      gpu::async_copy8(codes + i, p.codes + (inside ? at : 0), inside ? 8 : 0);
    }
    gpu::async_commit();
  }

  // The first thread that prepares tiles; those below own table elements, as long as that leaves enough of them.
  static BBQ_DEVICE int first_preparer(int owners) {
    return owners <= kThreads / 2 ? (owners + gpu::kLanes - 1) / gpu::kLanes * gpu::kLanes : 0;
  }

  // Checks the codes of tile number `index`, and finds what each level adds up.
  static BBQ_DEVICE void prepare(const Params& p, const Plan& plan, int64_t index, int64_t first, int64_t last) {
    const RowShape& s = p.shape;
    const int slice = 1 << p.slice_bits, tile = p.tile_rows * slice, code_count = p.tile_rows * s.levels;
    const int stage = static_cast<int>(index % kStages), half = static_cast<int>(index % 2);
    const int skipped = first_preparer(s.levels * slice), preparers = kThreads - skipped;
    const int thread = gpu::thread_index() - skipped;
    if (thread < 0) return;
    const Shared<const int64_t> codes = gpu::shared_at<int64_t>(plan.codes) + stage * code_count;
    const Shared<int> checked = gpu::shared_at<int>(plan.checked) + half * code_count;
    for (int i = thread; i < code_count; i += preparers) {
      const bool inside = first * s.levels + i < last * s.levels;
      checked[i] = inside ? static_cast<int>(gpu::checked_code(codes[i], s.size)) : -1;
    }
    if constexpr (kSum != Sum::kRow) {
      const Shared<const unsigned char> rows = gpu::shared_at<unsigned char>(plan.source + stage * plan.source_bytes);
      const Shared<const float> scales = gpu::shared_at<float>(plan.scales);
      const Shared<float> values = gpu::shared_at<float>(plan.values) + half * s.levels * tile;
      BBQ_UNROLL_BY(2)
      for (int i = thread; i < tile; i += preparers) {
        const int row = i >> p.slice_bits;
        const int64_t column = gpu::block_index_y() * slice + (i & (slice - 1));
        const bool inside = first + row < last && column < s.width;
        float value = 0;
        with_type(p.source.type, [&](auto type) {
          using T = decltype(type);
          value = to_float(T(gpu::cast<const T>(rows)[i]));
        });
        BBQ_UNROLL_BY(4)
        for (int l = 0; l < s.levels; ++l) {
          float word = 0;
          if (inside) {
            const int64_t code = gpu::checked_code(codes[row * s.levels + l], s.size);
            if (code >= 0) word = p.codebooks[(l * s.size + code) * s.width + column];
          }
          if (kSum == Sum::kResidual) values[l * tile + i] = value;
          value = gpu::add(value, -word);
          if (kSum == Sum::kRest) values[l * tile + i] = gpu::multiply(scales[l], value);
        }
      }
    }
  }

  // Adds kBatch rows to the elements of a table that one thread owns: code[i] < 0 adds nothing.
  template <class TableAt>
  static BBQ_DEVICE void add_rows(const int (&code)[kBatch], const float (&value)[kBatch], const TableAt& table_at) {
    float sum[kBatch];
    BBQ_UNROLL
    for (int i = 0; i < kBatch; ++i) sum[i] = code[i] >= 0 ? float(table_at(code[i])) : 0.0f;
    BBQ_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      BBQ_UNROLL
      for (int j = 0; j < i; ++j) sum[i] = code[j] == code[i] ? sum[j] : sum[i];  // fetched before row j was added
      sum[i] = gpu::add(sum[i], value[i]);
    }
    BBQ_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (code[i] >= 0) table_at(code[i]) = sum[i];
    }
  }

  static BBQ_DEVICE void run(const Params& p) {
    const RowShape& s = p.shape;
    const int slice = 1 << p.slice_bits, tile = p.tile_rows * slice, owners = s.levels * slice;
    const Plan plan(s, slice, p.tile_rows, element_bytes(p.source.type), p.table_is_shared);
    const Shared<float> table = gpu::shared_at<float>(plan.table);
    const int64_t first_column = gpu::block_index_y() * slice;
    const Global<float> target = p.partials + gpu::block_index() * s.levels * s.size * s.width + first_column;
    const int columns = s.width - first_column < slice ? static_cast<int>(s.width - first_column) : slice;
    const int64_t begin = gpu::block_index() * p.chunk_rows;
    const int64_t end = begin + p.chunk_rows < s.rows ? begin + p.chunk_rows : s.rows;
    copy_tile(p, plan, 0, begin, end);
    copy_tile(p, plan, 1, begin + p.tile_rows, end);

    // f(level, column) for each element column of the table that this thread owns.
    const auto for_owned = [&](const auto& f) {
      for (int owner = gpu::thread_index(); owner < owners; owner += kThreads) {
        const int column = owner & (slice - 1);
        if (column < columns) f(owner >> p.slice_bits, column);
      }
    };
    for_owned([&](int level, int column) {
      for (int64_t k = 0; k < s.size; ++k) {
        if (p.table_is_shared) {
          table[(level * s.size + k) * slice + column] = 0.0f;
        } else {
          target[(level * s.size + k) * s.width + column] = 0.0f;
        }
      }
    });
    if (kSum == Sum::kRest) {
      const Shared<float> scales = gpu::shared_at<float>(plan.scales);
      for (int l = gpu::thread_index(); l < s.levels; l += kThreads) scales[l] = -loss_scale(p.grad_codebook, l, s);
    }
    gpu::async_wait<1>();
    gpu::sync_threads();  // the first tile and the scales are there for all
    prepare(p, plan, 0, begin, end);
    int64_t t = 0;
    for (int64_t first = begin; first < end; first += p.tile_rows, ++t) {
      gpu::async_wait<0>();
      gpu::sync_threads();  // tile t is prepared, t + 1 came, and nobody reads t - 1 any more
      copy_tile(p, plan, static_cast<int>((t + 2) % kStages), first + 2 * p.tile_rows, end);
      if (first + p.tile_rows < end) prepare(p, plan, t + 1, first + p.tile_rows, end);
      const Shared<const int> codes = gpu::shared_at<int>(plan.checked) + (t % 2) * p.tile_rows * s.levels;
      const int values_at = kSum == Sum::kRow ? plan.source + static_cast<int>(t % kStages) * plan.source_bytes
                                              : plan.values + static_cast<int>(t % 2) * s.levels * tile * 4;
      for_owned([&](int level, int column) {
        const Shared<const float> values =
            gpu::shared_at<float>(values_at) + (kSum == Sum::kRow ? 0 : level * tile) + column;
        for (int row = 0; row < p.tile_rows; row += kBatch) {
          int code[kBatch];
          float value[kBatch];
          BBQ_UNROLL
          for (int i = 0; i < kBatch; ++i) {
            code[i] = codes[(row + i) * s.levels + level];
            value[i] = values[(row + i) * slice];
          }
          if (p.table_is_shared) {
            const Shared<float> mine = table + level * s.size * slice + column;
            add_rows(code, value, [&](int k) -> decltype(auto) { return mine[k * slice]; });
          } else {
            const Global<float> mine = target + level * s.size * s.width + column;
            add_rows(code, value, [&](int k) -> decltype(auto) { return mine[k * s.width]; });
          }
        }
      });
    }
    gpu::async_wait<0>();
    if (!p.table_is_shared) return;
    for_owned([&](int level, int column) {
      for (int64_t k = 0; k < s.size; ++k) {
        target[(level * s.size + k) * s.width + column] = float(table[(level * s.size + k) * slice + column]);
      }
    });
  }
};

// Adds up the tables of the chunks, in order.
struct AddTables {
  static constexpr int kThreads = 256, kBlocks = 4;
  struct Params {
    Global<const float> partials;
    Global<float> output;
    int64_t chunks, elements;
  };
  static BBQ_DEVICE void run(const Params& p) {
    const int64_t i = gpu::block_index() * kThreads + gpu::thread_index();
    if (i >= p.elements) return;
    float sum = 0;
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum = gpu::add(sum, p.partials[chunk * p.elements + i]);
    p.output[i] = sum;
  }
};

// How often each code occurs: per block in shared memory where it holds a counter for each codeword, then one global
// addition per counter and block. Sums of integers do not depend on their order.
struct CountCodes {
  static constexpr int kThreads = 256, kBlocks = 1;
  struct Params {
    Global<const int64_t> codes;
    Global<unsigned long long> counts;  // (L, K), zeros before
    RowShape shape;
    bool shared_counters;
  };
  static BBQ_DEVICE void run(const Params& p) {
    const RowShape& s = p.shape;
    const Shared<int> counters = gpu::shared_at<int>(0);
    const int64_t bins = s.levels * s.size, all = s.rows * s.levels;
    if (p.shared_counters) {
      for (int64_t i = gpu::thread_index(); i < bins; i += kThreads) counters[i] = 0;
      gpu::sync_threads();
    }
    for (int64_t i = gpu::block_index() * kThreads + gpu::thread_index(); i < all; i += gpu::grid_blocks() * kThreads) {
      const int64_t code = gpu::checked_code(p.codes[i], s.size);
      if (code < 0) continue;
      const int64_t bin = (i % s.levels) * s.size + code;
      if (p.shared_counters) {
        gpu::atomic_add(counters + bin, 1);
      } else {
        gpu::atomic_add(p.counts + bin, 1ull);
      }
    }
    if (!p.shared_counters) return;
    gpu::sync_threads();
    for (int64_t i = gpu::thread_index(); i < bins; i += kThreads) {
      const int count = counters[i];
      if (count) gpu::atomic_add(p.counts + i, static_cast<unsigned long long>(count));
    }
  }
};

// Zeros, and counts as float32.
struct ClearCounts {
  static constexpr int kThreads = 256, kBlocks = 4;
  struct Params {
    Global<unsigned long long> counts;
    int64_t bins;
  };
  static BBQ_DEVICE void run(const Params& p) {
    const int64_t i = gpu::block_index() * kThreads + gpu::thread_index();
    if (i < p.bins) p.counts[i] = 0ull;
  }
};
struct FinishCounts {
  static constexpr int kThreads = 256, kBlocks = 4;
  struct Params {
    Global<const unsigned long long> counts;
    Global<float> output;
    int64_t bins;
  };
  static BBQ_DEVICE void run(const Params& p) {
    const int64_t i = gpu::block_index() * kThreads + gpu::thread_index();
    if (i < p.bins) p.output[i] = static_cast<float>(p.counts[i]);
  }
};

// Below: which kernels run, in which sizes, on any `Queue`. It offers
//   machine()                                                 what the sizes depend on
//   scratch<U>(count)                                         memory until the end of the operator
//   run<Kernel>(blocks, blocks_y, threads, shared, params)    a launch

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int bits_of(int64_t x) {
  int bits = 0;
  for (; x > 0; x >>= 1) ++bits;
  return bits;
}

struct EncodeArguments {
  InputRows x;
  Global<const float> codebooks;
  OutputRows quantized;
  Global<int64_t> codes;
  Global<float> commitment_loss, codebook_loss;
  RowShape shape;
};

template <int kWidth, class Queue>
int64_t run_encode(Queue& queue, const EncodeArguments& a, Global<const float> half_squares, Global<const Level> levels,
                   Global<double>& losses) {
  using Kernel = Encode<kWidth>;
  const RowShape& s = a.shape;
  const int64_t padded_size = divide_up(s.size, Kernel::kTile) * Kernel::kTile, words = s.levels * padded_size;
  const auto wide = queue.template scratch<float>(words * kWidth);
  const auto half = queue.template scratch<uint16_t>(words * kWidth);
  const auto scaled = queue.template scratch<float>(words);
  queue.template run<ConvertCodebooks>(
      divide_up(padded_size, 8), s.levels, ConvertCodebooks::kThreads, 0,
      {a.codebooks, half_squares, levels, wide, half, scaled, s.size, s.width, padded_size, kWidth});
  // As many warps to a block as shared memory allows: they share the tiles.
  int threads = Kernel::kThreads;
  while (threads > gpu::kLanes && typename Kernel::Plan(threads, s.levels).bytes > queue.machine().shared_per_block) {
    threads -= gpu::kLanes;
  }
  const int64_t blocks = divide_up(s.rows, threads);
  losses = queue.template scratch<double>(blocks * s.levels);
  queue.template run<Kernel>(
      blocks, 1, threads, typename Kernel::Plan(threads, s.levels).bytes,
      {a.x, wide, half, half_squares, scaled, levels, a.quantized, a.codes, losses, s, padded_size,
       static_cast<int>(padded_size / Kernel::kTile), bits_of(divide_up(padded_size, Kernel::kClasses) - 1)});
  return blocks;
}

template <class Queue>
int64_t run_encode_wide(Queue& queue, const EncodeArguments& a, Global<const float> half_squares,
                        Global<const Level> levels, Global<double>& losses) {
  const RowShape& s = a.shape;
  const int64_t warps = divide_up(s.rows, EncodeWide::kRows);
  losses = queue.template scratch<double>(warps * s.levels);
  const auto residuals = queue.template scratch<float>(s.rows * s.width);
  queue.template run<EncodeWide>(divide_up(warps, EncodeWide::kThreads / gpu::kLanes), 1, EncodeWide::kThreads, 0,
                                 {a.x, a.codebooks, half_squares, levels, residuals, a.quantized, a.codes, losses, s});
  return warps;
}

// Whether the rows of one warp fit on chip.
template <int kWidth, class Queue>
bool fits(const Queue& queue, const RowShape& s) {
  return typename Encode<kWidth>::Plan(gpu::kLanes, s.levels).bytes <= queue.machine().shared_per_block;
}

template <class Queue>
void residual_quantize(Queue& queue, const EncodeArguments& a) {
  const RowShape& s = a.shape;
  const int64_t words = s.levels * s.size;
  int64_t partials = 0;
  Global<double> losses = nullptr;
  if (s.rows > 0) {
    const auto half_squares = queue.template scratch<float>(words);
    const auto norms = queue.template scratch<float>(words);
    const auto peaks = queue.template scratch<float>(words);
    const auto levels = queue.template scratch<Level>(s.levels);
    queue.template run<MeasureCodewords>(divide_up(words, 8), 1, MeasureCodewords::kThreads, 0,
                                         {a.codebooks, half_squares, norms, peaks, words, s.width});
    queue.template run<MeasureLevels>(s.levels, 1, MeasureLevels::kThreads, MeasureLevels::kSharedBytes,
                                      {norms, peaks, levels, s.size});
    const bool small = s.size <= kMaxTensorSize;
    if (small && s.width <= 32 && fits<32>(queue, s)) {
      partials = run_encode<32>(queue, a, half_squares, levels, losses);
    } else if (small && s.width <= 64 && fits<64>(queue, s)) {
      partials = run_encode<64>(queue, a, half_squares, levels, losses);
    } else if (small && s.width <= 128 && fits<128>(queue, s)) {
      partials = run_encode<128>(queue, a, half_squares, levels, losses);
    } else if (small && s.width <= 256 && fits<256>(queue, s)) {
      partials = run_encode<256>(queue, a, half_squares, levels, losses);
    } else {
      partials = run_encode_wide(queue, a, half_squares, levels, losses);
    }
  }
  queue.template run<FinishLosses>(s.levels, 1, FinishLosses::kThreads, FinishLosses::kSharedBytes,
                                   {losses, a.commitment_loss, a.codebook_loss, partials, s});
}

// Blocks of a kernel whose threads step through the rows.
template <class Queue>
int64_t row_blocks(const Queue& queue, const RowShape& s) {
  const int64_t needed = divide_up(s.rows, 32), most = int64_t{queue.machine().processors} * 16;
  return needed < most ? needed : most;
}

template <class Queue>
void residual_decode(Queue& queue, const Decode::Params& params) {
  if (params.shape.rows == 0) return;
  queue.template run<Decode>(row_blocks(queue, params.shape), 1, Decode::kThreads, 0, params);
}

template <class Queue>
void gradient_of_rows(Queue& queue, const GradientOfRows::Params& params) {
  if (params.shape.rows == 0) return;
  queue.template run<GradientOfRows>(row_blocks(queue, params.shape), 1, GradientOfRows::kThreads,
                                     GradientOfRows::kSharedBytes, params);
}

// Writes `output (L, K, D)`. Sizes depend on shapes and the machine alone, and so do the bits of the result.
template <Sum kSum, class Queue>
void sum_rows(Queue& queue, const InputRows& source, Global<const int64_t> codes, Global<const float> codebooks,
              Global<const float> grad_codebook, Global<float> output, const RowShape& s) {
  using Kernel = SumRows<kSum>;
  const Machine machine = queue.machine();
  const int64_t elements = s.levels * s.size * s.width;
  const int element_bytes = source.type == Float::kFloat32 ? 4 : 2;
  const auto plan_bytes = [&](int slice_bits, int tile_rows, bool shared) {
    return typename Kernel::Plan(s, 1 << slice_bits, tile_rows, element_bytes, shared).bytes;
  };
  // Slices of 16 columns keep several blocks on a processor busy; 8 are a sector of memory, and still worth it.
  int slice_bits = bits_of(s.width - 1);
  slice_bits = slice_bits < 4 ? slice_bits : 4;
  int tile_rows = kSum == Sum::kRow ? 64 : 32;
  while (tile_rows > Kernel::kBatch && plan_bytes(slice_bits, tile_rows, false) > machine.shared_per_block / 4) {
    tile_rows /= 2;
  }
  if (slice_bits > 3 && plan_bytes(slice_bits, tile_rows, true) > machine.shared_per_processor / 2) slice_bits = 3;
  const bool shared = plan_bytes(slice_bits, tile_rows, true) <= machine.shared_per_block;
  const int64_t bytes = plan_bytes(slice_bits, tile_rows, shared),
                slices = divide_up(s.width, int64_t{1} << slice_bits);
  // Chunks fill the machine once; a table per chunk must stay small beside the rows that it sums.
  int64_t resident = machine.shared_per_processor / (bytes + 1024);
  resident = machine.processors * (resident < 1 ? 1 : resident > 8 ? 8 : resident);
  int64_t chunks = resident / slices;
  const int64_t most = s.rows / (4 * s.size);
  chunks = chunks < most ? chunks : most;
  chunks = chunks > 1 ? chunks : 1;
  int64_t chunk_rows = divide_up(divide_up(s.rows, chunks), tile_rows) * tile_rows;
  chunk_rows = chunk_rows > 0 ? chunk_rows : tile_rows;
  chunks = divide_up(s.rows, chunk_rows);
  const bool direct = chunks == 1;
  const Global<float> partials = direct ? output : queue.template scratch<float>(chunks * elements);
  if (chunks > 0) {
    queue.template run<Kernel>(
        chunks, slices, Kernel::kThreads, static_cast<int>(bytes),
        {source, codes, codebooks, grad_codebook, partials, s, chunk_rows, slice_bits, tile_rows, shared});
  }
  if (!direct) {
    queue.template run<AddTables>(divide_up(elements, AddTables::kThreads), 1, AddTables::kThreads, 0,
                                  {partials, output, chunks, elements});
  }
}

template <class Queue>
void count_codes(Queue& queue, Global<const int64_t> codes, Global<float> output, const RowShape& s) {
  const int64_t bins = s.levels * s.size, blocks = divide_up(bins, ClearCounts::kThreads);
  const auto counts = queue.template scratch<unsigned long long>(bins);
  queue.template run<ClearCounts>(blocks, 1, ClearCounts::kThreads, 0, {counts, bins});
  if (s.rows > 0) {
    const bool shared = bins * 4 <= queue.machine().shared_per_block;
    const int64_t needed = divide_up(s.rows * s.levels, CountCodes::kThreads * 4);
    const int64_t most = int64_t{queue.machine().processors} * 2;
    queue.template run<CountCodes>(needed < most ? needed : most, 1, CountCodes::kThreads,
                                   shared ? static_cast<int>(bins * 4) : 0, {codes, counts, s, shared});
  }
  queue.template run<FinishCounts>(blocks, 1, FinishCounts::kThreads, 0, {counts, output, bins});
}

}  // namespace bbq
