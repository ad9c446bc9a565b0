// What similarity_attention.cpp, which knows tensors and threads, asks of the SIMD kernels, compiled once per target.
// Plain structures and pointers. Strides are in elements.
#pragma once

#include <stdint.h>

#include "common/buckets.h"
#include "simd_targets.h"

namespace bbq {

constexpr int64_t kBlock = 64;  // query rows, and keys, of a tile of scores

// One channel of one term: what is compared, and the tables of all heads.
struct Channel {
  Kind kind;
  int64_t buckets, width, bits;  // width: of what is compared; bits: of a level in a packed word, or 0
  const void *query, *key;       // of the first token; tokens are `stride` elements apart
  int64_t stride;
  const float* boundaries;  // (buckets - 1), of cosine
  const float* tables;      // (heads, slots): the table of a head, then a NaN for a similarity of NaN
  int64_t slots;            // of a table: a multiple of the lanes of a vector
  int64_t gradient;         // of the first head, among the gradients of all tables; heads are `buckets` apart
};

// A tensor of heads, padded or packed. The elements of a row are contiguous, all else may lie anywhere.
template <class T>
struct Heads {
  T* data;
  int64_t sequence_stride, head_stride, token_stride;  // the first: of padded tensors, otherwise 0
};

struct Attention {
  Element element;  // of query, key, value, the output and their gradients
  Heads<const void> query, key, value;
  int64_t heads, width;
  float scale;
  bool is_causal;
  int64_t shift;  // causal: key j is seen by query i if j <= i + shift
  const Channel* channels;
  int64_t channel_count;
};

// One sequence: its lengths, and where its first token is.
struct Sequence {
  int64_t rows, columns;           // queries and keys that are not past the lengths
  int64_t all_rows, all_columns;   // the same, and those past the lengths
  int64_t index, start;            // in tensors of heads: of the sequence if they are padded, and of its first token
  int64_t query_token, key_token;  // of what channels compare, where tokens of all sequences follow each other
};

struct ForwardUnit {
  const Attention& attention;
  const Sequence& sequence;
  int64_t first_row, rows;  // at most kBlock
  int64_t first_head, heads;
  Heads<void> output;
  Heads<double> logsumexp;
  float* scratch;
};

struct BackwardUnit {
  const Attention& attention;
  const Sequence& sequence;
  int64_t first_key, last_key;
  int64_t first_head, heads;
  Heads<const void> grad, output;
  Heads<const double> logsumexp;
  Heads<void> grad_key, grad_value;  // data may be null
  float* row_sums;                   // (heads, rows, padded width): set to what grad_query is `scale` times; or null
  double* tables;                    // gradients of all tables, `lanes` partial sums of each, added to; or null
  float* scratch;
};

// Writes grad_query, zeros past the lengths included.
struct QueryGradient {
  const Attention& attention;
  const Sequence& sequence;
  int64_t first_head, heads;
  const float* row_sums;
  Heads<void> grad_query;
};

struct AttentionKernels {
  int64_t lanes;
  // Sizes in floats.
  int64_t (*forward_scratch)(const Attention&, int64_t heads);
  int64_t (*backward_scratch)(const Attention&, int64_t heads, int64_t rows);
  int64_t (*row_sums)(const Attention&, int64_t heads, int64_t rows);
  void (*forward)(const ForwardUnit&);
  void (*backward)(const BackwardUnit&);
  void (*store_rows)(const QueryGradient&);
};

#define BBQ_DECLARE(target)                           \
  namespace target {                                  \
  extern const AttentionKernels similarity_attention; \
  }
BBQ_FOR_SIMD_TARGETS(BBQ_DECLARE)
#undef BBQ_DECLARE

}  // namespace bbq
