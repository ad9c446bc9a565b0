// Similarity-reweighted attention on the CPU: tensors, threads and what is summed across units of work. The arithmetic
// of a unit is in similarity_attention_simd.cpp.
//
// Every sum has one owner and an order that depends on the shapes alone: any thread count gives the same bits.
#include "similarity_attention.h"

#include <cmath>

#include "common.h"
#include "common/attention_arguments.h"

namespace bbq {
namespace {

constexpr int64_t kUnits = 16;              // sought at least, if heads have to be worked on apart for it
constexpr int64_t kHeadElements = 512;      // of a query row, in the heads that one unit of the forward works on
constexpr int64_t kSumElements = 1 << 18;   // of query gradients, that one unit of the backward sums up
constexpr int64_t kSpan = 512;              // keys of one partial sum of a query gradient: a whole number of blocks
constexpr int64_t kMaxChunks = 64;          // partial sums of table gradients
constexpr int64_t kChunkWork = 1 << 20;     // least products of one of them
constexpr int64_t kThreadedWork = 1 << 18;  // products that are worth waking threads for
static_assert(kSpan % kBlock == 0);

const AttentionKernels& kernels() {
#define BBQ_TABLE(target) &target::similarity_attention,
  return of_target({BBQ_FOR_SIMD_TARGETS(BBQ_TABLE)});
#undef BBQ_TABLE
}

// f(scratch, 0), ..., f(scratch, count - 1), on all cores if the work is worth it.
template <class F>
void run(int64_t count, int64_t scratch_floats, double work, const F& f) {
  if (work < kThreadedWork) {
    AlignedBuffer<float> scratch(scratch_floats);
    for (int64_t u = 0; u < count; ++u) f(scratch.data(), u);
  } else {
    for_all(
        count, [&] { return AlignedBuffer<float>(scratch_floats); },
        [&](AlignedBuffer<float>& scratch, int64_t u) { f(scratch.data(), u); });
  }
}

// ---- Heads, padded (B, H, S, D) or packed (T, H, D)

// Rows as they lie, or a copy where their elements are not contiguous.
Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) == 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
Heads<T> heads_of(T* data, const Tensor& tensor) {
  if (tensor.dim() == 4) return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  return {data, 0, tensor.stride(1), tensor.stride(0)};
}

Heads<const void> input(const Tensor& tensor) { return heads_of(tensor.const_data_ptr(), tensor); }

// Logsumexps, contiguous, (B, H, S) or (T, H).
template <class T>
Heads<T> heads_of_rows(T* data, const Tensor& tensor) {
  if (tensor.dim() == 3) return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  return {data, 0, tensor.stride(1), tensor.stride(0)};
}

// A result that kernels write where it lies if its rows are contiguous, otherwise in a buffer.
class Output {
 public:
  // Like `like`, or nothing.
  Output(const Tensor& like, bool needed)
      : output_(needed ? torch::stable::empty_like(like) : torch::stable::new_empty(like, {0})),
        buffer_(needed ? with_contiguous_rows(output_) : output_),
        needed_(needed) {}
  Heads<void> heads() const { return needed_ ? heads_of(buffer_.mutable_data_ptr(), buffer_) : Heads<void>{}; }
  // Copies into the output where they differ, and returns it.
  Tensor finish() {
    if (buffer_.get() != output_.get()) torch::stable::copy_(output_, buffer_);
    return output_;
  }

 private:
  Tensor output_, buffer_;
  bool needed_;
};

// ---- The problem: sequences in padded or packed tensors

struct Problem {
  // `dims`: 4 for padded tensors, 3 for packed ones.
  Problem(const Tensor& q, const Tensor& k, const Tensor& v, int64_t dims, bool causal, double scale)
      : simd(kernels()), query(with_contiguous_rows(q)), key(with_contiguous_rows(k)), value(with_contiguous_rows(v)) {
    check_heads(q, k, v, dims);
    attention.element = element_of("query", q);
    attention.query = input(query);
    attention.key = input(key);
    attention.value = input(value);
    attention.heads = q.size(1);
    attention.width = q.size(-1);
    attention.scale = static_cast<float>(scale);
    attention.is_causal = causal;
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  const AttentionKernels& simd;
  Tensor query, key, value;
  Attention attention{};
  int64_t query_tokens = 0, key_tokens = 0;
  std::vector<Sequence> sequences;
  Tensor biases;
  std::vector<Term> terms;
  std::vector<Channel> channels;
  std::vector<float> tables;

  // Products of a sequence and head, forward.
  double work(const Sequence& s) const {
    return 2.0 * static_cast<double>(s.rows) * s.columns * attention.width / (attention.is_causal ? 2 : 1);
  }
  double work() const {
    double total = 0;
    for (const Sequence& s : sequences) total += work(s);
    return total * attention.heads;
  }

  void set_terms(const TermArguments& arguments) {
    const int64_t heads = attention.heads;
    biases = torch::stable::contiguous(arguments.biases);
    terms = read_terms(arguments, heads, query_tokens, key_tokens);
    const auto slots = [&](const Term& term) { return ceil_div(term.buckets + 1, simd.lanes) * simd.lanes; };
    int64_t size = 0;
    for (const Term& term : terms) size += term.channels * heads * slots(term);
    tables.assign(size, kNaN);
    float* table = tables.data();
    for (const Term& term : terms) {
      const int64_t bytes = term.query.element_size() * term.width;
      for (int64_t c = 0; c < term.channels; ++c) {
        channels.push_back({term.kind, term.buckets, term.width, term.bits,
                            static_cast<const char*>(term.query.const_data_ptr()) + c * bytes,
                            static_cast<const char*>(term.key.const_data_ptr()) + c * bytes, term.channels * term.width,
                            data<float>(term.boundaries), table, slots(term), term.offset + c * heads * term.buckets});
        for (int64_t h = 0; h < heads; ++h, table += slots(term)) {
          std::copy_n(data<float>(biases) + term.offset + (c * heads + h) * term.buckets, term.buckets, table);
        }
      }
    }
    attention.channels = channels.data();
    attention.channel_count = static_cast<int64_t>(channels.size());
  }
};

std::vector<int64_t> clamped_lengths(const std::optional<Tensor>& lengths, int64_t batch, int64_t size) {
  std::vector<int64_t> result(batch, size);
  check_lengths(lengths, batch);
  if (lengths.has_value()) {
    const Tensor dense = torch::stable::contiguous(*lengths);
    const int64_t* values = data<int64_t>(dense);
    for (int64_t b = 0; b < batch; ++b) result[b] = std::clamp<int64_t>(values[b], 0, size);
  }
  return result;
}

void set_padded(Problem& p, const Tensor& query, const Tensor& key, const TermArguments& terms,
                const std::optional<Tensor>& query_lengths, const std::optional<Tensor>& key_lengths) {
  const int64_t batch = query.size(0), rows = query.size(2), columns = key.size(2);
  p.attention.shift = columns - rows;
  const auto row_counts = clamped_lengths(query_lengths, batch, rows);
  const auto column_counts = clamped_lengths(key_lengths, batch, columns);
  for (int64_t b = 0; b < batch; ++b) {
    p.sequences.push_back({row_counts[b], column_counts[b], rows, columns, b, 0, b * rows, b * columns});
  }
  p.query_tokens = batch * rows;
  p.key_tokens = batch * columns;
  p.set_terms(terms);
}

void set_packed(Problem& p, const Tensor& query, const TermArguments& terms, const Tensor& cu_seqlens,
                int64_t max_seqlen) {
  const int64_t tokens = query.size(0);
  const Tensor starts = torch::stable::contiguous(cu_seqlens);
  const int32_t* bounds = data<int32_t>(starts);
  const int64_t count = starts.numel() - 1;
  bool valid = count >= 0 && starts.scalar_type() == ScalarType::Int && bounds[0] == 0 && bounds[count] == tokens;
  for (int64_t b = 0; valid && b < count; ++b) {
    const int64_t start = bounds[b], length = bounds[b + 1] - start;
    valid = length >= 0 && length <= max_seqlen;
    p.sequences.push_back({length, length, length, length, 0, start, start, start});
  }
  if (!valid) {
    throw std::invalid_argument(
        "cu_seqlens: expected int32 values that start at 0, never decrease, end at the number of tokens, and are at "
        "most max_seqlen apart");
  }
  p.query_tokens = p.key_tokens = tokens;
  p.set_terms(terms);
}

// ---- Units of work

// How many heads a unit works on at once, for which buckets are found once: up to `limit`, and fewer where there would
// be too few units for many cores.
int64_t heads_of_unit(const Attention& a, int64_t limit, int64_t units_of_a_head) {
  return std::clamp<int64_t>(a.heads * units_of_a_head / kUnits, 1, std::max<int64_t>(1, limit));
}

void add(float* target, const float* source, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] += source[i];
}

// ---- Forward

std::tuple<Tensor, Tensor> forward(const Problem& p, const Tensor& query) {
  using namespace torch::stable;
  const Attention& a = p.attention;
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end() - 1);
  Tensor logsumexp = new_empty(query, sizes, ScalarType::Double);
  Output output(query, true);

  int64_t blocks = 0;
  for (const Sequence& s : p.sequences) blocks += ceil_div(s.all_rows, kBlock);
  const int64_t heads = heads_of_unit(a, kHeadElements / a.width, blocks);
  struct Unit {
    const Sequence* sequence;
    int64_t first_row, first_head;
  };
  std::vector<Unit> units;
  units.reserve(blocks * ceil_div(a.heads, heads));
  for (const Sequence& s : p.sequences) {
    for (int64_t block = ceil_div(s.all_rows, kBlock); block-- > 0;) {  // causal: the last rows have most to do
      for (int64_t h = 0; h < a.heads; h += heads) units.push_back({&s, block * kBlock, h});
    }
  }
  const Heads<void> out = output.heads();
  const auto sums = heads_of_rows(static_cast<double*>(logsumexp.mutable_data_ptr()), logsumexp);
  run(static_cast<int64_t>(units.size()), p.simd.forward_scratch(a, heads), p.work(), [&](float* scratch, int64_t u) {
    const auto& [sequence, row, head] = units[u];
    p.simd.forward({a, *sequence, row, std::min(kBlock, sequence->all_rows - row), head,
                    std::min(heads, a.heads - head), out, sums, scratch});
  });
  return {output.finish(), logsumexp};
}

// ---- Backward

// Some heads of one sequence. Gradients of its queries are sums over spans of keys.
struct Strip {
  const Sequence* sequence;
  int64_t first_head, heads;
  int64_t spans() const { return std::max<int64_t>(1, ceil_div(sequence->all_columns, kSpan)); }
};

// A strip, or some spans of it.
struct Item {
  const Strip* strip;
  int64_t first_span, last_span;
  double work;      // products
  float* row_sums;  // where the item leaves them, or null: the item writes the gradients of queries
};

struct Needs {
  bool query, key, value, biases;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Problem& p, const Tensor& grad, const Tensor& output,
                                                    const Tensor& logsumexp, const Tensor& query, const Tensor& key,
                                                    const Tensor& value, const Tensor& biases, const Needs& needs) {
  using namespace torch::stable;
  check_results(grad, output, logsumexp, query);
  const Tensor grad_rows = with_contiguous_rows(grad), output_rows = with_contiguous_rows(output);
  const Tensor sums_of_rows = contiguous(logsumexp);
  Output grad_query(query, needs.query), grad_key(key, needs.key), grad_value(value, needs.value);
  ContiguousOutput grad_biases(needs.biases ? empty_like(biases) : new_empty(biases, {0}));

  const Attention& a = p.attention;
  const AttentionKernels& simd = p.simd;
  std::vector<Strip> strips;
  int64_t most_rows = 0, most_heads = 0;
  for (const Sequence& s : p.sequences) {
    const int64_t limit = kSumElements / (a.width * std::max<int64_t>(1, s.rows));
    const int64_t heads = heads_of_unit(a, limit, static_cast<int64_t>(p.sequences.size()));
    for (int64_t h = 0; h < a.heads; h += heads) strips.push_back({&s, h, std::min(heads, a.heads - h)});
    most_rows = std::max(most_rows, s.rows);
    most_heads = std::max(most_heads, heads);
  }
  const int64_t most_sums = needs.query ? simd.row_sums(a, most_heads, most_rows) : 0;

  // Of one span: keys times rows that see the middle one.
  const auto work_of = [&](const Strip& strip, int64_t span) {
    const Sequence& s = *strip.sequence;
    const int64_t first = span * kSpan, keys = std::clamp<int64_t>(s.columns - first, 0, kSpan);
    const int64_t blind = a.is_causal ? std::clamp<int64_t>(first + keys / 2 - a.shift, 0, s.rows) : 0;
    return 5.0 * static_cast<double>(s.rows - blind) * keys * strip.heads * a.width;
  };

  // Few strips are cut into parts of about equal work, each of which needs memory for sums of all rows: no more parts
  // than make up enough units, however long a sequence is.
  const bool cut = static_cast<int64_t>(strips.size()) < kUnits;
  const int64_t most_parts = cut ? ceil_div(kUnits, std::max<int64_t>(1, strips.size())) : 1;
  std::vector<Item> items;
  double total_work = 0;
  for (const Strip& strip : strips) {
    const int64_t parts = std::min(most_parts, strip.spans());
    double left = 0;
    for (int64_t span = 0; span < strip.spans(); ++span) left += work_of(strip, span);
    total_work += left;
    for (int64_t span = 0, part = 0; part < parts; ++part) {
      Item item{&strip, span, strip.spans(), left, nullptr};
      if (part + 1 < parts) {
        const double share = left / static_cast<double>(parts - part);
        const int64_t most = strip.spans() - (parts - part - 1);  // the other parts have a span each at least
        item.work = work_of(strip, span++);
        while (span < most && item.work + work_of(strip, span) / 2 < share) item.work += work_of(strip, span++);
        item.last_span = span;
        left -= item.work;
      }
      items.push_back(item);
    }
  }
  AlignedBuffer<float> part_sums(cut ? static_cast<int64_t>(items.size()) * most_sums : 0);
  for (size_t i = 0; cut && i < items.size(); ++i) items[i].row_sums = part_sums.data() + i * most_sums;

  // Runs of items of about equal work, each with a sum of its own of the table gradients.
  const int64_t count = static_cast<int64_t>(items.size());
  const int64_t chunks = std::clamp<int64_t>(static_cast<int64_t>(total_work / kChunkWork), 1, kMaxChunks);
  std::vector<int64_t> bounds{0};
  double seen = 0;
  for (int64_t i = 0; i < count; ++i) {
    seen += items[i].work;
    if (i + 1 == count || seen * chunks >= total_work * static_cast<double>(bounds.size())) bounds.push_back(i + 1);
  }
  const int64_t runs = static_cast<int64_t>(bounds.size()) - 1;
  const int64_t entries = needs.biases ? p.biases.numel() : 0;
  std::vector<double> partials(runs * entries);

  const int64_t unit_scratch = simd.backward_scratch(a, most_heads, most_rows);
  const int64_t scratch_floats = unit_scratch + 2 * most_sums;
  run(runs, scratch_floats, total_work, [&](float* scratch, int64_t r) {
    std::vector<double> lanes(entries * simd.lanes, 0.0);
    for (int64_t i = bounds[r]; i < bounds[r + 1]; ++i) {
      const auto& [strip, first_span, last_span, work, kept_sums] = items[i];
      const Sequence& s = *strip->sequence;
      float* row_sums = kept_sums ? kept_sums : scratch + unit_scratch;
      for (int64_t span = first_span; span < last_span; ++span) {
        float* sums = span == first_span ? row_sums : scratch + unit_scratch + most_sums;
        simd.backward({a, s, span * kSpan, std::min(s.all_columns, (span + 1) * kSpan), strip->first_head, strip->heads,
                       input(grad_rows), input(output_rows), heads_of_rows(data<double>(sums_of_rows), sums_of_rows),
                       grad_key.heads(), grad_value.heads(), needs.query ? sums : nullptr,
                       needs.biases ? lanes.data() : nullptr, scratch});
        if (needs.query && span > first_span) add(row_sums, sums, simd.row_sums(a, strip->heads, s.rows));
      }
      if (needs.query && !kept_sums) {
        simd.store_rows({a, s, strip->first_head, strip->heads, row_sums, grad_query.heads()});
      }
    }
    for (int64_t e = 0; e < entries; ++e) {
      double sum = 0;
      for (int64_t lane = 0; lane < simd.lanes; ++lane) sum += lanes[e * simd.lanes + lane];
      partials[r * entries + e] = sum;
    }
  });
  if (needs.query && cut) {
    for_all(static_cast<int64_t>(strips.size()), [&](int64_t i) {
      const Strip& strip = strips[i];
      auto item = std::find_if(items.begin(), items.end(), [&](const Item& each) { return each.strip == &strip; });
      float* total = item->row_sums;
      while (++item != items.end() && item->strip == &strip) {
        add(total, item->row_sums, simd.row_sums(a, strip.heads, strip.sequence->rows));
      }
      simd.store_rows({a, *strip.sequence, strip.first_head, strip.heads, total, grad_query.heads()});
    });
  }
  if (needs.biases) {
    float* total = static_cast<float*>(grad_biases.buffer().mutable_data_ptr());
    for (int64_t e = 0; e < entries; ++e) {
      double sum = 0;
      for (int64_t r = 0; r < runs; ++r) sum += partials[r * entries + e];
      total[e] = static_cast<float>(sum);
    }
  }
  return {grad_query.finish(), grad_key.finish(), grad_value.finish(), grad_biases.finish()};
}

// ---- Operators: arguments as in ops.py

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> padded(Tensor query, Tensor key, Tensor value, Tensor biases, Tensors term_queries,
                                  Tensors term_keys, Tensors boundaries, Integers kinds, Integers bits,
                                  Integers buckets, MaybeTensor query_lengths, MaybeTensor key_lengths, bool is_causal,
                                  double scale) {
  const TermArguments terms{biases, term_queries, term_keys, boundaries, kinds, bits, buckets};
  Problem p(query, key, value, 4, is_causal, scale);
  set_padded(p, query, key, terms, query_lengths, key_lengths);
  return forward(p, query);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> padded_backward(Tensor grad, Tensor output, Tensor logsumexp, Tensor query,
                                                           Tensor key, Tensor value, Tensor biases,
                                                           Tensors term_queries, Tensors term_keys, Tensors boundaries,
                                                           Integers kinds, Integers bits, Integers buckets,
                                                           MaybeTensor query_lengths, MaybeTensor key_lengths,
                                                           bool is_causal, double scale, bool need_query, bool need_key,
                                                           bool need_value, bool need_biases) {
  const TermArguments terms{biases, term_queries, term_keys, boundaries, kinds, bits, buckets};
  Problem p(query, key, value, 4, is_causal, scale);
  set_padded(p, query, key, terms, query_lengths, key_lengths);
  return backward(p, grad, output, logsumexp, query, key, value, biases,
                  {need_query, need_key, need_value, need_biases});
}

std::tuple<Tensor, Tensor> packed(Tensor query, Tensor key, Tensor value, Tensor biases, Tensors term_queries,
                                  Tensors term_keys, Tensors boundaries, Integers kinds, Integers bits,
                                  Integers buckets, Tensor cu_seqlens, int64_t max_seqlen, bool is_causal,
                                  double scale) {
  const TermArguments terms{biases, term_queries, term_keys, boundaries, kinds, bits, buckets};
  Problem p(query, key, value, 3, is_causal, scale);
  set_packed(p, query, terms, cu_seqlens, max_seqlen);
  return forward(p, query);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_backward(Tensor grad, Tensor output, Tensor logsumexp, Tensor query,
                                                           Tensor key, Tensor value, Tensor biases,
                                                           Tensors term_queries, Tensors term_keys, Tensors boundaries,
                                                           Integers kinds, Integers bits, Integers buckets,
                                                           Tensor cu_seqlens, int64_t max_seqlen, bool is_causal,
                                                           double scale, bool need_query, bool need_key,
                                                           bool need_value, bool need_biases) {
  const TermArguments terms{biases, term_queries, term_keys, boundaries, kinds, bits, buckets};
  Problem p(query, key, value, 3, is_causal, scale);
  set_packed(p, query, terms, cu_seqlens, max_seqlen);
  return backward(p, grad, output, logsumexp, query, key, value, biases,
                  {need_query, need_key, need_value, need_biases});
}

}  // namespace
}  // namespace bbq

STABLE_TORCH_LIBRARY_IMPL(bbqrec_kernels, CPU, m) {
  m.impl("similarity_attention", TORCH_BOX(&bbq::padded));
  m.impl("similarity_attention_backward", TORCH_BOX(&bbq::padded_backward));
  m.impl("similarity_attention_varlen", TORCH_BOX(&bbq::packed));
  m.impl("similarity_attention_varlen_backward", TORCH_BOX(&bbq::packed_backward));
}
