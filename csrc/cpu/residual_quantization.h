// What residual_quantization.cpp, which knows tensors and threads, asks of the SIMD kernels, compiled once per target.
// Plain structures and pointers to contiguous memory; sizes as in the operator: codebooks (levels, size, width).
#pragma once

#include <stdint.h>

#include "simd_targets.h"

namespace bbq {

struct Codebooks {
  const float* words;  // (levels, size, width)
  int64_t levels, size, width;
};

// Rows of one unit of work of the search, and of one partial sum of the losses.
constexpr int64_t kBlockRows = 48;
// While |r|² + |c|² stays below this, no partial sum of r·c overflows, and neither does a score.
constexpr double kSafeNorm = __FLT_MAX__ / 4;
// Products summed in one go: rounding errors grow with kDepth + width / kDepth. A block keeps its residuals in slabs
// of kDepth columns: [width / kDepth][kBlockRows][kDepth], zero behind the last column.
constexpr int64_t kDepth = 64;

// Codebooks rearranged for the search: [level][panel][width][panel_words] codewords and [level][panel][panel_words]
// half squared norms, infinite for words past the last. Aligned to vectors.
struct Panels {
  float* words;
  float* half_norms;
  double* norms;  // [level][panel]: largest squared norm; not finite if any word is not
  int64_t count;  // of a level
};

struct QuantizeBlock {
  const void* x;  // (rows, width)
  void* quantized;
  Element element;  // of both
  int64_t rows;     // at most kBlockRows
  int64_t* codes;   // (rows, levels)
  double* losses;   // (levels): sums of squares
  bool* any_bad;
  Codebooks books;
  Panels panels;
  const double* largest_norms;  // (levels)
  float safe_square;            // while partial sums of squares stay below this, nothing overflows
  float* residual;              // scratch: the slabs of a block, aligned to vectors
};

// Columns `begin` to `end` of some rows, in a walk along the codes of each.
struct Walk {
  const void* x;
  Element element;
  const int64_t* codes;  // (rows, levels)
  int64_t rows, begin, end;
  Codebooks books;
  bool* codes_valid;  // false where a code is out of range; nothing is read or written for it
};

struct QuantizeGradient {
  Walk walk;
  const void* grad_quantized;  // like x, or null
  void* grad_x;                // like x, or null
  const float* x_scales;       // (levels)
  float* grad_codebooks;       // like the codebooks, added to, or null
  const float* book_scales;    // (levels)
};

struct QuantizationKernels {
  int64_t panel_words;
  void (*pack_panel)(const Codebooks&, const Panels&, int64_t level, int64_t panel);
  void (*quantize)(const QuantizeBlock&);
  void (*quantize_backward)(const QuantizeGradient&);
  void (*decode)(const Walk&, float* output);
  void (*decode_backward)(const Walk&, float* grad_codebooks);  // the gradients are walk.x
  void (*statistics)(const Walk&, float* sums, int64_t* counts);
};

#define BBQ_DECLARE(target)                               \
  namespace target {                                      \
  extern const QuantizationKernels residual_quantization; \
  }
BBQ_FOR_SIMD_TARGETS(BBQ_DECLARE)
#undef BBQ_DECLARE

}  // namespace bbq
