// Similarity-reweighted attention in csrc/simt, on NumPy arrays: arguments as in ops.py, outputs as the last ones.
// Arrays of heads may have any strides whose last one is dense. bfloat16 arrives as uint16.
#include "cuda/similarity_attention.cuh"

#include <pybind11/stl.h>

#include <optional>

#include "simt/queue.h"

namespace bbq {
namespace {

namespace py = pybind11;
using namespace attention;
using Optional = std::optional<py::array>;
using Arrays = std::vector<py::array>;
using Integers = std::vector<int64_t>;

struct SimtQueue : simt::Queue {
  Machine machine() const {
    const simt::Limits& l = simt::limits();
    return {l.processors, l.shared_per_block, l.shared_per_block + 1024};
  }
};

// (B, H, S, D) or (T, H, D), with all bytes between its first and last element.
template <class T, class Array>
HeadRows<T> head_rows(SimtQueue& queue, const char* name, const Array& array) {
  const py::ssize_t dims = array.ndim(), size = array.itemsize();
  if (size != sizeof(T)) throw py::type_error(std::string(name) + ": expected the dtype of query");
  if (array.size() > 0 && array.shape(dims - 1) > 1 && array.strides(dims - 1) != size) {
    throw py::value_error(std::string(name) + ": expected a dense last dimension");
  }
  size_t bytes = array.size() ? size : 0;
  for (py::ssize_t i = 0; array.size() && i < dims; ++i) bytes += (array.shape(i) - 1) * array.strides(i);
  const auto stride = [&](py::ssize_t i) { return static_cast<int64_t>(array.strides(i) / size); };
  HeadRows<T> rows;
  rows.data = queue.region<T>(name, const_cast<void*>(array.data()), bytes);
  rows.batch = dims == 4 ? stride(0) : 0;
  rows.head = stride(1);
  rows.token = stride(dims == 4 ? 2 : 0);
  rows.aligned = is_aligned<T>(reinterpret_cast<uintptr_t>(array.data()), rows.batch, rows.head, rows.token);
  return rows;
}

template <class T>
HeadRows<T> head_rows(SimtQueue& queue, const char* name, const Optional& array) {
  return array ? head_rows<T>(queue, name, *array) : HeadRows<T>{nullptr, 0, 0, 0, false};
}

struct TermArguments {
  const py::array& biases;
  const Arrays &queries, &keys, &boundaries;
  const Integers &kinds, &bits, &buckets;
};

Problem problem_of(SimtQueue& queue, const py::array& query, const py::array& key, const TermArguments& terms,
                   const Optional& query_lengths, const Optional& key_lengths, const Optional& starts,
                   int64_t max_seqlen, bool is_causal, double scale) {
  const auto lengths = [&](const char* name, const Optional& array) {
    return array ? queue.input<int64_t>(name, *array) : Global<const int64_t>(nullptr);
  };
  Problem p{};
  p.layout.starts = starts ? queue.input<int32_t>("cu_seqlens", *starts) : Global<const int32_t>(nullptr);
  p.layout.query_lengths = lengths("query_lengths", query_lengths);
  p.layout.key_lengths = lengths("key_lengths", key_lengths);
  p.layout.count = starts ? starts->shape(0) - 1 : query.shape(0);
  p.layout.tokens = starts ? query.shape(0) : 0;
  p.layout.rows = static_cast<int>(starts ? max_seqlen : query.shape(2));
  p.layout.columns = static_cast<int>(starts ? max_seqlen : key.shape(2));
  p.heads = static_cast<int>(query.shape(1));
  p.width = static_cast<int>(query.shape(query.ndim() - 1));
  p.scale = static_cast<float>(scale);
  p.is_causal = is_causal;
  const auto tables = queue.input<float>("biases", terms.biases);
  for (size_t t = 0; t < terms.kinds.size(); ++t) {
    TermData term;
    term.kind = static_cast<Kind>(terms.kinds[t]);
    term.buckets = terms.buckets[t];
    term.bits = terms.bits[t];
    const py::array &left = terms.queries[t], &right = terms.keys[t];
    const bool one_value = term.kind == Kind::kGap || term.bits != 0;
    term.width = one_value ? 1 : left.shape(left.ndim() - 1);
    term.channels = left.shape(left.ndim() - (one_value ? 1 : 2));
    if (term.kind == Kind::kCosine) {
      term.query_vectors = queue.input<float>("vectors", left);
      term.key_vectors = queue.input<float>("key_vectors", right);
      term.boundaries = queue.input<float>("boundaries", terms.boundaries[t]);
    } else {
      term.query = queue.input<int64_t>("codes", left);
      term.key = queue.input<int64_t>("key_codes", right);
    }
    add_channels(p, term, tables);
  }
  return p;
}

template <class F>
void with_type(const py::array& array, const F& f) {
  if (array.dtype().is(py::dtype::of<float>())) return f(float{});
  if (array.dtype().kind() == 'f' && array.itemsize() == 2) return f(Half{});
  if (array.dtype().is(py::dtype::of<uint16_t>())) return f(BFloat16{});
  throw py::type_error("expected float32, float16, or uint16 for bfloat16");
}

// `starts` is given for the packed form, with the longest of its sequences.
void attend(const py::array& query, const py::array& key, const py::array& value, const py::array& biases,
            const Arrays& term_queries, const Arrays& term_keys, const Arrays& boundaries, const Integers& kinds,
            const Integers& bits, const Integers& buckets, const Optional& query_lengths, const Optional& key_lengths,
            const Optional& starts, int64_t max_seqlen, bool is_causal, double scale, py::array& output,
            py::array& logsumexp) {
  SimtQueue queue;
  const Problem p = problem_of(queue, query, key, {biases, term_queries, term_keys, boundaries, kinds, bits, buckets},
                               query_lengths, key_lengths, starts, max_seqlen, is_causal, scale);
  with_type(query, [&](auto type) {
    using T = decltype(type);
    forward<T>(queue, {p, head_rows<const T>(queue, "query", query), head_rows<const T>(queue, "key", key),
                       head_rows<const T>(queue, "value", value), head_rows<T>(queue, "output", output),
                       queue.output<double>("logsumexp", logsumexp)});
  });
}

void attend_backward(const py::array& grad, const py::array& output, const py::array& logsumexp, const py::array& query,
                     const py::array& key, const py::array& value, const py::array& biases, const Arrays& term_queries,
                     const Arrays& term_keys, const Arrays& boundaries, const Integers& kinds, const Integers& bits,
                     const Integers& buckets, const Optional& query_lengths, const Optional& key_lengths,
                     const Optional& starts, int64_t max_seqlen, bool is_causal, double scale,
                     const Optional& grad_query, const Optional& grad_key, const Optional& grad_value,
                     Optional grad_biases) {
  SimtQueue queue;
  const Problem p = problem_of(queue, query, key, {biases, term_queries, term_keys, boundaries, kinds, bits, buckets},
                               query_lengths, key_lengths, starts, max_seqlen, is_causal, scale);
  with_type(query, [&](auto type) {
    using T = decltype(type);
    backward<T>(queue, {p, head_rows<const T>(queue, "query", query), head_rows<const T>(queue, "key", key),
                        head_rows<const T>(queue, "value", value), head_rows<const T>(queue, "output", output),
                        head_rows<const T>(queue, "grad", grad), queue.input<double>("logsumexp", logsumexp),
                        head_rows<T>(queue, "grad_query", grad_query), head_rows<T>(queue, "grad_key", grad_key),
                        head_rows<T>(queue, "grad_value", grad_value),
                        grad_biases ? queue.output<float>("grad_biases", *grad_biases) : Global<float>(nullptr)});
  });
}

}  // namespace

void bind_similarity_attention(py::module_& m) {
  m.def("similarity_attention", &attend);
  m.def("similarity_attention_backward", &attend_backward);
}

}  // namespace bbq
