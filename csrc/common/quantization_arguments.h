// What the operators of residual quantization are given, checked alike for every device. The public functions check
// arguments in full; this keeps addresses inside the tensors when an operator is called directly.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "tensors.h"

namespace bbq {

struct QuantizationSizes {
  int64_t rows, levels, size, width;
  int64_t codebook_elements() const { return levels * size * width; }
};

// The sizes of a call. `vectors` (..., D) and `codes` (..., L) may be missing.
inline QuantizationSizes sizes_of(const Tensor* vectors, const Tensor* codes, const Tensor& codebooks) {
  if (codebooks.dim() != 3 || codebooks.scalar_type() != ScalarType::Float) {
    throw std::invalid_argument("codebooks: expected 3 dimensions (levels, codebook_size, D) of float32");
  }
  QuantizationSizes s{0, codebooks.size(0), codebooks.size(1), codebooks.size(2)};
  if (s.codebook_elements() == 0) {
    throw std::invalid_argument("codebooks: expected at least one level, codeword and D");
  }
  if (s.size > INT32_MAX) {
    throw std::invalid_argument("codebooks: got " + std::to_string(s.size) +
                                " codewords a level, expected at most 2**31 - 1");
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

inline void check_upstream(const char* name, const Tensor& grad, int64_t elements, ScalarType dtype) {
  if (grad.numel() != elements || grad.scalar_type() != dtype) {
    throw std::invalid_argument(std::string(name) + ": expected the shape and dtype of what it is the gradient of");
  }
}

}  // namespace bbq
