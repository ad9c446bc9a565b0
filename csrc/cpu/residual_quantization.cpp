// Residual quantization on the CPU: forward, backward, decode and statistics.
//
// Rows are handled in blocks of kRows. For each level the block's residuals meet the codebook in panels of kLanes
// codewords, so a distance is summed over D by the same sequence of operations whatever its row, codeword, tile or
// thread. Sums over rows are taken per block or chunk of fixed size and added in order: any thread count gives the
// same bits.
#include <cmath>
#include <limits>

#include "common.h"

namespace bbq {
namespace {

constexpr int64_t kRows = 4;         // rows of one register tile
constexpr int64_t kLanes = 16;       // codewords of one register tile
constexpr int64_t kDepth = 64;       // products summed in one go; rounding errors grow with kDepth + D / kDepth
constexpr int64_t kBlockRows = 64;   // rows of one unit of work, and of one partial sum of the losses
constexpr int64_t kChunkRows = 512;  // least rows of one partial sum of codebook gradients
constexpr int64_t kMaxChunks = 64;

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
static_assert(kBlockRows % kRows == 0);

// While |r|² + |c|² stays below this, no partial sum of r·c overflows, and neither does the score.
constexpr double kSafeNorm = std::numeric_limits<float>::max() / 4;

struct Shape {
  int64_t rows, levels, size, width;
};

// Sum of squares in double, where the square of a float is exact: right to the last bit of a float.
BBQ_INLINE double squared_norm(const float* v, int64_t n) {
  double sums[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += double(v[d + j]) * v[d + j];
  }
  for (int64_t j = 0; d + j < n; ++j) sums[j] += double(v[d + j]) * v[d + j];
  double total = 0;
  for (int64_t j = 0; j < kLanes; ++j) total += sums[j];
  return total;
}

// Codebooks rearranged for the search: [level][panel][D][kLanes] codewords and [level][panel][kLanes] half squared
// norms, infinite in lanes past the last codeword.
struct Panels {
  int64_t count;
  std::vector<float> words;
  std::vector<float> half_norms;
  std::vector<double> largest_norms;  // of each level, squared
  bool finite = true;

  Panels(const float* codebooks, const Shape& s)
      : count(ceil_div(s.size, kLanes)),
        words(s.levels * count * s.width * kLanes),
        half_norms(s.levels * count * kLanes, kInfinity),
        largest_norms(s.levels, 0.0) {
    for (int64_t l = 0; l < s.levels; ++l) {
      for (int64_t k = 0; k < s.size; ++k) {
        const float* word = codebooks + (l * s.size + k) * s.width;
        const int64_t panel = l * count + k / kLanes;
        float* target = words.data() + panel * s.width * kLanes + k % kLanes;
        for (int64_t d = 0; d < s.width; ++d) target[d * kLanes] = word[d];
        const double norm = squared_norm(word, s.width);
        finite = finite && std::isfinite(norm);  // double holds the square of every float
        half_norms[panel * kLanes + k % kLanes] = static_cast<float>(0.5 * norm);
        largest_norms[l] = std::max(largest_norms[l], norm);
      }
    }
  }
};

// For kRows residuals, the codeword with the least |c|²/2 - r·c at one level (the distance, halved, less |r|²/2).
BBQ_INLINE void search_tile(const float* residual, int64_t width, const float* words, const float* half_norms,
                            int64_t panels, int64_t* codes) {
  float best[kRows];
  for (int64_t i = 0; i < kRows; ++i) {
    best[i] = kInfinity;
    codes[i] = 0;
  }
  for (int64_t p = 0; p < panels; ++p) {
    Lanes dot[kRows] = {};
    const float* panel = words + p * width * kLanes;
    for (int64_t first = 0; first < width; first += kDepth) {
      Lanes part[kRows] = {};
      for (int64_t d = first; d < std::min(first + kDepth, width); ++d) {
        Lanes word;
        __builtin_memcpy(&word, panel + d * kLanes, sizeof(word));
        for (int64_t i = 0; i < kRows; ++i) part[i] += word * residual[i * width + d];
      }
      for (int64_t i = 0; i < kRows; ++i) dot[i] += part[i];
    }
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < kLanes; ++j) {
        const float score = half_norms[p * kLanes + j] - dot[i][j];
        if (score < best[i]) {  // false for NaN, and for a tie: the lowest index stays
          best[i] = score;
          codes[i] = p * kLanes + j;
        }
      }
    }
  }
}

// The same for one residual, by distances: they stay finite where a score overflows.
int64_t search_by_distance(const float* residual, const float* words, const Shape& s) {
  float best = kInfinity;
  int64_t code = 0;
  for (int64_t k = 0; k < s.size; ++k) {
    float distance = 0;
    for (int64_t d = 0; d < s.width; ++d) {
      const float rest = residual[d] - words[k * s.width + d];
      distance += rest * rest;
    }
    if (distance < best) {
      best = distance;
      code = k;
    }
  }
  return code;
}

// Quantizes one block of rows in place: `residual` holds the rows, then what is left of them.
BBQ_SIMD_CLONES void quantize_block(float* residual, float* quantized, int64_t* codes, bool* bad, double* losses,
                                    int64_t rows, const float* codebooks, const Panels& panels, const Shape& s) {
  double norms[kBlockRows];  // |r|² of the level
  for (int64_t i = 0; i < rows; ++i) {
    norms[i] = squared_norm(residual + i * s.width, s.width);
    bad[i] = !panels.finite;
  }
  std::fill(quantized, quantized + rows * s.width, 0.0f);
  for (int64_t l = 0; l < s.levels; ++l) {
    const float* level_words = codebooks + l * s.size * s.width;
    int64_t found[kBlockRows];
    for (int64_t i = 0; i < rows; i += kRows) {  // rows past the last of a short block are zeros
      search_tile(residual + i * s.width, s.width, panels.words.data() + l * panels.count * s.width * kLanes,
                  panels.half_norms.data() + l * panels.count * kLanes, panels.count, found + i);
    }
    losses[l] = 0;
    for (int64_t i = 0; i < rows; ++i) {
      float* r = residual + i * s.width;
      float* q = quantized + i * s.width;
      const bool safe = norms[i] + panels.largest_norms[l] < kSafeNorm;  // false for NaN
      if (!safe && !bad[i]) found[i] = search_by_distance(r, level_words, s);
      const float* word = level_words + found[i] * s.width;
      for (int64_t d = 0; d < s.width; ++d) {
        r[d] -= word[d];
        q[d] += word[d];
      }
      norms[i] = squared_norm(r, s.width);
      bad[i] = bad[i] || !std::isfinite(static_cast<float>(norms[i]));
      codes[i * s.levels + l] = found[i];
      losses[l] += norms[i];
    }
  }
}

void check_upstream(const char* name, const Tensor& grad, int64_t elements, ScalarType dtype) {
  if (grad.numel() != elements || grad.scalar_type() != dtype) {
    throw std::invalid_argument(std::string(name) + ": expected the shape and dtype of what it is the gradient of");
  }
}

// Runs f(block, first, last) over fixed blocks of rows, on all cores.
template <class F>
void for_blocks(int64_t rows, int64_t block_rows, const F& f) {
  for_all(ceil_div(rows, block_rows), [&](int64_t b) { f(b, b * block_rows, std::min(rows, (b + 1) * block_rows)); });
}

// The sizes of a call. The public functions check arguments in full; this is what keeps addresses inside the tensors
// when an operator is called directly. `vectors` (..., D) and `codes` (..., L) may be missing.
Shape shape_of(const Tensor* vectors, const Tensor* codes, const Tensor& codebooks) {
  if (codebooks.dim() != 3 || codebooks.scalar_type() != ScalarType::Float) {
    throw std::invalid_argument("codebooks: expected 3 dimensions (levels, codebook_size, D) of float32");
  }
  Shape s{0, codebooks.size(0), codebooks.size(1), codebooks.size(2)};
  if (s.levels * s.size * s.width == 0) {
    throw std::invalid_argument("codebooks: expected at least one level, codeword and D");
  }
  if (codes && (codes->dim() == 0 || codes->size(-1) != s.levels || codes->scalar_type() != ScalarType::Long)) {
    throw std::invalid_argument("codes: expected shape (..., levels) of int64");
  }
  if (vectors && (vectors->dim() == 0 || vectors->size(-1) != s.width)) {
    throw std::invalid_argument("x: expected shape (..., D), D that of codebooks");
  }
  s.rows = vectors ? vectors->numel() / s.width : codes->numel() / s.levels;
  if (vectors && codes && codes->numel() / s.levels != s.rows) {
    throw std::invalid_argument("codes: expected one row for each row of x");
  }
  return s;
}

void check_codes(const int64_t* codes, int64_t n, int64_t size) {
  int64_t low = 0, high = -1;
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, codes[i]);
    high = std::max(high, codes[i]);
  }
  if (low < -1 || high >= size) {
    throw std::out_of_range("codes: got " + std::to_string(low < -1 ? low : high) + ", expected -1 to " +
                            std::to_string(size - 1) + " (codebook_size - 1)");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(Tensor x, Tensor codebooks) {
  using namespace torch::stable;
  const Shape s = shape_of(&x, nullptr, codebooks);
  const Tensor rows = contiguous(x), books = contiguous(codebooks);
  std::vector<int64_t> code_sizes(x.sizes().begin(), x.sizes().end());
  code_sizes.back() = s.levels;
  Tensor codes = new_empty(x, code_sizes, ScalarType::Long);
  Tensor losses = new_empty(books, {s.levels});
  ContiguousOutput quantized(empty_like(x));

  const float* book_data = data<float>(books);
  const Panels panels(book_data, s);
  int64_t* code_data = static_cast<int64_t*>(codes.mutable_data_ptr());
  std::vector<double> partials(ceil_div(s.rows, kBlockRows) * s.levels);
  std::vector<char> block_bad(ceil_div(s.rows, kBlockRows), 0);
  dispatch_float(x.scalar_type(), "x", [&](auto type) {
    using T = decltype(type);
    const T* x_data = data<T>(rows);
    T* out = static_cast<T*>(quantized.buffer().mutable_data_ptr());
    for_blocks(s.rows, kBlockRows, [&](int64_t b, int64_t first, int64_t last) {
      std::vector<float> residual(kBlockRows * s.width, 0.0f), sum(kBlockRows * s.width);
      bool bad[kBlockRows];
      load_row(x_data + first * s.width, residual.data(), (last - first) * s.width);
      quantize_block(residual.data(), sum.data(), code_data + first * s.levels, bad, &partials[b * s.levels],
                     last - first, book_data, panels, s);
      for (int64_t i = first; i < last; ++i) {
        float* q = sum.data() + (i - first) * s.width;
        if (bad[i - first]) {
          block_bad[b] = 1;
          std::fill(q, q + s.width, kNaN);
          std::fill(code_data + i * s.levels, code_data + (i + 1) * s.levels, int64_t{-1});
        }
        store_row(q, out + i * s.width, s.width);
      }
    });
  });
  const bool any_bad = std::any_of(block_bad.begin(), block_bad.end(), [](char c) { return c != 0; });
  float* loss_data = static_cast<float*>(losses.mutable_data_ptr());
  for (int64_t l = 0; l < s.levels; ++l) {
    double total = 0;
    for (size_t b = 0; b < block_bad.size(); ++b) total += partials[b * s.levels + l];
    const double mean = s.rows == 0 ? 0.0 : total / (static_cast<double>(s.rows) * s.width);
    loss_data[l] = any_bad ? kNaN : static_cast<float>(mean);
  }
  return {quantized.finish(), codes, losses, clone(losses)};
}

// Rebuilds the residuals of a row level by level. f(level, code, r_level, r_next) sees those of valid codes.
template <class F>
BBQ_INLINE void walk_residuals(const float* row, float* residual, float* next, const int64_t* codes,
                               const float* codebooks, const Shape& s, const F& f) {
  std::copy(row, row + s.width, residual);
  for (int64_t l = 0; l < s.levels; ++l) {
    if (codes[l] < 0) continue;
    const float* word = codebooks + (l * s.size + codes[l]) * s.width;
    for (int64_t d = 0; d < s.width; ++d) next[d] = residual[d] - word[d];
    f(l, codes[l], residual, next);
    std::swap(residual, next);
  }
}

// Sums vectors of rows into `total (L, K, D)`: each chunk of rows has its own partial sum, added in order. The number
// of chunks depends on the sizes alone, and their partial sums stay below N·D elements.
template <class F>
void sum_into_codebooks(float* total, const Shape& s, const F& add_rows) {
  const int64_t elements = s.levels * s.size * s.width;
  const int64_t affordable = std::max<int64_t>(1, s.rows * s.width / elements);
  const int64_t chunks = std::min({affordable, kMaxChunks, std::max<int64_t>(1, ceil_div(s.rows, kChunkRows))});
  const int64_t chunk_rows = std::max<int64_t>(1, ceil_div(s.rows, chunks));
  std::fill(total, total + elements, 0.0f);
  std::vector<float> partials((chunks - 1) * elements, 0.0f);  // the first chunk sums into `total`
  for_blocks(s.rows, chunk_rows, [&](int64_t c, int64_t first, int64_t last) {
    add_rows(c == 0 ? total : partials.data() + (c - 1) * elements, first, last);
  });
  torch::stable::parallel_for(0, elements, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t c = 0; c + 1 < chunks; ++c) {
      const float* partial = partials.data() + c * elements;
      for (int64_t e = begin; e < end; ++e) total[e] += partial[e];
    }
  });
}

std::vector<float> loss_scales(const char* name, const std::optional<Tensor>& grad, const Shape& s) {
  std::vector<float> scales(s.levels, 0.0f);
  if (!grad.has_value()) return scales;
  check_upstream(name, *grad, s.levels, ScalarType::Float);
  const Tensor dense = torch::stable::contiguous(*grad);
  const float* gradients = data<float>(dense);
  for (int64_t l = 0; l < s.levels; ++l)
    scales[l] = static_cast<float>(2.0 * gradients[l] / (double(s.rows) * s.width));
  return scales;
}

std::tuple<Tensor, Tensor> quantize_backward(Tensor x, Tensor codebooks, Tensor codes,
                                             std::optional<Tensor> grad_quantized,
                                             std::optional<Tensor> grad_commitment_loss,
                                             std::optional<Tensor> grad_codebook_loss, bool need_x,
                                             bool need_codebooks) {
  using namespace torch::stable;
  const Shape s = shape_of(&x, &codes, codebooks);
  const Tensor rows = contiguous(x), books = contiguous(codebooks), dense_codes = contiguous(codes);
  const std::vector<float> x_scales = loss_scales("grad_commitment_loss", grad_commitment_loss, s);
  const std::vector<float> book_scales = loss_scales("grad_codebook_loss", grad_codebook_loss, s);
  const float* book_data = data<float>(books);
  const int64_t* code_data = data<int64_t>(dense_codes);
  check_codes(code_data, s.rows * s.levels, s.size);
  if (grad_quantized) check_upstream("grad_quantized", *grad_quantized, x.numel(), x.scalar_type());
  Tensor grad_x = need_x ? empty_like(x) : new_empty(x, {0});
  Tensor grad_books = need_codebooks ? empty_like(codebooks) : new_empty(codebooks, {0});

  dispatch_float(x.scalar_type(), "x", [&](auto type) {
    using T = decltype(type);
    const T* x_data = data<T>(rows);
    if (need_x) {
      std::optional<Tensor> upstream;
      if (grad_quantized.has_value()) upstream = contiguous(*grad_quantized);
      const T* up = upstream.has_value() ? data<T>(*upstream) : nullptr;
      ContiguousOutput output(grad_x);
      T* out = static_cast<T*>(output.buffer().mutable_data_ptr());
      for_blocks(s.rows, kBlockRows, [&](int64_t, int64_t first, int64_t last) {
        std::vector<float> scratch(4 * s.width);
        float *row = scratch.data(), *a = row + s.width, *b = a + s.width, *sum = b + s.width;
        for (int64_t i = first; i < last; ++i) {
          const int64_t* row_codes = code_data + i * s.levels;
          load_row(x_data + i * s.width, row, s.width);
          if (up) {
            load_row(up + i * s.width, sum, s.width);
          } else {
            std::fill(sum, sum + s.width, 0.0f);
          }
          walk_residuals(row, a, b, row_codes, book_data, s, [&](int64_t l, int64_t, const float*, const float* next) {
            add_scaled(sum, next, x_scales[l], s.width);
          });
          if (row_codes[0] < 0) std::fill(sum, sum + s.width, kNaN);
          store_row(sum, out + i * s.width, s.width);
        }
      });
      grad_x = output.finish();
    }
    if (need_codebooks) {
      ContiguousOutput output(grad_books);
      float* total = static_cast<float*>(output.buffer().mutable_data_ptr());
      sum_into_codebooks(total, s, [&](float* target, int64_t first, int64_t last) {
        std::vector<float> scratch(3 * s.width);
        float *row = scratch.data(), *a = row + s.width, *b = a + s.width;
        for (int64_t i = first; i < last; ++i) {
          load_row(x_data + i * s.width, row, s.width);
          walk_residuals(row, a, b, code_data + i * s.levels, book_data, s,
                         [&](int64_t l, int64_t code, const float*, const float* next) {
                           add_scaled(target + (l * s.size + code) * s.width, next, -book_scales[l], s.width);
                         });
        }
      });
      grad_books = output.finish();
    }
  });
  return {grad_x, grad_books};
}

Tensor decode(Tensor codes, Tensor codebooks) {
  using namespace torch::stable;
  const Shape s = shape_of(nullptr, &codes, codebooks);
  const Tensor books = contiguous(codebooks), dense_codes = contiguous(codes);
  const int64_t* code_data = data<int64_t>(dense_codes);
  check_codes(code_data, s.rows * s.levels, s.size);
  std::vector<int64_t> sizes(codes.sizes().begin(), codes.sizes().end());
  sizes.back() = s.width;
  Tensor output = new_empty(books, sizes);
  const float* book_data = data<float>(books);
  float* out = static_cast<float*>(output.mutable_data_ptr());
  for_blocks(s.rows, kBlockRows, [&](int64_t, int64_t first, int64_t last) {
    std::fill(out + first * s.width, out + last * s.width, 0.0f);
    for (int64_t i = first; i < last; ++i) {
      for (int64_t l = 0; l < s.levels; ++l) {
        const int64_t code = code_data[i * s.levels + l];
        if (code >= 0) add_scaled(out + i * s.width, book_data + (l * s.size + code) * s.width, 1.0f, s.width);
      }
    }
  });
  return output;
}

Tensor decode_backward(Tensor grad, Tensor codes, Tensor codebooks) {
  using namespace torch::stable;
  const Shape s = shape_of(&grad, &codes, codebooks);
  check_upstream("grad", grad, s.rows * s.width, ScalarType::Float);
  const Tensor dense = contiguous(grad), dense_codes = contiguous(codes);
  const int64_t* code_data = data<int64_t>(dense_codes);
  check_codes(code_data, s.rows * s.levels, s.size);
  const float* grad_data = data<float>(dense);
  ContiguousOutput output(empty_like(codebooks));
  float* total = static_cast<float*>(output.buffer().mutable_data_ptr());
  sum_into_codebooks(total, s, [&](float* target, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      for (int64_t l = 0; l < s.levels; ++l) {
        const int64_t code = code_data[i * s.levels + l];
        if (code >= 0) add_scaled(target + (l * s.size + code) * s.width, grad_data + i * s.width, 1.0f, s.width);
      }
    }
  });
  return output.finish();
}

std::tuple<Tensor, Tensor> statistics(Tensor x, Tensor codes, Tensor codebooks) {
  using namespace torch::stable;
  const Shape s = shape_of(&x, &codes, codebooks);
  const Tensor rows = contiguous(x), books = contiguous(codebooks), dense_codes = contiguous(codes);
  const int64_t* code_data = data<int64_t>(dense_codes);
  check_codes(code_data, s.rows * s.levels, s.size);
  Tensor counts = new_zeros(books, {s.levels, s.size}), sums = new_empty(books, {s.levels, s.size, s.width});
  const float* book_data = data<float>(books);
  std::vector<int64_t> exact(s.levels * s.size, 0);  // a float stops counting at 2^24
  for (int64_t i = 0; i < s.rows * s.levels; ++i) {
    if (code_data[i] >= 0) ++exact[(i % s.levels) * s.size + code_data[i]];
  }
  float* count_data = static_cast<float*>(counts.mutable_data_ptr());
  for (size_t i = 0; i < exact.size(); ++i) count_data[i] = static_cast<float>(exact[i]);
  dispatch_float(x.scalar_type(), "x", [&](auto type) {
    using T = decltype(type);
    const T* x_data = data<T>(rows);
    sum_into_codebooks(static_cast<float*>(sums.mutable_data_ptr()), s,
                       [&](float* target, int64_t first, int64_t last) {
                         std::vector<float> scratch(3 * s.width);
                         float *row = scratch.data(), *a = row + s.width, *b = a + s.width;
                         for (int64_t i = first; i < last; ++i) {
                           load_row(x_data + i * s.width, row, s.width);
                           walk_residuals(row, a, b, code_data + i * s.levels, book_data, s,
                                          [&](int64_t l, int64_t code, const float* residual, const float*) {
                                            add_scaled(target + (l * s.size + code) * s.width, residual, 1.0f, s.width);
                                          });
                         }
                       });
  });
  return {counts, sums};
}

}  // namespace
}  // namespace bbq

STABLE_TORCH_LIBRARY_IMPL(bbqrec_kernels, CPU, m) {
  m.impl("residual_quantize", TORCH_BOX(&bbq::quantize));
  m.impl("residual_quantize_backward", TORCH_BOX(&bbq::quantize_backward));
  m.impl("residual_decode", TORCH_BOX(&bbq::decode));
  m.impl("residual_decode_backward", TORCH_BOX(&bbq::decode_backward));
  m.impl("residual_statistics", TORCH_BOX(&bbq::statistics));
}
