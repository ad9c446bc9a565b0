// Residual quantization on vectors of kLanes: the search, and the walks along the codes of rows. CMake compiles this
// once for each SIMD target.
//
// A score is |c|²/2 - r·c: the distance, halved, less |r|²/2. A lane is a codeword, and every lane sums its products
// over the width in the same order, whatever its row, codeword, tile or panel: equal codewords get equal scores.
#include "residual_quantization.h"
#include "simd.h"

namespace bbq::BBQ_SIMD {
namespace {

// A tile is kTileRows rows times a panel of kPanelVectors vectors of codewords, its sums kept in registers.
constexpr int kPanelVectors = 2;
constexpr int kPanelWords = kPanelVectors * kLanes;
constexpr int kTileRows = kRegisters * 3 / 4 / (kPanelVectors * kVectorRegisters);
static_assert(kBlockRows % kTileRows == 0 && kDepth % kLanes == 0);

constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

template <class T>
struct Type {
  using type = T;
};

template <class F>
BBQ_INLINE void dispatch(Element element, const F& f) {
  switch (element) {
    case Element::kFloat32:
      return f(Type<float>{});
    case Element::kBFloat16:
      return f(Type<BFloat16>{});
    case Element::kFloat16:
      return f(Type<Float16>{});
  }
}

BBQ_INLINE const float* word_of(const Codebooks& books, int64_t level, int64_t code) {
  return books.words + (level * books.size + code) * books.width;
}

BBQ_INLINE Doubles widen(Floats v) { return __builtin_convertvector(v, Doubles); }

// ---- Packing ----

// The squares of floats are exact in double: right to the last bit of a float.
double squared_norm(const float* v, int64_t width) {
  Doubles squares{};
  for_vectors(0, width, [&](int64_t d, auto lanes) BBQ_INLINE_LAMBDA {
    const Doubles values = widen(load(v + d, lanes));
    squares += values * values;
  });
  return sum(squares);
}

void pack_panel(const Codebooks& books, const Panels& panels, int64_t level, int64_t panel) {
  const int64_t index = level * panels.count + panel, first = panel * kPanelWords;
  float* words = panels.words + index * books.width * kPanelWords;
  float* half_norms = panels.half_norms + index * kPanelWords;
  double largest = 0;
  for (int64_t j = 0; j < kPanelWords; ++j) {
    half_norms[j] = kInfinity;
    if (first + j >= books.size) continue;
    const double norm = squared_norm(word_of(books, level, first + j), books.width);
    half_norms[j] = static_cast<float>(0.5 * norm);
    largest = norm <= largest ? largest : norm;  // NaN stays
    if (norm != norm) break;
  }
  panels.norms[index] = largest;
  for (int64_t begin = 0; begin < kPanelWords; begin += kLanes) {
    for_vectors(0, books.width, [&](int64_t d, auto lanes) BBQ_INLINE_LAMBDA {
      Floats square[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        const int64_t code = first + begin + j;
        square[j] = code < books.size ? load(word_of(books, level, code) + d, lanes) : Floats{};
      }
      transpose(square);
      for (int j = 0; j < kLanes && d + j < books.width; ++j) store(words + (d + j) * kPanelWords + begin, square[j]);
    });
  }
}

// ---- Search ----

// For each row of a block, lane by lane: the least score so far, and the vector of codewords that had it.
struct Best {
  Floats score[kBlockRows];
  Ints vector[kBlockRows];
};

// Adds the products of `depth` columns of some rows with a panel.
template <int rows>
BBQ_INLINE void multiply(Floats (&sums)[rows][kPanelVectors], const float* residual, const float* words,
                         int64_t depth) {
  for (int64_t d = 0; d < depth; ++d) {
    Floats word[kPanelVectors];
    unroll<kPanelVectors>([&]<int v>() BBQ_INLINE_LAMBDA { word[v] = load(words + d * kPanelWords + v * kLanes); });
    unroll<rows>([&]<int i>() BBQ_INLINE_LAMBDA {
      const float value = residual[i * kDepth + d];
      unroll<kPanelVectors>([&]<int v>() BBQ_INLINE_LAMBDA { sums[i][v] += word[v] * value; });
    });
  }
}

// Compares `rows` rows with a panel. `residual` points to the first of them in the first slab.
template <int rows>
__attribute__((noinline)) void search_tile(const float* residual, int64_t width, const float* words,
                                           const float* half_norms, int64_t panel, Floats* best_score,
                                           Ints* best_vector) {
  Floats dot[rows][kPanelVectors] = {};
  multiply<rows>(dot, residual, words, width < kDepth ? width : kDepth);
  for (int64_t begin = kDepth; begin < width; begin += kDepth) {
    Floats part[rows][kPanelVectors] = {};
    const int64_t rest = width - begin;
    multiply<rows>(part, residual + begin * kBlockRows, words + begin * kPanelWords, rest < kDepth ? rest : kDepth);
    unroll<rows>([&]<int i>() BBQ_INLINE_LAMBDA {
      unroll<kPanelVectors>([&]<int v>() BBQ_INLINE_LAMBDA { dot[i][v] += part[i][v]; });
    });
  }
  unroll<rows>([&]<int i>() BBQ_INLINE_LAMBDA {
    unroll<kPanelVectors>([&]<int v>() BBQ_INLINE_LAMBDA {
      const Floats score = load(half_norms + v * kLanes) - dot[i][v];
      const Ints less = score < best_score[i];  // false for NaN, and for a tie: the first stays
      best_score[i] = less ? score : best_score[i];
      best_vector[i] = less ? broadcast(static_cast<int32_t>(panel * kPanelVectors + v)) : best_vector[i];
    });
  });
}

// search_tile of any number of rows up to kTileRows.
template <int rows = kTileRows, class... Arguments>
BBQ_INLINE void search_rows(int64_t count, Arguments... arguments) {
  if (rows == 1 || count >= rows) return search_tile<rows>(arguments...);
  if constexpr (rows > 1) search_rows<rows - 1>(count, arguments...);
}

// The nearest codeword of each row of a block at one level; code 0 where every score is NaN or infinite.
void search(const QuantizeBlock& b, int64_t level, int32_t* codes) {
  Best best;
  for (int64_t i = 0; i < b.rows; ++i) {
    best.score[i] = broadcast(kInfinity);
    best.vector[i] = Ints{};
  }
  for (int64_t p = 0; p < b.panels.count; ++p) {
    const int64_t index = level * b.panels.count + p;
    for (int64_t i = 0; i < b.rows; i += kTileRows) {
      search_rows(b.rows - i, b.residual + i * kDepth, b.books.width,
                  b.panels.words + index * b.books.width * kPanelWords, b.panels.half_norms + index * kPanelWords, p,
                  best.score + i, best.vector + i);
    }
  }
  const Ints lanes = lane_numbers();
  for (int64_t i = 0; i < b.rows; ++i) {
    const Ints is_least = best.score[i] == broadcast(min(best.score[i]));
    codes[i] = min(is_least ? best.vector[i] * kLanes + lanes : broadcast(INT32_MAX));
  }
}

// The same for one residual, by distances: they stay finite where a score overflows.
int32_t search_by_distance(const QuantizeBlock& b, int64_t level, int64_t row) {
  float best = kInfinity;
  int32_t code = 0;
  for (int64_t k = 0; k < b.books.size; ++k) {
    const float* word = word_of(b.books, level, k);
    float distance = 0;
    for (int64_t d = 0; d < b.books.width; ++d) {
      const float rest = b.residual[(d / kDepth * kBlockRows + row) * kDepth + d % kDepth] - word[d];
      distance += rest * rest;
    }
    if (distance < best) {
      best = distance;
      code = static_cast<int32_t>(k);
    }
  }
  return code;
}

// Sums squares of a few vectors in float, those sums in double. `safe` stays true while no sum in float comes near
// overflow, so that nothing else does.
struct Squares {
  Doubles total{};
  Ints safe = ~Ints{};

  BBQ_INLINE void add(Floats few, float safe_square) {
    total += widen(few);
    safe &= few < broadcast(safe_square);
  }
};
constexpr int64_t kFewVectors = 4;

// Calls f(slab column pointer of the row, d, lanes) for every vector of a row, adding the squares of what it returns.
template <class F>
BBQ_INLINE void for_residual(const QuantizeBlock& b, int64_t row, Squares& squares, const F& f) {
  for (int64_t begin = 0; begin < b.books.width; begin += kFewVectors * kLanes) {
    const int64_t end = begin + kFewVectors * kLanes;
    float* residual = b.residual + (begin / kDepth * kBlockRows + row) * kDepth + begin % kDepth;
    Floats few{};
    for_vectors(begin, end < b.books.width ? end : b.books.width, [&](int64_t d, auto lanes) BBQ_INLINE_LAMBDA {
      const Floats value = f(residual + (d - begin), d, lanes);
      few += value * value;
    });
    squares.add(few, b.safe_square);
  }
}

double squared_residual(const QuantizeBlock& b, int64_t row) {
  Squares squares;
  for_residual(b, row, squares, [](const float* r, int64_t, auto) BBQ_INLINE_LAMBDA { return load(r); });
  return sum(squares.total);
}

// ---- Sums of codewords ----

// Calls f<4>(d, All) for groups of four vectors of columns, then f<1>(d, All or First) for the rest.
template <class F>
BBQ_INLINE void for_groups(int64_t begin, int64_t end, const F& f) {
  constexpr int kGroup = 4;
  int64_t d = begin;
  for (; d + kGroup * kLanes <= end; d += kGroup * kLanes) f.template operator()<kGroup>(d, All{});
  for_vectors(d, end, [&](int64_t rest, auto lanes) BBQ_INLINE_LAMBDA { f.template operator()<1>(rest, lanes); });
}

// Writes columns begin to end of the sum of a row's codewords; -1 adds nothing.
template <class T>
BBQ_INLINE void sum_words(const int64_t* codes, const Codebooks& books, int64_t begin, int64_t end, T* output) {
  for_groups(begin, end, [&]<int count>(int64_t d, auto lanes) BBQ_INLINE_LAMBDA {
    Floats total[count] = {};
    for (int64_t l = 0; l < books.levels; ++l) {
      if (codes[l] < 0) continue;
      const float* word = word_of(books, l, codes[l]) + d;
      unroll<count>([&]<int v>() BBQ_INLINE_LAMBDA { total[v] += load(word + v * kLanes, lanes); });
    }
    unroll<count>([&]<int v>() BBQ_INLINE_LAMBDA { store(output + d + v * kLanes, total[v], lanes); });
  });
}

template <class T>
BBQ_INLINE void fill(T* output, int64_t begin, int64_t end, float value) {
  for_vectors(begin, end, [&](int64_t d, auto lanes) BBQ_INLINE_LAMBDA { store(output + d, broadcast(value), lanes); });
}

// ---- The block ----

template <class T>
BBQ_INLINE void load_rows(const QuantizeBlock& b, Squares& squares) {
  const T* x = static_cast<const T*>(b.x);
  for (int64_t i = 0; i < b.rows; ++i) {
    for_residual(b, i, squares, [&](float* residual, int64_t d, auto lanes) BBQ_INLINE_LAMBDA {
      const Floats value = load(x + i * b.books.width + d, lanes);
      store(residual, value);
      return value;
    });
  }
}

template <class T>
BBQ_INLINE void write_rows(const QuantizeBlock& b, const bool* bad) {
  T* output = static_cast<T*>(b.quantized);
  for (int64_t i = 0; i < b.rows; ++i) {
    if (bad[i]) {
      fill(output + i * b.books.width, 0, b.books.width, kNaN);
    } else {
      sum_words(b.codes + i * b.books.levels, b.books, 0, b.books.width, output + i * b.books.width);
    }
  }
}

void quantize(const QuantizeBlock& b) {
  const int64_t levels = b.books.levels;
  bool bad[kBlockRows] = {};
  Squares squares;
  dispatch(b.element, [&](auto type) { load_rows<typename decltype(type)::type>(b, squares); });
  for (int64_t l = 0; l < levels; ++l) {
    int32_t codes[kBlockRows];
    search(b, l, codes);
    if (!all(squares.safe)) {  // looks at every row, and decides by that row alone
      for (int64_t i = 0; i < b.rows; ++i) {
        const bool safe = squared_residual(b, i) + b.largest_norms[l] < kSafeNorm;  // false for NaN
        if (!safe && !bad[i]) codes[i] = search_by_distance(b, l, i);
      }
    }
    squares = Squares{};
    for (int64_t i = 0; i < b.rows; ++i) {
      const float* word = word_of(b.books, l, codes[i]);
      for_residual(b, i, squares, [&](float* residual, int64_t d, auto lanes) BBQ_INLINE_LAMBDA {
        const Floats rest = load(residual) - load(word + d, lanes);
        store(residual, rest);
        return rest;
      });
      b.codes[i * levels + l] = codes[i];
    }
    b.losses[l] = sum(squares.total);
    if (!all(squares.safe)) {
      for (int64_t i = 0; i < b.rows; ++i) {
        bad[i] = bad[i] || !__builtin_isfinite(static_cast<float>(squared_residual(b, i)));
      }
    }
  }
  for (int64_t i = 0; i < b.rows; ++i) {
    if (!bad[i]) continue;
    *b.any_bad = true;
    for (int64_t l = 0; l < levels; ++l) b.codes[i * levels + l] = -1;
  }
  dispatch(b.element, [&](auto type) { write_rows<typename decltype(type)::type>(b, bad); });
}

// ---- Walks ----

// Whether all codes of a row are in range; reports it if not.
BBQ_INLINE bool check_row(const Walk& w, const int64_t* codes) {
  bool valid = true;
  for (int64_t l = 0; l < w.books.levels; ++l) valid = valid && codes[l] >= -1 && codes[l] < w.books.size;
  if (!valid) *w.codes_valid = false;
  return valid;
}

// Calls f(row, its codes) for the rows whose codes are in range.
template <class F>
BBQ_INLINE void for_rows(const Walk& w, const F& f) {
  for (int64_t i = 0; i < w.rows; ++i) {
    const int64_t* codes = w.codes + i * w.books.levels;
    if (check_row(w, codes)) f(i, codes);
  }
}

// Follows `count` vectors of a row from column d on through the levels that have a code:
// step<v>(level, offset in the codebooks, residual before, residual after).
template <int count, class T, class L, class F>
BBQ_INLINE void follow(const Codebooks& books, const int64_t* codes, const T* row, int64_t d, L lanes, const F& step) {
  Floats residual[count];
  unroll<count>([&]<int v>() BBQ_INLINE_LAMBDA { residual[v] = load(row + d + v * kLanes, lanes); });
  for (int64_t l = 0; l < books.levels; ++l) {
    if (codes[l] < 0) continue;
    const int64_t offset = (l * books.size + codes[l]) * books.width + d;
    unroll<count>([&]<int v>() BBQ_INLINE_LAMBDA {
      const Floats next = residual[v] - load(books.words + offset + v * kLanes, lanes);
      step.template operator()<v>(l, offset + v * kLanes, residual[v], next);
      residual[v] = next;
    });
  }
}

template <class T>
BBQ_INLINE void quantize_backward_rows(const QuantizeGradient& g) {
  const Walk& w = g.walk;
  const T *x = static_cast<const T*>(w.x), *grad_quantized = static_cast<const T*>(g.grad_quantized);
  T* grad_x = static_cast<T*>(g.grad_x);
  for_rows(w, [&](int64_t i, const int64_t* codes) BBQ_INLINE_LAMBDA {
    const int64_t row = i * w.books.width;
    for_groups(w.begin, w.end, [&]<int count>(int64_t d, auto lanes) BBQ_INLINE_LAMBDA {
      Floats grad[count] = {};
      if (grad_quantized) {
        unroll<count>([&]<int v>() BBQ_INLINE_LAMBDA { grad[v] = load(grad_quantized + row + d + v * kLanes, lanes); });
      }
      follow<count>(w.books, codes, x + row, d, lanes,
                    [&]<int v>(int64_t l, int64_t offset, Floats, Floats next) BBQ_INLINE_LAMBDA {
                      grad[v] += g.x_scales[l] * next;
                      if (g.grad_codebooks) {
                        float* target = g.grad_codebooks + offset;
                        store(target, load(target, lanes) - g.book_scales[l] * next, lanes);
                      }
                    });
      if (grad_x) {
        unroll<count>([&]<int v>() BBQ_INLINE_LAMBDA {
          store(grad_x + row + d + v * kLanes, codes[0] < 0 ? broadcast(kNaN) : grad[v], lanes);
        });
      }
    });
  });
}

void quantize_backward(const QuantizeGradient& g) {
  dispatch(g.walk.element, [&](auto type) { quantize_backward_rows<typename decltype(type)::type>(g); });
}

void decode(const Walk& w, float* output) {
  for_rows(w, [&](int64_t i, const int64_t* codes)
                  BBQ_INLINE_LAMBDA { sum_words(codes, w.books, w.begin, w.end, output + i * w.books.width); });
}

void decode_backward(const Walk& w, float* grad_codebooks) {
  const float* grad = static_cast<const float*>(w.x);
  for_rows(w, [&](int64_t i, const int64_t* codes) BBQ_INLINE_LAMBDA {
    for_groups(w.begin, w.end, [&]<int count>(int64_t d, auto lanes) BBQ_INLINE_LAMBDA {
      Floats value[count];
      unroll<count>([&]<int v>()
                        BBQ_INLINE_LAMBDA { value[v] = load(grad + i * w.books.width + d + v * kLanes, lanes); });
      for (int64_t l = 0; l < w.books.levels; ++l) {
        if (codes[l] < 0) continue;
        float* target = grad_codebooks + (l * w.books.size + codes[l]) * w.books.width + d;
        unroll<count>([&]<int v>() BBQ_INLINE_LAMBDA {
          store(target + v * kLanes, load(target + v * kLanes, lanes) + value[v], lanes);
        });
      }
    });
  });
}

template <class T>
BBQ_INLINE void statistics_rows(const Walk& w, float* sums, int64_t* counts) {
  for_rows(w, [&](int64_t i, const int64_t* codes) BBQ_INLINE_LAMBDA {
    if (counts) {
      for (int64_t l = 0; l < w.books.levels; ++l) {
        if (codes[l] >= 0) ++counts[l * w.books.size + codes[l]];
      }
    }
    for_groups(w.begin, w.end, [&]<int count>(int64_t d, auto lanes) BBQ_INLINE_LAMBDA {
      follow<count>(w.books, codes, static_cast<const T*>(w.x) + i * w.books.width, d, lanes,
                    [&]<int v>(int64_t, int64_t offset, Floats residual, Floats)
                        BBQ_INLINE_LAMBDA { store(sums + offset, load(sums + offset, lanes) + residual, lanes); });
    });
  });
}

void statistics(const Walk& w, float* sums, int64_t* counts) {
  dispatch(w.element, [&](auto type) { statistics_rows<typename decltype(type)::type>(w, sums, counts); });
}

}  // namespace

const QuantizationKernels residual_quantization = {kPanelWords, pack_panel,      quantize,  quantize_backward,
                                                   decode,      decode_backward, statistics};

}  // namespace bbq::BBQ_SIMD
