// Residual quantization on the CPU: tensors, threads and sums over rows. The arithmetic of a block of rows is in
// residual_quantization_simd.cpp.
//
// Sums over rows are taken per block or chunk of rows, whose sizes depend on the shapes alone, and added in order: any
// thread count gives the same bits.
#include "residual_quantization.h"

#include <cmath>

#include "common.h"
#include "common/quantization_arguments.h"

namespace bbq {
namespace {

constexpr int64_t kSearchProducts = 1 << 20;  // least multiply-adds of the search in one unit of work: 20 µs or less
constexpr int64_t kPackedElements = 1 << 15;  // of the codebooks, that one unit of work packs
constexpr int64_t kWalkedElements = 1 << 15;  // of rows, that one unit of work walks where it sums over no rows
constexpr int64_t kChunkRows = 512;           // least rows of one partial sum of codebook gradients
constexpr int64_t kMaxChunks = 32;
constexpr int64_t kSliceWidth = 64;  // columns of one unit of such a sum: its part of the codebooks should fit a cache

const QuantizationKernels& kernels() {
#define BBQ_TABLE(target) &target::residual_quantization,
  return of_target({BBQ_FOR_SIMD_TARGETS(BBQ_TABLE)});
#undef BBQ_TABLE
}

Codebooks codebooks_of(const Tensor& contiguous, const QuantizationSizes& s) {
  return {data<float>(contiguous), s.levels, s.size, s.width};
}

// ---- Quantize ----

// The codebooks of a call as the search wants them, and what it must know of them.
struct PackedCodebooks {
  int64_t panels;
  AlignedBuffer<float> words, half_norms;
  std::vector<double> norms;          // (levels, panels)
  std::vector<double> largest_norms;  // (levels)
  double largest_norm = 0;
  bool finite = true;

  PackedCodebooks(const Codebooks& books, const QuantizationKernels& simd)
      : panels(ceil_div(books.size, simd.panel_words)),
        words(books.levels * panels * simd.panel_words * books.width),
        half_norms(books.levels * panels * simd.panel_words),
        norms(books.levels * panels),
        largest_norms(books.levels, 0.0) {
    const int64_t count = books.levels * panels;
    const int64_t unit = std::max<int64_t>(1, kPackedElements / (simd.panel_words * books.width));
    for_all(ceil_div(count, unit), [&](int64_t u) {
      for (int64_t p = u * unit; p < std::min(count, (u + 1) * unit); ++p) {
        simd.pack_panel(books, view(), p / panels, p % panels);
      }
    });
    for (int64_t p = 0; p < count; ++p) {
      finite = finite && std::isfinite(norms[p]);  // double holds the square of every float
      largest_norms[p / panels] = std::max(largest_norms[p / panels], norms[p]);
      largest_norm = std::max(largest_norm, norms[p]);
    }
  }

  Panels view() { return {words.data(), half_norms.data(), norms.data(), panels}; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(Tensor x, Tensor codebooks) {
  using namespace torch::stable;
  const QuantizationSizes s = sizes_of(&x, nullptr, codebooks);
  const Element element = element_of("x", x);
  const Tensor rows = contiguous(x), books = contiguous(codebooks);
  std::vector<int64_t> code_sizes(x.sizes().begin(), x.sizes().end());
  code_sizes.back() = s.levels;
  Tensor codes = new_empty(x, code_sizes, ScalarType::Long);
  Tensor losses = new_empty(books, {s.levels});
  ContiguousOutput quantized(empty_like(x));

  const QuantizationKernels& simd = kernels();
  PackedCodebooks packed(codebooks_of(books, s), simd);
  if (!packed.finite) {  // every row is bad
    fill_(quantized.buffer(), kNaN);
    fill_(codes, -1);
    fill_(losses, s.rows == 0 ? 0.0f : kNaN);
    return {quantized.finish(), codes, losses, clone(losses)};
  }

  const int64_t blocks = ceil_div(s.rows, kBlockRows), row_bytes = s.width * x.element_size();
  std::vector<double> partials(blocks * s.levels);
  std::atomic<bool> any_bad{false};
  QuantizeBlock call{};
  call.element = element;
  call.books = codebooks_of(books, s);
  call.panels = packed.view();
  call.largest_norms = packed.largest_norms.data();
  // A row has at most `width + 64` partial sums of squares: below this, |r|² stays below half of kSafeNorm.
  const bool safe = packed.largest_norm < kSafeNorm / 2;
  call.safe_square = safe ? static_cast<float>(kSafeNorm / 2 / static_cast<double>(s.width + 64)) : 0.0f;
  const char* in = static_cast<const char*>(rows.const_data_ptr());
  char* out = static_cast<char*>(quantized.buffer().mutable_data_ptr());
  int64_t* code_data = static_cast<int64_t*>(codes.mutable_data_ptr());
  const int64_t unit = ceil_div(kSearchProducts, kBlockRows * s.codebook_elements());
  const auto make_residual = [&] { return AlignedBuffer<float>(ceil_div(s.width, kDepth) * kBlockRows * kDepth); };
  for_all(ceil_div(blocks, unit), make_residual, [&](AlignedBuffer<float>& residual, int64_t u) {
    for (int64_t b = u * unit; b < std::min(blocks, (u + 1) * unit); ++b) {
      QuantizeBlock block = call;
      const int64_t first = b * kBlockRows;
      bool bad = false;
      block.rows = std::min(kBlockRows, s.rows - first);
      block.x = in + first * row_bytes;
      block.quantized = out + first * row_bytes;
      block.codes = code_data + first * s.levels;
      block.losses = partials.data() + b * s.levels;
      block.any_bad = &bad;
      block.residual = residual.data();
      simd.quantize(block);
      if (bad) any_bad = true;
    }
  });

  float* loss_data = static_cast<float*>(losses.mutable_data_ptr());
  for (int64_t l = 0; l < s.levels; ++l) {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += partials[b * s.levels + l];
    const double mean = s.rows == 0 ? 0.0 : total / (static_cast<double>(s.rows) * s.width);
    loss_data[l] = any_bad ? kNaN : static_cast<float>(mean);
  }
  return {quantized.finish(), codes, losses, clone(losses)};
}

// ---- Walks along codes ----

// What a walk reads, and how it is cut into units.
class Walks {
 public:
  // `vectors` may be missing, where only codes are walked.
  Walks(const QuantizationSizes& s, const Tensor* vectors, Element element, const Tensor& codes, const Tensor& books)
      : s_(s), row_bytes_(vectors ? s.width * vectors->element_size() : 0) {
    all_.x = vectors ? vectors->const_data_ptr() : nullptr;
    all_.element = element;
    all_.codes = data<int64_t>(codes);
    all_.books = codebooks_of(books, s);
  }

  // Calls f(walk, first row) for units of whole rows.
  template <class F>
  void for_rows(const F& f) {
    const int64_t rows = std::max<int64_t>(1, kWalkedElements / s_.width);
    for_all(ceil_div(s_.rows, rows), [&](int64_t u) { run(u * rows, rows, 0, s_.width, f); });
    throw_if_invalid();
  }

  // Sums into `total`, like the codebooks: f(walk, first row, target, chunk) adds to its columns of `target`, which
  // are zero before. Each chunk of rows has a target of its own, and they are added in order. The number of chunks
  // depends on the sizes alone, and their targets hold fewer than N·D elements.
  template <class F>
  void for_sums(float* total, const F& f) {
    const int64_t elements = s_.codebook_elements(), chunks = chunk_count(s_);
    const int64_t rows = ceil_div(s_.rows, chunks), slices = ceil_div(s_.width, kSliceWidth);
    AlignedBuffer<float> partials((chunks - 1) * elements);  // the first chunk sums into `total`
    for_all(chunks * slices, [&](int64_t u) {
      const int64_t c = u / slices, begin = u % slices * kSliceWidth, end = std::min(s_.width, begin + kSliceWidth);
      float* target = c == 0 ? total : partials.data() + (c - 1) * elements;
      for (int64_t w = 0; w < s_.levels * s_.size; ++w) {
        std::fill(target + w * s_.width + begin, target + w * s_.width + end, 0.0f);
      }
      run(c * rows, rows, begin, end, [&](const Walk& walk, int64_t first) { f(walk, first, target, c); });
    });
    throw_if_invalid();
    if (chunks == 1) return;
    constexpr int64_t kElements = 4096;
    for_all(ceil_div(elements, kElements), [&](int64_t u) {
      const int64_t begin = u * kElements, end = std::min(elements, begin + kElements);
      for (int64_t c = 0; c + 1 < chunks; ++c) {
        const float* partial = partials.data() + c * elements;
        for (int64_t e = begin; e < end; ++e) total[e] += partial[e];
      }
    });
  }

  static int64_t chunk_count(const QuantizationSizes& s) {
    const int64_t rows = std::max(kChunkRows, s.size * std::max<int64_t>(8, s.levels));
    return std::clamp<int64_t>(s.rows / rows, 1, kMaxChunks);
  }

 private:
  template <class F>
  void run(int64_t first, int64_t rows, int64_t begin, int64_t end, const F& f) {
    bool valid = true;
    Walk walk = all_;
    walk.x = static_cast<const char*>(all_.x) + first * row_bytes_;
    walk.codes += first * s_.levels;
    walk.rows = std::min(rows, s_.rows - first);
    walk.begin = begin;
    walk.end = end;
    walk.codes_valid = &valid;
    if (walk.rows > 0) f(walk, first);
    if (!valid) invalid_ = true;
  }

  // A throw inside for_all would lose its message.
  void throw_if_invalid() const {
    if (!invalid_) return;
    const auto [low, high] = std::minmax_element(all_.codes, all_.codes + s_.rows * s_.levels);
    throw std::out_of_range("codes: got " + std::to_string(*low < -1 ? *low : *high) + ", expected -1 to " +
                            std::to_string(s_.size - 1) + " (codebook_size - 1)");
  }

  QuantizationSizes s_;
  int64_t row_bytes_;
  Walk all_{};
  std::atomic<bool> invalid_{false};
};

std::vector<float> loss_scales(const char* name, const std::optional<Tensor>& grad, const QuantizationSizes& s) {
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
  const QuantizationSizes s = sizes_of(&x, &codes, codebooks);
  const Tensor rows = contiguous(x), books = contiguous(codebooks), dense_codes = contiguous(codes);
  const std::vector<float> x_scales = loss_scales("grad_commitment_loss", grad_commitment_loss, s);
  const std::vector<float> book_scales = loss_scales("grad_codebook_loss", grad_codebook_loss, s);
  std::optional<Tensor> upstream;
  if (grad_quantized.has_value()) {
    check_upstream("grad_quantized", *grad_quantized, x.numel(), x.scalar_type());
    if (need_x) upstream = contiguous(*grad_quantized);
  }
  ContiguousOutput grad_x(need_x ? empty_like(x) : new_empty(x, {0}));
  ContiguousOutput grad_books(need_codebooks ? empty_like(codebooks) : new_empty(codebooks, {0}));

  const QuantizationKernels& simd = kernels();
  Walks walks(s, &rows, element_of("x", x), dense_codes, books);
  const int64_t row_bytes = s.width * x.element_size();
  const char* up = upstream ? static_cast<const char*>(upstream->const_data_ptr()) : nullptr;
  char* out = need_x ? static_cast<char*>(grad_x.buffer().mutable_data_ptr()) : nullptr;
  const auto run = [&](const Walk& walk, int64_t first, float* target) {
    simd.quantize_backward({walk, up ? up + first * row_bytes : nullptr, out ? out + first * row_bytes : nullptr,
                            x_scales.data(), target, book_scales.data()});
  };
  if (need_codebooks) {
    walks.for_sums(static_cast<float*>(grad_books.buffer().mutable_data_ptr()),
                   [&](const Walk& walk, int64_t first, float* target, int64_t) { run(walk, first, target); });
  } else if (need_x) {
    walks.for_rows([&](const Walk& walk, int64_t first) { run(walk, first, nullptr); });
  }
  return {grad_x.finish(), grad_books.finish()};
}

Tensor decode(Tensor codes, Tensor codebooks) {
  using namespace torch::stable;
  const QuantizationSizes s = sizes_of(nullptr, &codes, codebooks);
  const Tensor books = contiguous(codebooks), dense_codes = contiguous(codes);
  std::vector<int64_t> sizes(codes.sizes().begin(), codes.sizes().end());
  sizes.back() = s.width;
  Tensor output = new_empty(books, sizes);
  float* out = static_cast<float*>(output.mutable_data_ptr());
  const QuantizationKernels& simd = kernels();
  Walks(s, nullptr, Element::kFloat32, dense_codes, books).for_rows([&](const Walk& walk, int64_t first) {
    simd.decode(walk, out + first * s.width);
  });
  return output;
}

Tensor decode_backward(Tensor grad, Tensor codes, Tensor codebooks) {
  using namespace torch::stable;
  const QuantizationSizes s = sizes_of(&grad, &codes, codebooks);
  check_upstream("grad", grad, s.rows * s.width, ScalarType::Float);
  const Tensor dense = contiguous(grad), books = contiguous(codebooks), dense_codes = contiguous(codes);
  ContiguousOutput output(empty_like(codebooks));
  const QuantizationKernels& simd = kernels();
  Walks(s, &dense, Element::kFloat32, dense_codes, books)
      .for_sums(static_cast<float*>(output.buffer().mutable_data_ptr()),
                [&](const Walk& walk, int64_t, float* target, int64_t) { simd.decode_backward(walk, target); });
  return output.finish();
}

std::tuple<Tensor, Tensor> statistics(Tensor x, Tensor codes, Tensor codebooks) {
  using namespace torch::stable;
  const QuantizationSizes s = sizes_of(&x, &codes, codebooks);
  const Tensor rows = contiguous(x), books = contiguous(codebooks), dense_codes = contiguous(codes);
  Tensor counts = new_empty(books, {s.levels, s.size}), sums = new_empty(books, {s.levels, s.size, s.width});
  const QuantizationKernels& simd = kernels();
  const int64_t words = s.levels * s.size, chunks = Walks::chunk_count(s);
  std::vector<int64_t> partials(chunks * words, 0);  // a float stops counting at 2^24
  Walks(s, &rows, element_of("x", x), dense_codes, books)
      .for_sums(static_cast<float*>(sums.mutable_data_ptr()),
                [&](const Walk& walk, int64_t, float* target, int64_t chunk) {
                  simd.statistics(walk, target, walk.begin == 0 ? partials.data() + chunk * words : nullptr);
                });
  float* count_data = static_cast<float*>(counts.mutable_data_ptr());
  for (int64_t w = 0; w < words; ++w) {
    int64_t total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partials[c * words + w];
    count_data[w] = static_cast<float>(total);
  }
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
