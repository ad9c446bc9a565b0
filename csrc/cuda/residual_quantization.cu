// Residual quantization for the CUDA key of the operators in bbqrec_kernels/residual_quantization/ops.py.
#include "common/quantization_arguments.h"
#include "cuda/launch.cuh"
#include "cuda/residual_quantization.cuh"

namespace bbq {
namespace {

using namespace torch::stable;

RowShape shape_of(const Tensor* vectors, const Tensor* codes, const Tensor& codebooks) {
  const QuantizationSizes s = sizes_of(vectors, codes, codebooks);
  return {s.rows, s.width, static_cast<int>(s.levels), s.size};
}

Float type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Float::kFloat32;
    case ScalarType::BFloat16:
      return Float::kBFloat16;
    case ScalarType::Half:
      return Float::kHalf;
    default:
      throw std::invalid_argument(std::string(name) + ": expected dtype float32, bfloat16 or float16");
  }
}

InputRows input_rows(const char* name, const Tensor& tensor, int64_t width) {
  return {static_cast<const unsigned char*>(tensor.const_data_ptr()), type_of(name, tensor), width};
}
OutputRows output_rows(const Tensor& tensor, int64_t width) {
  return {static_cast<unsigned char*>(tensor.mutable_data_ptr()), type_of("output", tensor), width};
}

std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = last;
  return sizes;
}

// A contiguous gradient of a loss, or nothing.
std::optional<Tensor> loss_gradient(const char* name, const std::optional<Tensor>& grad, const RowShape& s) {
  if (!grad) return std::nullopt;
  check_upstream(name, *grad, s.levels, ScalarType::Float);
  return contiguous(*grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(Tensor x, Tensor codebooks) {
  const RowShape s = shape_of(&x, nullptr, codebooks);
  const Tensor rows = contiguous(x), books = contiguous(codebooks);
  Tensor codes = new_empty(x, with_last(x, s.levels), ScalarType::Long);
  Tensor commitment = new_empty(books, {s.levels}), codebook = new_empty(books, {s.levels});
  ContiguousOutput quantized(empty_like(x));
  CudaQueue queue(books);
  residual_quantize(queue,
                    {input_rows("x", rows, s.width), data<float>(books), output_rows(quantized.buffer(), s.width),
                     mutable_data<int64_t>(codes), mutable_data<float>(commitment), mutable_data<float>(codebook), s});
  return {quantized.finish(), codes, commitment, codebook};
}

std::tuple<Tensor, Tensor> quantize_backward(Tensor x, Tensor codebooks, Tensor codes,
                                             std::optional<Tensor> grad_quantized,
                                             std::optional<Tensor> grad_commitment_loss,
                                             std::optional<Tensor> grad_codebook_loss, bool need_x,
                                             bool need_codebooks) {
  const RowShape s = shape_of(&x, &codes, codebooks);
  const Tensor rows = contiguous(x), books = contiguous(codebooks), dense_codes = contiguous(codes);
  const auto commitment = loss_gradient("grad_commitment_loss", grad_commitment_loss, s);
  const auto codebook = loss_gradient("grad_codebook_loss", grad_codebook_loss, s);
  if (grad_quantized) check_upstream("grad_quantized", *grad_quantized, x.numel(), x.scalar_type());
  const InputRows row_data = input_rows("x", rows, s.width);
  Tensor grad_x = need_x ? empty_like(x) : new_empty(x, {0});
  Tensor grad_books = need_codebooks ? empty_like(codebooks) : new_empty(codebooks, {0});
  CudaQueue queue(books);
  if (need_x) {
    std::optional<Tensor> upstream;
    if (grad_quantized) upstream = contiguous(*grad_quantized);
    const InputRows none{nullptr, row_data.type, s.width};
    ContiguousOutput output(grad_x);
    gradient_of_rows(queue,
                     {row_data, data<float>(books), data<int64_t>(dense_codes),
                      upstream ? input_rows("grad_quantized", *upstream, s.width) : none,
                      commitment ? data<float>(*commitment) : nullptr, output_rows(output.buffer(), s.width), s});
    grad_x = output.finish();
  }
  if (need_codebooks) {
    ContiguousOutput output(grad_books);
    sum_rows<Sum::kRest>(queue, row_data, data<int64_t>(dense_codes), data<float>(books),
                         codebook ? data<float>(*codebook) : nullptr, mutable_data<float>(output.buffer()), s);
    grad_books = output.finish();
  }
  return {grad_x, grad_books};
}

Tensor decode(Tensor codes, Tensor codebooks) {
  const RowShape s = shape_of(nullptr, &codes, codebooks);
  const Tensor books = contiguous(codebooks), dense_codes = contiguous(codes);
  Tensor output = new_empty(books, with_last(codes, s.width));
  CudaQueue queue(books);
  residual_decode(queue, {data<int64_t>(dense_codes), data<float>(books), output_rows(output, s.width), s});
  return output;
}

Tensor decode_backward(Tensor grad, Tensor codes, Tensor codebooks) {
  const RowShape s = shape_of(&grad, &codes, codebooks);
  check_upstream("grad", grad, s.rows * s.width, ScalarType::Float);
  const Tensor dense = contiguous(grad), dense_codes = contiguous(codes);
  ContiguousOutput output(empty_like(codebooks));
  CudaQueue queue(dense);
  sum_rows<Sum::kRow>(queue, input_rows("grad", dense, s.width), data<int64_t>(dense_codes), nullptr, nullptr,
                      mutable_data<float>(output.buffer()), s);
  return output.finish();
}

std::tuple<Tensor, Tensor> statistics(Tensor x, Tensor codes, Tensor codebooks) {
  const RowShape s = shape_of(&x, &codes, codebooks);
  const Tensor rows = contiguous(x), books = contiguous(codebooks), dense_codes = contiguous(codes);
  Tensor counts = new_empty(books, {s.levels, s.size}), sums = new_empty(books, {s.levels, s.size, s.width});
  CudaQueue queue(books);
  count_codes(queue, data<int64_t>(dense_codes), mutable_data<float>(counts), s);
  sum_rows<Sum::kResidual>(queue, input_rows("x", rows, s.width), data<int64_t>(dense_codes), data<float>(books),
                           nullptr, mutable_data<float>(sums), s);
  return {counts, sums};
}

}  // namespace
}  // namespace bbq

STABLE_TORCH_LIBRARY_IMPL(bbqrec_kernels, CUDA, m) {
  m.impl("residual_quantize", TORCH_BOX(&bbq::quantize));
  m.impl("residual_quantize_backward", TORCH_BOX(&bbq::quantize_backward));
  m.impl("residual_decode", TORCH_BOX(&bbq::decode));
  m.impl("residual_decode_backward", TORCH_BOX(&bbq::decode_backward));
  m.impl("residual_statistics", TORCH_BOX(&bbq::statistics));
}
