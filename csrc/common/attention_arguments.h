// What the attention operators are given, checked alike for every implementation. Needs torch's stable ABI.
//
// The public functions check arguments in full; the checks here keep addresses inside the tensors when an operator is
// called directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "buckets.h"

namespace bbq {

struct Term {
  Kind kind;
  int64_t channels, buckets, width, bits;        // width: of what is compared, in one channel
  int64_t offset;                                // of its tables (channels, heads, buckets) among all tables
  torch::stable::Tensor query, key, boundaries;  // contiguous
};

// The operators' arguments that describe the terms, as they come.
struct TermArguments {
  const torch::stable::Tensor& biases;
  const std::vector<torch::stable::Tensor>&queries, &keys, &boundaries;
  const std::vector<int64_t>&kinds, &bits, &buckets;
};

inline std::vector<Term> read_terms(const TermArguments& arguments, int64_t heads, int64_t query_tokens,
                                    int64_t key_tokens) {
  using torch::headeronly::ScalarType;
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
    term.offset = offset;
    offset += term.channels * heads * term.buckets;
    terms.push_back(term);
  }
  const torch::stable::Tensor& biases = arguments.biases;
  if (biases.numel() != offset || biases.scalar_type() != ScalarType::Float) {
    throw std::invalid_argument("biases: got " + std::to_string(biases.numel()) + " elements, expected " +
                                std::to_string(offset) + " of float32");
  }
  return terms;
}

// (B, H, S, D) or (T, H, D), of one dtype; key and value alike.
inline void check_heads(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                        int64_t dims) {
  using torch::stable::Tensor;
  if (q.dim() != dims) {
    throw std::invalid_argument("query: expected " + std::to_string(dims) + " dimensions, got " +
                                std::to_string(q.dim()));
  }
  const auto like = [](const Tensor& a, const Tensor& b) { return a.scalar_type() == b.scalar_type(); };
  const auto fits = [&q](const Tensor& t) { return t.dim() == q.dim() && t.size(1) == q.size(1); };
  if (!like(q, k) || !like(q, v) || !fits(k) || k.size(-1) != q.size(-1) || !k.sizes().equals(v.sizes()) ||
      (q.dim() == 4 ? k.size(0) != q.size(0) : !k.sizes().equals(q.sizes()))) {
    throw std::invalid_argument("query, key, value: expected shapes and dtypes that fit together");
  }
  if (q.size(-1) == 0) throw std::invalid_argument("query: expected a head size of at least 1");
}

inline void check_lengths(const std::optional<torch::stable::Tensor>& lengths, int64_t batch) {
  using torch::headeronly::ScalarType;
  if (lengths && (lengths->numel() != batch || lengths->scalar_type() != ScalarType::Long)) {
    throw std::invalid_argument("query_lengths, key_lengths: expected one int64 for each sequence");
  }
}

// What the forward gave, and the gradient of its output.
inline void check_results(const torch::stable::Tensor& grad, const torch::stable::Tensor& output,
                          const torch::stable::Tensor& logsumexp, const torch::stable::Tensor& query) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = query.scalar_type();
  if (!grad.sizes().equals(query.sizes()) || !output.sizes().equals(query.sizes()) || grad.scalar_type() != dtype ||
      output.scalar_type() != dtype || logsumexp.numel() * query.size(-1) != query.numel() ||
      logsumexp.scalar_type() != ScalarType::Double) {
    throw std::invalid_argument("grad, output, logsumexp: expected the shapes and dtypes that the forward gave");
  }
}

}  // namespace bbq
