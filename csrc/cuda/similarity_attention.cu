// Similarity-reweighted attention for the CUDA key of the operators in bbqrec_kernels/similarity_attention/ops.py.
#include "common/attention_arguments.h"
#include "cuda/launch.cuh"
#include "cuda/similarity_attention.cuh"

namespace bbq {
namespace {

using namespace attention;
using namespace torch::stable;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// Rows as kernels read them: a copy where the last dimension is not dense.
Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : contiguous(tensor);
}

template <class T, class Data>
HeadRows<T> head_rows(const Tensor& tensor, Data* data) {
  const bool padded = tensor.dim() == 4;
  HeadRows<T> rows{static_cast<T*>(data), padded ? tensor.stride(0) : 0, tensor.stride(1),
                   tensor.stride(padded ? 2 : 0), false};
  rows.aligned = is_aligned<T>(reinterpret_cast<uintptr_t>(data), rows.batch, rows.head, rows.token);
  return rows;
}
template <class T>
HeadRows<const T> input(const Tensor& tensor) {
  return head_rows<const T>(tensor, tensor.const_data_ptr());
}

// Rows that kernels write: those of the output, or of a buffer where its last dimension is not dense.
class OutputRows {
 public:
  OutputRows(const Tensor& like, bool needed)
      : output_(needed ? empty_like(like) : new_empty(like, {0})), needed_(needed) {
    buffer_ = needed ? with_dense_rows(output_) : output_;
  }
  template <class T>
  HeadRows<T> rows() const {
    return needed_ ? head_rows<T>(buffer_, buffer_.mutable_data_ptr()) : HeadRows<T>{nullptr, 0, 0, 0, false};
  }
  Tensor finish() {
    if (buffer_.get() != output_.get()) copy_(output_, buffer_);
    return output_;
  }

 private:
  Tensor output_, buffer_;
  bool needed_;
};

// The arguments of a call, checked, and the contiguous tensors that the kernels' description of them points into.
struct Call {
  Call(const Tensor& q, const Tensor& k, const Tensor& v, int64_t dims, bool is_causal, double scale)
      : query(with_dense_rows(q)), key(with_dense_rows(k)), value(with_dense_rows(v)) {
    check_heads(q, k, v, dims);
    for (const Tensor& t : {k, v}) check_device("key, value", t);
    if (q.size(-1) > 256) throw std::invalid_argument("query: expected a head size of at most 256");
    if (q.size(1) > kLargest) throw std::invalid_argument("query: expected fewer heads");
    problem.heads = static_cast<int>(q.size(1));
    problem.width = static_cast<int>(q.size(-1));
    problem.scale = static_cast<float>(scale);
    problem.is_causal = is_causal;
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void set_padded(const TermArguments& arguments, const MaybeTensor& query_lengths, const MaybeTensor& key_lengths) {
    Layout& l = problem.layout;
    l.count = query.size(0);
    l.rows = size_of(query.size(2));
    l.columns = size_of(key.size(2));
    const auto lengths = [&](const MaybeTensor& tensor) -> const int64_t* {
      check_lengths(tensor, l.count);
      return tensor ? data<int64_t>(keep("query_lengths, key_lengths", contiguous(*tensor))) : nullptr;
    };
    l.query_lengths = lengths(query_lengths);
    l.key_lengths = lengths(key_lengths);
    set_terms(arguments, l.count * l.rows, l.count * l.columns);
  }

  // Values of `cu_seqlens` are on the device: the kernels keep inside the tensors whatever they are.
  void set_packed(const TermArguments& arguments, const Tensor& cu_seqlens, int64_t max_seqlen) {
    Layout& l = problem.layout;
    if (cu_seqlens.scalar_type() != ScalarType::Int || cu_seqlens.numel() < 1 || max_seqlen < 0) {
      throw std::invalid_argument(
          "cu_seqlens: expected int32 values, one more than there are sequences, and max_seqlen "
          "of at least 0");
    }
    l.starts = data<int32_t>(keep("cu_seqlens", contiguous(cu_seqlens)));
    l.count = cu_seqlens.numel() - 1;
    l.tokens = query.size(0);
    l.rows = l.columns = size_of(max_seqlen < l.tokens ? max_seqlen : l.tokens);
    set_terms(arguments, l.tokens, l.tokens);
  }

  Tensor query, key, value;
  Problem problem{};

 private:
  static constexpr int64_t kLargest = 1 << 30;  // tokens of a sequence: indices of tokens are int

  static int size_of(int64_t tokens) {
    if (tokens > kLargest) throw std::invalid_argument("query, key: expected at most 2**30 tokens in a sequence");
    return static_cast<int>(tokens);
  }
  void check_device(const char* name, const Tensor& tensor) const {
    if (!tensor.is_cuda() || tensor.get_device_index() != query.get_device_index()) {
      throw std::invalid_argument(std::string(name) + ": expected tensors on the device of query");
    }
  }
  const Tensor& keep(const char* name, const Tensor& tensor) {
    check_device(name, tensor);
    kept_.push_back(tensor);
    return kept_.back();
  }

  void set_terms(const TermArguments& arguments, int64_t query_tokens, int64_t key_tokens) {
    const std::vector<Term> terms = read_terms(arguments, problem.heads, query_tokens, key_tokens);
    const float* tables = data<float>(keep("biases", contiguous(arguments.biases)));
    for (const Term& term : terms) {
      if (term.buckets > kMaxBuckets || (term.bits > 0 && term.buckets - 1 > kMaxLevels)) {
        throw std::invalid_argument("terms: expected at most 64 buckets, and 16 levels");
      }
      TermData given{term.kind, term.channels, term.buckets, term.width, term.bits};
      if (term.kind == Kind::kCosine) {
        given.query_vectors = data<float>(keep("terms", term.query));
        given.key_vectors = data<float>(keep("terms", term.key));
        given.boundaries = data<float>(keep("terms", term.boundaries));
      } else {
        given.query = data<int64_t>(keep("terms", term.query));
        given.key = data<int64_t>(keep("terms", term.key));
      }
      add_channels(problem, given, tables);
    }
  }

  std::vector<Tensor> kept_;
};

template <class F>
void with_type(const Tensor& query, const F& f) {
  switch (query.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      throw std::invalid_argument("query: expected dtype float32, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor> attend(const Call& call, const Tensor& query) {
  const std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end() - 1);
  Tensor logsumexp = new_empty(query, sizes, ScalarType::Double);
  OutputRows output(query, true);
  CudaQueue queue(query);
  with_type(query, [&](auto type) {
    using T = decltype(type);
    forward<T>(queue, {call.problem, input<T>(call.query), input<T>(call.key), input<T>(call.value), output.rows<T>(),
                       mutable_data<double>(logsumexp)});
  });
  return {output.finish(), logsumexp};
}

struct Needs {
  bool query, key, value, biases;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(const Call& call, const Tensor& grad, const Tensor& output,
                                                           const Tensor& logsumexp, const Tensor& query,
                                                           const Tensor& key, const Tensor& value, const Tensor& biases,
                                                           const Needs& needs) {
  check_results(grad, output, logsumexp, query);
  const Tensor grad_rows = with_dense_rows(grad), output_rows = with_dense_rows(output), sums = contiguous(logsumexp);
  OutputRows grad_query(query, needs.query), grad_key(key, needs.key), grad_value(value, needs.value);
  Tensor grad_biases = needs.biases ? empty_like(biases) : new_empty(biases, {0});  // one dimension: contiguous
  CudaQueue queue(query);
  with_type(query, [&](auto type) {
    using T = decltype(type);
    backward<T>(
        queue, {call.problem, input<T>(call.query), input<T>(call.key), input<T>(call.value), input<T>(output_rows),
                input<T>(grad_rows), data<double>(sums), grad_query.rows<T>(), grad_key.rows<T>(), grad_value.rows<T>(),
                needs.biases ? mutable_data<float>(grad_biases) : nullptr});
  });
  return {grad_query.finish(), grad_key.finish(), grad_value.finish(), grad_biases};
}

// Operators: arguments as in ops.py.

std::tuple<Tensor, Tensor> padded(Tensor query, Tensor key, Tensor value, Tensor biases, Tensors term_queries,
                                  Tensors term_keys, Tensors boundaries, Integers kinds, Integers bits,
                                  Integers buckets, MaybeTensor query_lengths, MaybeTensor key_lengths, bool is_causal,
                                  double scale) {
  Call call(query, key, value, 4, is_causal, scale);
  call.set_padded({biases, term_queries, term_keys, boundaries, kinds, bits, buckets}, query_lengths, key_lengths);
  return attend(call, query);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> padded_backward(Tensor grad, Tensor output, Tensor logsumexp, Tensor query,
                                                           Tensor key, Tensor value, Tensor biases,
                                                           Tensors term_queries, Tensors term_keys, Tensors boundaries,
                                                           Integers kinds, Integers bits, Integers buckets,
                                                           MaybeTensor query_lengths, MaybeTensor key_lengths,
                                                           bool is_causal, double scale, bool need_query, bool need_key,
                                                           bool need_value, bool need_biases) {
  Call call(query, key, value, 4, is_causal, scale);
  call.set_padded({biases, term_queries, term_keys, boundaries, kinds, bits, buckets}, query_lengths, key_lengths);
  return attend_backward(call, grad, output, logsumexp, query, key, value, biases,
                         {need_query, need_key, need_value, need_biases});
}

std::tuple<Tensor, Tensor> packed(Tensor query, Tensor key, Tensor value, Tensor biases, Tensors term_queries,
                                  Tensors term_keys, Tensors boundaries, Integers kinds, Integers bits,
                                  Integers buckets, Tensor cu_seqlens, int64_t max_seqlen, bool is_causal,
                                  double scale) {
  Call call(query, key, value, 3, is_causal, scale);
  call.set_packed({biases, term_queries, term_keys, boundaries, kinds, bits, buckets}, cu_seqlens, max_seqlen);
  return attend(call, query);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_backward(Tensor grad, Tensor output, Tensor logsumexp, Tensor query,
                                                           Tensor key, Tensor value, Tensor biases,
                                                           Tensors term_queries, Tensors term_keys, Tensors boundaries,
                                                           Integers kinds, Integers bits, Integers buckets,
                                                           Tensor cu_seqlens, int64_t max_seqlen, bool is_causal,
                                                           double scale, bool need_query, bool need_key,
                                                           bool need_value, bool need_biases) {
  Call call(query, key, value, 3, is_causal, scale);
  call.set_packed({biases, term_queries, term_keys, boundaries, kinds, bits, buckets}, cu_seqlens, max_seqlen);
  return attend_backward(call, grad, output, logsumexp, query, key, value, biases,
                         {need_query, need_key, need_value, need_biases});
}

}  // namespace
}  // namespace bbq

STABLE_TORCH_LIBRARY_IMPL(bbqrec_kernels, CUDA, m) {
  m.impl("similarity_attention", TORCH_BOX(&bbq::padded));
  m.impl("similarity_attention_backward", TORCH_BOX(&bbq::padded_backward));
  m.impl("similarity_attention_varlen", TORCH_BOX(&bbq::packed));
  m.impl("similarity_attention_varlen_backward", TORCH_BOX(&bbq::packed_backward));
}
