// Residual quantization in csrc/simt, on NumPy arrays. bfloat16 arrives as uint16.
#include "cuda/residual_quantization.cuh"

#include <pybind11/stl.h>

#include "simt/queue.h"

namespace bbq {
namespace {

namespace py = pybind11;
using Optional = std::optional<py::array>;
using Sizes = std::vector<py::ssize_t>;

struct SimtQueue : simt::Queue {
  Machine machine() const {
    const simt::Limits& l = simt::limits();
    return {l.processors, l.shared_per_block, l.shared_per_block + 1024};
  }
};

Float type_of(const py::array& array) {
  if (array.dtype().is(py::dtype::of<float>())) return Float::kFloat32;
  if (array.dtype().kind() == 'f' && array.itemsize() == 2) return Float::kHalf;
  if (array.dtype().is(py::dtype::of<uint16_t>())) return Float::kBFloat16;
  throw py::type_error("expected float32, float16, or uint16 for bfloat16");
}

InputRows input_rows(SimtQueue& queue, const char* name, const py::array& array) {
  const auto data = array.itemsize() == 4 ? queue.input<float>(name, array).as<const unsigned char>()
                                          : queue.input<uint16_t>(name, array).as<const unsigned char>();
  return {data, type_of(array), array.shape(1)};
}
OutputRows output_rows(SimtQueue& queue, const char* name, py::array& array) {
  return {queue.output<unsigned char>(name, array), type_of(array), array.shape(1)};
}

RowShape shape_of(int64_t rows, const py::array& codebooks) {
  return {rows, codebooks.shape(2), static_cast<int>(codebooks.shape(0)), codebooks.shape(1)};
}

py::array like(const py::array& array, const Sizes& shape) { return py::array(array.dtype(), shape); }
py::array floats(const Sizes& shape) { return py::array_t<float>(shape); }

// x (N, D), codebooks (L, K, D): quantized, codes, and both losses.
py::tuple quantize(const py::array& x, const py::array& codebooks) {
  SimtQueue queue;
  const RowShape s = shape_of(x.shape(0), codebooks);
  py::array quantized = like(x, {s.rows, s.width}), codes = py::array_t<int64_t>({s.rows, int64_t{s.levels}});
  py::array commitment = floats({s.levels}), codebook = floats({s.levels});
  residual_quantize(
      queue, {input_rows(queue, "x", x), queue.input<float>("codebooks", codebooks),
              output_rows(queue, "quantized", quantized), queue.output<int64_t>("codes", codes),
              queue.output<float>("commitment_loss", commitment), queue.output<float>("codebook_loss", codebook), s});
  return py::make_tuple(quantized, codes, commitment, codebook);
}

py::tuple quantize_backward(const py::array& x, const py::array& codebooks, const py::array& codes, const Optional& up,
                            const Optional& commitment, const Optional& codebook, bool need_x, bool need_codebooks) {
  SimtQueue queue;
  const RowShape s = shape_of(x.shape(0), codebooks);
  py::array grad_x = like(x, need_x ? Sizes{s.rows, s.width} : Sizes{0, s.width});
  py::array grad_books = floats(need_codebooks ? Sizes{s.levels, s.size, s.width} : Sizes{0});
  const auto rows = input_rows(queue, "x", x);
  const auto books = queue.input<float>("codebooks", codebooks);
  const auto code_data = queue.input<int64_t>("codes", codes);
  const auto optional = [&](const char* name, const Optional& array) {
    return array ? queue.input<float>(name, *array) : Global<const float>(nullptr);
  };
  if (need_x) {
    const InputRows none{nullptr, rows.type, s.width};
    gradient_of_rows(queue, {rows, books, code_data, up ? input_rows(queue, "grad_quantized", *up) : none,
                             optional("grad_commitment_loss", commitment), output_rows(queue, "grad_x", grad_x), s});
  }
  if (need_codebooks) {
    sum_rows<Sum::kRest>(queue, rows, code_data, books, optional("grad_codebook_loss", codebook),
                         queue.output<float>("grad_codebooks", grad_books), s);
  }
  return py::make_tuple(grad_x, grad_books);
}

py::array decode(const py::array& codes, const py::array& codebooks) {
  SimtQueue queue;
  const RowShape s = shape_of(codes.shape(0), codebooks);
  py::array output = floats({s.rows, s.width});
  residual_decode(queue, {queue.input<int64_t>("codes", codes), queue.input<float>("codebooks", codebooks),
                          output_rows(queue, "output", output), s});
  return output;
}

py::array decode_backward(const py::array& grad, const py::array& codes, const py::array& codebooks) {
  SimtQueue queue;
  const RowShape s = shape_of(codes.shape(0), codebooks);
  py::array output = floats({s.levels, s.size, s.width});
  sum_rows<Sum::kRow>(queue, input_rows(queue, "grad", grad), queue.input<int64_t>("codes", codes), nullptr, nullptr,
                      queue.output<float>("grad_codebooks", output), s);
  return output;
}

py::tuple statistics(const py::array& x, const py::array& codes, const py::array& codebooks) {
  SimtQueue queue;
  const RowShape s = shape_of(x.shape(0), codebooks);
  py::array counts = floats({s.levels, s.size}), sums = floats({s.levels, s.size, s.width});
  const auto code_data = queue.input<int64_t>("codes", codes);
  count_codes(queue, code_data, queue.output<float>("counts", counts), s);
  sum_rows<Sum::kResidual>(queue, input_rows(queue, "x", x), code_data, queue.input<float>("codebooks", codebooks),
                           nullptr, queue.output<float>("sums", sums), s);
  return py::make_tuple(counts, sums);
}

}  // namespace

void bind_residual_quantization(py::module_& m) {
  m.def("residual_quantize", &quantize);
  m.def("residual_quantize_backward", &quantize_backward);
  m.def("residual_decode", &decode);
  m.def("residual_decode_backward", &decode_backward);
  m.def("residual_statistics", &statistics);
}

}  // namespace bbq
