// Similarity-reweighted attention on the CPU: forward and backward, padded and packed.
//
// A unit of work is a block of query rows of one sequence (of key rows, for the gradients of key and value). Buckets of
// the unit's pairs are found once and serve all heads; scores live one row at a time. The backward recomputes weights
// from the logsumexp, once per query row and once per key block, so that every sum has one owner and a fixed order: any
// thread count gives the same bits.
#include <cmath>
#include <limits>

#include "common.h"
#include "common/buckets.h"

namespace bbq {
namespace {

constexpr int64_t kBlock = 32;      // rows of a unit
constexpr int64_t kMaxChunks = 64;  // partial sums of table gradients
constexpr int64_t kLanes = 8;

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));

// ---- One query row against a run of key rows

BBQ_INLINE float dot(const float* a, const float* b, int64_t n) {
  Lanes sums = {};
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    Lanes left, right;
    __builtin_memcpy(&left, a + d, sizeof(left));
    __builtin_memcpy(&right, b + d, sizeof(right));
    sums += left * right;
  }
  float total = 0;
  for (; d < n; ++d) total += a[d] * b[d];
  for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return total;
}

// Rows of float, `stride` apart.
struct Rows {
  const float* data;
  int64_t stride;
  const float* operator[](int64_t i) const { return data + i * stride; }
};

// Adds Σ_j factors[j]·rows[j] to `target`, in partial sums of kBlock rows: rounding errors grow with the number of
// partial sums, not of rows. `scratch` holds one.
BBQ_INLINE void add_combination(float* target, const float* factors, Rows rows, int64_t count, int64_t width,
                                float* scratch) {
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    std::fill(scratch, scratch + width, 0.0f);
    for (int64_t j = begin; j < std::min(count, begin + kBlock); ++j) add_scaled(scratch, rows[j], factors[j], width);
    add_scaled(target, scratch, 1.0f, width);
  }
}

// `scores` comes with the sums of the tables. Writes the attended row and returns the logsumexp.
BBQ_SIMD_CLONES double attend(const float* query, Rows keys, Rows values, int64_t count, int64_t width, float scale,
                              float* scores, float* output, float* scratch) {
  float highest = -kInfinity;
  for (int64_t j = 0; j < count; ++j) {
    scores[j] += scale * dot(query, keys[j], width);
    if (scores[j] > highest || scores[j] != scores[j]) highest = scores[j];  // NaN stays
  }
  std::fill(output, output + width, 0.0f);
  if (highest == -kInfinity) return highest;  // nothing to attend to
  double total = 0;
  for (int64_t j = 0; j < count; ++j) {
    scores[j] = std::exp(scores[j] - highest);
    total += scores[j];
  }
  add_combination(output, scores, values, count, width, scratch);
  for (int64_t d = 0; d < width; ++d) output[d] /= static_cast<float>(total);
  return highest + std::log(total);
}

// `weights` comes with the sums of the tables and leaves with the weights; `grad_scores` gets the gradient of scores.
BBQ_SIMD_CLONES void attend_backward(const float* query, const float* grad, const float* output, Rows keys, Rows values,
                                     int64_t count, int64_t width, float scale, double logsumexp, float* weights,
                                     float* grad_scores) {
  const float delta = dot(grad, output, width);
  for (int64_t j = 0; j < count; ++j) {
    const float score = weights[j] + scale * dot(query, keys[j], width);
    weights[j] = std::exp(static_cast<float>(score - logsumexp));  // in double: both may be large
    grad_scores[j] = weights[j] * (dot(grad, values[j], width) - delta);
  }
}

// output = scale·Σ_j factors[j]·rows[j]
BBQ_SIMD_CLONES void combine(const float* factors, Rows rows, int64_t count, int64_t width, float scale, float* output,
                             float* scratch) {
  std::fill(output, output + width, 0.0f);
  add_combination(output, factors, rows, count, width, scratch);
  for (int64_t d = 0; d < width; ++d) output[d] *= scale;
}

// targets[j] += factors[j]·row
BBQ_SIMD_CLONES void add_outer(float* targets, const float* factors, const float* row, int64_t count, int64_t width) {
  for (int64_t j = 0; j < count; ++j) add_scaled(targets + j * width, row, factors[j], width);
}

// ---- Terms

struct Term {
  Kind kind;
  int64_t channels, buckets, width, bits;  // width: of what is compared, in one channel
  const float* tables;                     // (channels, heads, buckets)
  int64_t offset;                          // of the tables among all tables
  Tensor query, key, boundaries;           // contiguous

  int64_t bucket(int64_t i, int64_t j, int64_t channel) const {
    const int64_t a = (i * channels + channel) * width, b = (j * channels + channel) * width;
    const int32_t n = static_cast<int32_t>(buckets), levels = n - 1;
    if (kind == Kind::kCosine) {
      const float similarity = dot(data<float>(query) + a, data<float>(key) + b, width);
      return cosine_bucket(similarity, data<float>(boundaries), n);
    }
    const int64_t *left = data<int64_t>(query) + a, *right = data<int64_t>(key) + b;
    if (kind == Kind::kGap) return gap_bucket(*left, *right, n);
    if (bits > 0) {
      const uint64_t x = static_cast<uint64_t>(*left), y = static_cast<uint64_t>(*right);
      const int32_t field = static_cast<int32_t>(bits);
      return kind == Kind::kPrefix ? prefix_bucket(x, y, field, levels) : matches_bucket(x, y, field, levels);
    }
    return kind == Kind::kPrefix ? prefix_bucket(left, right, levels) : matches_bucket(left, right, levels);
  }
};

// The operators' arguments that describe the terms, as they come.
struct TermArguments {
  const Tensor& biases;
  const std::vector<Tensor>&queries, &keys, &boundaries;
  const std::vector<int64_t>&kinds, &bits, &buckets;
};

std::vector<Term> read_terms(const TermArguments& arguments, const Tensor& biases, int64_t heads, int64_t query_tokens,
                             int64_t key_tokens) {
  const size_t count = arguments.kinds.size();
  if (arguments.queries.size() != count || arguments.keys.size() != count || arguments.boundaries.size() != count ||
      arguments.bits.size() != count || arguments.buckets.size() != count) {
    throw std::invalid_argument("terms: expected lists of equal length");
  }
  std::vector<Term> terms;
  int64_t offset = 0;
  for (size_t t = 0; t < count; ++t) {
    Term term;
    term.kind = static_cast<Kind>(arguments.kinds[t]);
    term.query = torch::stable::contiguous(arguments.queries[t]);
    term.key = torch::stable::contiguous(arguments.keys[t]);
    term.boundaries = torch::stable::contiguous(arguments.boundaries[t]);
    term.bits = arguments.bits[t];
    term.buckets = arguments.buckets[t];
    const bool codes = term.kind == Kind::kPrefix || term.kind == Kind::kMatches;
    const bool known = codes || term.kind == Kind::kCosine || term.kind == Kind::kGap;
    const bool packed = term.bits != 0;
    const bool one_value = term.kind == Kind::kGap || packed;  // a channel: a position or a word
    const int64_t last = term.query.dim() - 1;
    const auto fail = [t] {
      throw std::invalid_argument("terms: tensors of term " + std::to_string(t) + " do not fit together");
    };
    if (!known || (packed && !codes) || last < (one_value ? 0 : 1) || term.buckets < 1 || term.buckets >= kNoBucket)
      fail();
    term.width = one_value ? 1 : term.query.size(last);
    term.channels = term.query.size(one_value ? last : last - 1);
    const ScalarType dtype = term.kind == Kind::kCosine ? ScalarType::Float : ScalarType::Long;
    const int64_t levels = term.buckets - 1;
    if (term.query.scalar_type() != dtype || term.key.scalar_type() != dtype ||
        term.query.numel() != query_tokens * term.channels * term.width ||
        term.key.numel() != key_tokens * term.channels * term.width) {
      fail();
    }
    if (packed && (term.bits < 1 || levels < 1 || term.bits * levels > 64)) fail();
    if (codes && !packed && term.width != levels) fail();
    if (term.kind == Kind::kCosine &&
        (term.boundaries.numel() != levels || term.boundaries.scalar_type() != ScalarType::Float)) {
      fail();
    }
    term.tables = data<float>(biases) + offset;
    term.offset = offset;
    offset += term.channels * heads * term.buckets;
    terms.push_back(term);
  }
  if (biases.numel() != offset || biases.scalar_type() != ScalarType::Float) {
    throw std::invalid_argument("biases: got " + std::to_string(biases.numel()) + " elements, expected " +
                                std::to_string(offset) + " of float32");
  }
  return terms;
}

// ---- The problem: sequences in padded or packed tensors
//
// The public functions check arguments in full; the checks here keep addresses inside the tensors when an operator is
// called directly.

// One sequence: its lengths, and where its first token is.
struct Sequence {
  int64_t rows, columns;             // queries and keys that are not past the lengths
  int64_t query_offset, key_offset;  // in elements
  int64_t query_token, key_token;    // in tokens, for the terms
};

struct Problem {
  Problem(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale_of_products)
      : query(torch::stable::contiguous(q)),
        key(torch::stable::contiguous(k)),
        value(torch::stable::contiguous(v)),
        heads(q.size(1)),
        width(q.size(-1)),
        scale(static_cast<float>(scale_of_products)),
        is_causal(causal) {
    const auto like = [](const Tensor& a, const Tensor& b) { return a.scalar_type() == b.scalar_type(); };
    const auto dims = [&q](const Tensor& t) { return t.dim() == q.dim() && t.size(1) == q.size(1); };
    if (!like(q, k) || !like(q, v) || !dims(k) || k.size(-1) != width || !k.sizes().equals(v.sizes()) ||
        (q.dim() == 4 ? k.size(0) != q.size(0) : !k.sizes().equals(q.sizes()))) {
      throw std::invalid_argument("query, key, value: expected shapes and dtypes that fit together");
    }
  }

  Tensor query, key, value;
  int64_t heads, width;
  float scale;
  bool is_causal;
  int64_t shift = 0;  // causal: key j is seen by query i if j <= i + shift
  int64_t token_stride = 0, query_head_stride = 0, key_head_stride = 0;
  int64_t query_tokens = 0, key_tokens = 0;
  std::vector<Sequence> sequences;
  Tensor biases;
  std::vector<Term> terms;
  int64_t channels = 0;

  // Number of keys that query i sees: the first ones.
  int64_t visible(const Sequence& s, int64_t i) const {
    return is_causal ? std::clamp<int64_t>(i + shift + 1, 0, s.columns) : s.columns;
  }
  int64_t query_row(const Sequence& s, int64_t head, int64_t i) const {
    return s.query_offset + head * query_head_stride + i * token_stride;
  }
  int64_t key_row(const Sequence& s, int64_t head, int64_t j) const {
    return s.key_offset + head * key_head_stride + j * token_stride;
  }
  void set_terms(const TermArguments& arguments) {
    biases = torch::stable::contiguous(arguments.biases);
    terms = read_terms(arguments, biases, heads, query_tokens, key_tokens);
    for (const Term& term : terms) channels += term.channels;
  }
};

void expect_dims(const Tensor& query, int64_t dims) {
  if (query.dim() != dims) {
    throw std::invalid_argument("query: expected " + std::to_string(dims) + " dimensions, got " +
                                std::to_string(query.dim()));
  }
}

std::vector<int64_t> clamped_lengths(const std::optional<Tensor>& lengths, int64_t batch, int64_t size) {
  std::vector<int64_t> result(batch, size);
  if (lengths.has_value()) {
    if (lengths->numel() != batch || lengths->scalar_type() != ScalarType::Long) {
      throw std::invalid_argument("query_lengths, key_lengths: expected one int64 for each sequence");
    }
    const Tensor dense = torch::stable::contiguous(*lengths);
    const int64_t* values = data<int64_t>(dense);
    for (int64_t b = 0; b < batch; ++b) result[b] = std::clamp<int64_t>(values[b], 0, size);
  }
  return result;
}

Problem padded_problem(const Tensor& query, const Tensor& key, const Tensor& value, const TermArguments& terms,
                       const std::optional<Tensor>& query_lengths, const std::optional<Tensor>& key_lengths,
                       bool is_causal, double scale) {
  expect_dims(query, 4);
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), columns = key.size(2);
  const int64_t width = query.size(3);
  Problem p(query, key, value, is_causal, scale);
  p.shift = columns - rows;
  p.token_stride = width, p.query_head_stride = rows * width, p.key_head_stride = columns * width;
  const auto row_counts = clamped_lengths(query_lengths, batch, rows);
  const auto column_counts = clamped_lengths(key_lengths, batch, columns);
  for (int64_t b = 0; b < batch; ++b) {
    p.sequences.push_back({row_counts[b], column_counts[b], b * heads * rows * width, b * heads * columns * width,
                           b * rows, b * columns});
  }
  p.query_tokens = batch * rows;
  p.key_tokens = batch * columns;
  p.set_terms(terms);
  return p;
}

Problem packed_problem(const Tensor& query, const Tensor& key, const Tensor& value, const TermArguments& terms,
                       const Tensor& cu_seqlens, int64_t max_seqlen, bool is_causal, double scale) {
  expect_dims(query, 3);
  const int64_t tokens = query.size(0), heads = query.size(1), width = query.size(2);
  Problem p(query, key, value, is_causal, scale);
  p.token_stride = heads * width, p.query_head_stride = p.key_head_stride = width;
  const Tensor starts = torch::stable::contiguous(cu_seqlens);
  const int32_t* bounds = data<int32_t>(starts);
  const int64_t count = starts.numel() - 1;
  bool valid = count >= 0 && starts.scalar_type() == ScalarType::Int && bounds[0] == 0 && bounds[count] == tokens;
  for (int64_t b = 0; valid && b < count; ++b) {
    const int64_t start = bounds[b], length = bounds[b + 1] - start;
    valid = length >= 0 && length <= max_seqlen;
    p.sequences.push_back({length, length, start * heads * width, start * heads * width, start, start});
  }
  if (!valid) {
    throw std::invalid_argument(
        "cu_seqlens: expected int32 values that start at 0, never decrease, end at the number of tokens, and are at "
        "most max_seqlen apart");
  }
  p.query_tokens = p.key_tokens = tokens;
  p.set_terms(terms);
  return p;
}

// ---- Units of work

struct Unit {
  const Sequence* sequence;
  int64_t first, last;
};

// Blocks of the sequences' query rows, or of their keys.
std::vector<Unit> blocks_of(const Problem& p, int64_t Sequence::* length) {
  std::vector<Unit> units;
  for (const Sequence& s : p.sequences) {
    for (int64_t first = 0; first < s.*length; first += kBlock) {
      units.push_back({&s, first, std::min(s.*length, first + kBlock)});
    }
  }
  return units;
}

// Buckets of all pairs of some query rows and some keys, in every channel.
class Buckets {
 public:
  Buckets(const Problem& p, const Sequence& s, int64_t first_row, int64_t last_row, int64_t first_key, int64_t last_key)
      : problem_(p),
        first_row_(first_row),
        rows_(last_row - first_row),
        keys_(std::max<int64_t>(0, last_key - first_key)) {
    values_.resize(p.channels * rows_ * keys_);
    uint8_t* out = values_.data();
    for (const Term& term : p.terms) {
      for (int64_t c = 0; c < term.channels; ++c) {
        for (int64_t i = first_row; i < last_row; ++i) {
          for (int64_t j = first_key; j < first_key + keys_; ++j) {
            *out++ = static_cast<uint8_t>(term.bucket(s.query_token + i, s.key_token + j, c));
          }
        }
      }
    }
  }

  // For the first `count` keys: the sum of what the tables of a head hold.
  void sum_tables(int64_t head, int64_t row, int64_t count, float* sums) const {
    std::fill(sums, sums + count, 0.0f);
    for_channels(head, row, [&](const Term& term, int64_t table, const uint8_t* buckets) {
      const float* values = term.tables + table;
      for (int64_t j = 0; j < count; ++j) {
        sums[j] += buckets[j] == kNoBucket ? kNaN : values[buckets[j]];
      }
    });
  }

  // Adds gradients of scores to those of the tables of a head. NaN buckets have no table entry to go to.
  void add_to_tables(int64_t head, int64_t row, int64_t count, const float* grad_scores, double* tables) const {
    for_channels(head, row, [&](const Term& term, int64_t table, const uint8_t* buckets) {
      double* values = tables + term.offset + table;
      for (int64_t j = 0; j < count; ++j) {
        if (buckets[j] != kNoBucket) values[buckets[j]] += grad_scores[j];
      }
    });
  }

 private:
  template <class F>
  void for_channels(int64_t head, int64_t row, const F& f) const {
    const uint8_t* buckets = values_.data() + (row - first_row_) * keys_;
    for (const Term& term : problem_.terms) {
      for (int64_t c = 0; c < term.channels; ++c, buckets += rows_ * keys_) {
        f(term, (c * problem_.heads + head) * term.buckets, buckets);
      }
    }
  }

  const Problem& problem_;
  int64_t first_row_, rows_, keys_;
  std::vector<uint8_t> values_;
};

// Rows as float: where they are, or a copy.
template <class T>
class FloatRows {
 public:
  Rows get(const T* source, int64_t stride, int64_t count, int64_t width) {
    if constexpr (std::is_same_v<T, float>) {
      return {source, stride};
    } else {
      copy_.resize(std::max<int64_t>(count, 0) * width);
      for (int64_t i = 0; i < count; ++i) load_row(source + i * stride, copy_.data() + i * width, width);
      return {copy_.data(), width};
    }
  }

 private:
  std::vector<float> copy_;
};

// ---- Forward

template <class T>
void forward_unit(const Problem& p, const Unit& unit, T* output, double* logsumexp) {
  const Sequence& s = *unit.sequence;
  const int64_t keys = p.visible(s, unit.last - 1);
  const Buckets buckets(p, s, unit.first, unit.last, 0, keys);
  const T *query = data<T>(p.query), *key = data<T>(p.key), *value = data<T>(p.value);
  std::vector<float> scores(keys), q(p.width), attended(p.width), scratch(p.width);
  FloatRows<T> key_rows, value_rows;
  for (int64_t h = 0; h < p.heads; ++h) {
    const Rows k = key_rows.get(key + p.key_row(s, h, 0), p.token_stride, keys, p.width);
    const Rows v = value_rows.get(value + p.key_row(s, h, 0), p.token_stride, keys, p.width);
    for (int64_t i = unit.first; i < unit.last; ++i) {
      const int64_t row = p.query_row(s, h, i), count = p.visible(s, i);
      buckets.sum_tables(h, i, count, scores.data());
      load_row(query + row, q.data(), p.width);
      logsumexp[row / p.width] =
          attend(q.data(), k, v, count, p.width, p.scale, scores.data(), attended.data(), scratch.data());
      store_row(attended.data(), output + row, p.width);
    }
  }
}

std::tuple<Tensor, Tensor> forward(const Problem& p, const Tensor& query) {
  using namespace torch::stable;
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end() - 1);
  Tensor logsumexp = new_empty(query, sizes, ScalarType::Double);
  ContiguousOutput output(empty_like(query));
  zero_(const_cast<Tensor&>(output.buffer()));
  fill_(logsumexp, -kInfinity);
  const std::vector<Unit> units = blocks_of(p, &Sequence::rows);
  double* sums = static_cast<double*>(logsumexp.mutable_data_ptr());
  dispatch_float(query.scalar_type(), "query", [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(output.buffer().mutable_data_ptr());
    for_all(units.size(), [&](int64_t u) { forward_unit<T>(p, units[u], out, sums); });
  });
  return {output.finish(), logsumexp};
}

// ---- Backward

// What a backward unit reads besides the problem.
template <class T>
struct Upstream {
  const T *grad, *output;
  const double* logsumexp;
};

// One query row as float, and what the backward makes of it and a run of keys.
class QueryRow {
 public:
  QueryRow(int64_t keys, int64_t width)
      : weights(keys), grad_scores(keys), query(width), grad(width), scratch(width), output_(width), width_(width) {}

  // False where the query attended to nothing.
  template <class T>
  bool compute(const Problem& p, const Upstream<T>& up, const Buckets& buckets, int64_t head, int64_t i, int64_t row,
               Rows keys, Rows values, int64_t count) {
    const double logsumexp = up.logsumexp[row / width_];
    if (logsumexp == -kInfinity) return false;
    load_row(data<T>(p.query) + row, query.data(), width_);
    load_row(up.grad + row, grad.data(), width_);
    load_row(up.output + row, output_.data(), width_);
    buckets.sum_tables(head, i, count, weights.data());
    attend_backward(query.data(), grad.data(), output_.data(), keys, values, count, width_, p.scale, logsumexp,
                    weights.data(), grad_scores.data());
    return true;
  }

  std::vector<float> weights, grad_scores, query, grad, scratch;

 private:
  std::vector<float> output_;
  int64_t width_;
};

// Gradients of a block of query rows, and its share of the table gradients; either pointer may be null.
template <class T>
void query_unit(const Problem& p, const Unit& unit, const Upstream<T>& up, T* grad_query, double* grad_tables) {
  const Sequence& s = *unit.sequence;
  const int64_t keys = p.visible(s, unit.last - 1);
  const Buckets buckets(p, s, unit.first, unit.last, 0, keys);
  const T *key = data<T>(p.key), *value = data<T>(p.value);
  QueryRow r(keys, p.width);
  FloatRows<T> key_rows, value_rows;
  for (int64_t h = 0; h < p.heads; ++h) {
    const Rows k = key_rows.get(key + p.key_row(s, h, 0), p.token_stride, keys, p.width);
    const Rows v = value_rows.get(value + p.key_row(s, h, 0), p.token_stride, keys, p.width);
    for (int64_t i = unit.first; i < unit.last; ++i) {
      const int64_t row = p.query_row(s, h, i), count = p.visible(s, i);
      if (!r.compute(p, up, buckets, h, i, row, k, v, count)) continue;
      if (grad_tables != nullptr) buckets.add_to_tables(h, i, count, r.grad_scores.data(), grad_tables);
      if (grad_query != nullptr) {
        combine(r.grad_scores.data(), k, count, p.width, p.scale, r.query.data(), r.scratch.data());
        store_row(r.query.data(), grad_query + row, p.width);
      }
    }
  }
}

// Gradients of a block of keys and values; either pointer may be null.
template <class T>
void key_unit(const Problem& p, const Unit& unit, const Upstream<T>& up, T* grad_key, T* grad_value) {
  const Sequence& s = *unit.sequence;
  const int64_t keys = unit.last - unit.first, size = keys * p.width;
  const int64_t first_row = p.is_causal ? std::clamp<int64_t>(unit.first - p.shift, 0, s.rows) : 0;
  const T *key = data<T>(p.key), *value = data<T>(p.value);
  QueryRow r(keys, p.width);
  std::vector<float> key_sums(p.heads * size, 0.0f), value_sums(key_sums), key_part(size), value_part(size);
  FloatRows<T> key_rows, value_rows;
  for (int64_t begin = first_row; begin < s.rows; begin += kBlock) {
    const int64_t end = std::min(s.rows, begin + kBlock);
    const Buckets buckets(p, s, begin, end, unit.first, unit.last);
    for (int64_t h = 0; h < p.heads; ++h) {
      const Rows k = key_rows.get(key + p.key_row(s, h, unit.first), p.token_stride, keys, p.width);
      const Rows v = value_rows.get(value + p.key_row(s, h, unit.first), p.token_stride, keys, p.width);
      std::fill(key_part.begin(), key_part.end(), 0.0f);
      std::fill(value_part.begin(), value_part.end(), 0.0f);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t count = std::min(p.visible(s, i), unit.last) - unit.first;
        if (!r.compute(p, up, buckets, h, i, p.query_row(s, h, i), k, v, count)) continue;
        add_outer(key_part.data(), r.grad_scores.data(), r.query.data(), count, p.width);
        add_outer(value_part.data(), r.weights.data(), r.grad.data(), count, p.width);
      }
      add_scaled(&key_sums[h * size], key_part.data(), p.scale, size);
      add_scaled(&value_sums[h * size], value_part.data(), 1.0f, size);
    }
  }
  for (int64_t h = 0; h < p.heads; ++h) {
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t row = p.key_row(s, h, unit.first + j), sum = h * size + j * p.width;
      if (grad_key != nullptr) store_row(&key_sums[sum], grad_key + row, p.width);
      if (grad_value != nullptr) store_row(&value_sums[sum], grad_value + row, p.width);
    }
  }
}

struct Needs {
  bool query, key, value, biases;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Problem& p, const Tensor& grad, const Tensor& output,
                                                    const Tensor& logsumexp, const Tensor& query, const Tensor& key,
                                                    const Tensor& value, const Tensor& biases, const Needs& needs) {
  using namespace torch::stable;
  const ScalarType dtype = query.scalar_type();
  if (!grad.sizes().equals(query.sizes()) || !output.sizes().equals(query.sizes()) || grad.scalar_type() != dtype ||
      output.scalar_type() != dtype || logsumexp.numel() * p.width != query.numel() ||
      logsumexp.scalar_type() != ScalarType::Double) {
    throw std::invalid_argument("grad, output, logsumexp: expected the shapes and dtypes that the forward gave");
  }
  const Tensor dense_grad = contiguous(grad), dense_output = contiguous(output), lse = contiguous(logsumexp);
  const auto make = [](const Tensor& like, bool needed) {
    ContiguousOutput result(needed ? empty_like(like) : new_empty(like, {0}));
    zero_(const_cast<Tensor&>(result.buffer()));
    return result;
  };
  ContiguousOutput grad_query = make(query, needs.query), grad_key = make(key, needs.key);
  ContiguousOutput grad_value = make(value, needs.value), grad_biases = make(biases, needs.biases);

  dispatch_float(query.scalar_type(), "query", [&](auto type) {
    using T = decltype(type);
    const Upstream<T> up{data<T>(dense_grad), data<T>(dense_output), data<double>(lse)};
    const auto pointer = [](const ContiguousOutput& out, bool needed) {
      return needed ? static_cast<T*>(out.buffer().mutable_data_ptr()) : nullptr;
    };

    if (needs.query || needs.biases) {
      const std::vector<Unit> units = blocks_of(p, &Sequence::rows);
      const int64_t count = units.size(), chunks = std::min(count, kMaxChunks);
      const int64_t entries = needs.biases ? p.biases.numel() : 0;
      std::vector<double> tables(chunks * entries, 0.0);  // a sum for each chunk of units
      T* out = pointer(grad_query, needs.query);
      for_all(chunks, [&](int64_t c) {
        for (int64_t u = c * count / chunks; u < (c + 1) * count / chunks; ++u) {
          query_unit<T>(p, units[u], up, out, needs.biases ? tables.data() + c * entries : nullptr);
        }
      });
      if (needs.biases) {
        float* total = static_cast<float*>(grad_biases.buffer().mutable_data_ptr());
        for (int64_t e = 0; e < entries; ++e) {
          double sum = 0;
          for (int64_t c = 0; c < chunks; ++c) sum += tables[c * entries + e];
          total[e] = static_cast<float>(sum);
        }
      }
    }
    if (needs.key || needs.value) {
      const std::vector<Unit> units = blocks_of(p, &Sequence::columns);
      T *out_key = pointer(grad_key, needs.key), *out_value = pointer(grad_value, needs.value);
      for_all(units.size(), [&](int64_t u) { key_unit<T>(p, units[u], up, out_key, out_value); });
    }
  });
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
  return forward(padded_problem(query, key, value, terms, query_lengths, key_lengths, is_causal, scale), query);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> padded_backward(Tensor grad, Tensor output, Tensor logsumexp, Tensor query,
                                                           Tensor key, Tensor value, Tensor biases,
                                                           Tensors term_queries, Tensors term_keys, Tensors boundaries,
                                                           Integers kinds, Integers bits, Integers buckets,
                                                           MaybeTensor query_lengths, MaybeTensor key_lengths,
                                                           bool is_causal, double scale, bool need_query, bool need_key,
                                                           bool need_value, bool need_biases) {
  const TermArguments terms{biases, term_queries, term_keys, boundaries, kinds, bits, buckets};
  const Problem p = padded_problem(query, key, value, terms, query_lengths, key_lengths, is_causal, scale);
  return backward(p, grad, output, logsumexp, query, key, value, biases,
                  {need_query, need_key, need_value, need_biases});
}

std::tuple<Tensor, Tensor> packed(Tensor query, Tensor key, Tensor value, Tensor biases, Tensors term_queries,
                                  Tensors term_keys, Tensors boundaries, Integers kinds, Integers bits,
                                  Integers buckets, Tensor cu_seqlens, int64_t max_seqlen, bool is_causal,
                                  double scale) {
  const TermArguments terms{biases, term_queries, term_keys, boundaries, kinds, bits, buckets};
  return forward(packed_problem(query, key, value, terms, cu_seqlens, max_seqlen, is_causal, scale), query);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_backward(Tensor grad, Tensor output, Tensor logsumexp, Tensor query,
                                                           Tensor key, Tensor value, Tensor biases,
                                                           Tensors term_queries, Tensors term_keys, Tensors boundaries,
                                                           Integers kinds, Integers bits, Integers buckets,
                                                           Tensor cu_seqlens, int64_t max_seqlen, bool is_causal,
                                                           double scale, bool need_query, bool need_key,
                                                           bool need_value, bool need_biases) {
  const TermArguments terms{biases, term_queries, term_keys, boundaries, kinds, bits, buckets};
  const Problem p = packed_problem(query, key, value, terms, cu_seqlens, max_seqlen, is_causal, scale);
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
