// The Python module _simt: for tests only, in no wheel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt/queue.h"

namespace bbq {
void bind_residual_quantization(pybind11::module_& m);
void bind_selftest(pybind11::module_& m);
void bind_similarity_attention(pybind11::module_& m);

namespace simt {
Limits& limits() {
  static Limits value;
  return value;
}
}  // namespace simt
}  // namespace bbq

PYBIND11_MODULE(_simt, m) {
  namespace py = pybind11;
  namespace simt = bbq::simt;
  py::register_exception<simt::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("set_order", [](const std::string& name) {
    if (name != "forward" && name != "reverse" && name != "shuffled") throw py::value_error("order: got " + name);
    simt::set_order(name == "forward"   ? simt::Order::kForward
                    : name == "reverse" ? simt::Order::kReverse
                                        : simt::Order::kShuffled);
  });
  m.def("set_limits", [](int processors, int shared_per_block) { simt::limits() = {processors, shared_per_block}; });
  m.def("synchronizations", &simt::synchronizations);
  m.def("leave_out", &simt::leave_out);
  bbq::bind_residual_quantization(m);
  bbq::bind_selftest(m);
  bbq::bind_similarity_attention(m);
}
