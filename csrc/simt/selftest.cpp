// What csrc/simt promises, in small: a kernel that uses everything, with faults planted in it one at a time.
#include <map>

#include "cuda/device.cuh"
#include "simt/queue.h"

namespace bbq {
namespace {

namespace py = pybind11;
using gpu::Global;
using gpu::Shared;

enum class Planted {
  kNone,
  kMissingBarrier,
  kMissingWarpBarrier,
  kDivergentBarrier,
  kDivergentShuffle,
  kMissedWait,
  kWrongMask,
  kWrongLanes,
  kOutOfBounds,
  kNeverWritten,
};

// For each row of 16 float16 elements, the largest product with one of up to 8 codewords. A warp takes 16 rows, the
// codewords come by an asynchronous copy.
struct LargestProduct {
  static constexpr int kThreads = 64, kDepth = 16, kWords = 8;
  static constexpr int kExchange = kWords * kDepth * 2;  // byte offset of four floats for each of 8 rows of a warp
  static constexpr int kSharedBytes = kExchange + kThreads / gpu::kLanes * 8 * 4 * 4;
  struct Params {
    Global<const uint16_t> rows, words;
    Global<float> output;
    int64_t row_count;
    int word_count;
    Planted planted;
  };

  static void run(const Params& p) {
    const int lane = gpu::lane_index(), group = lane / 4, member = lane % 4;
    const Shared<uint16_t> tile = gpu::shared_at<uint16_t>(0);
    if (gpu::thread_index() < kWords * 2) {  // two pieces of 16 bytes to a codeword
      const int word = gpu::thread_index() / 2;
      gpu::async_copy16(tile + gpu::thread_index() * 8, p.words + gpu::thread_index() * 8,
                        word < p.word_count ? 16 : 0);
    }
    gpu::async_commit();
    if (p.planted != Planted::kMissedWait) gpu::async_wait<0>();
    if (p.planted != Planted::kMissingBarrier) gpu::sync_threads();

    const int64_t first = gpu::block_index() * 32 + gpu::warp_index() * 16 + group;
    gpu::Left left;
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first + 8 * (i % 2);
      const bool inside = row < p.row_count || p.planted == Planted::kOutOfBounds;
      left.v[i] = inside ? gpu::cast<const uint32_t>(p.rows + row * kDepth + 2 * member + 8 * (i / 2)).read() : 0;
    }
    gpu::Right right;
    for (int i = 0; i < 2; ++i) {
      const int word = p.planted == Planted::kWrongLanes ? lane % 8 : group;
      right.v[i] = gpu::cast<const uint32_t>(tile + word * kDepth + 2 * member + 8 * i).read();
    }
    const gpu::Accumulator products = gpu::multiply_half(left, right, {});

    const Shared<float> exchange = gpu::shared_at<float>(kExchange) + gpu::warp_index() * 32;
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + 8 * half;
      float largest = -gpu::kInfinity;
      for (int i = 0; i < 2; ++i) {
        const bool valid = 2 * member + i < p.word_count || p.planted == Planted::kWrongMask;
        if (valid) largest = fmaxf(largest, products.v[2 * half + i]);
      }
      if (p.planted == Planted::kDivergentShuffle && row >= p.row_count) continue;
      largest = fmaxf(largest, gpu::shuffle_xor(largest, 1));
      // The other pair of lanes through memory.
      if (p.planted != Planted::kNeverWritten || member > 0) exchange[4 * group + member] = largest;
      if (p.planted != Planted::kMissingWarpBarrier) gpu::sync_warp();
      const float other = exchange[4 * group + (member ^ 2)];
      gpu::sync_warp();
      if (member == 0 && row < p.row_count) p.output[row] = fmaxf(largest, other);
    }
    if (p.planted == Planted::kDivergentBarrier && gpu::warp_index() == 0) gpu::sync_threads();
  }
};

py::array largest_product(const py::array& rows, const py::array& words, const std::string& planted) {
  static const std::map<std::string, Planted> names = {
      {"", Planted::kNone},
      {"missing barrier", Planted::kMissingBarrier},
      {"missing warp barrier", Planted::kMissingWarpBarrier},
      {"divergent barrier", Planted::kDivergentBarrier},
      {"divergent shuffle", Planted::kDivergentShuffle},
      {"missed wait", Planted::kMissedWait},
      {"wrong mask", Planted::kWrongMask},
      {"wrong lanes", Planted::kWrongLanes},
      {"out of bounds", Planted::kOutOfBounds},
      {"never written", Planted::kNeverWritten},
  };
  simt::Queue queue;
  py::array output = py::array_t<float>(rows.shape(0));
  queue.run<LargestProduct>(
      (rows.shape(0) + 31) / 32, 1, LargestProduct::kThreads, LargestProduct::kSharedBytes,
      {queue.input<uint16_t>("rows", rows), queue.input<uint16_t>("words", words),
       queue.output<float>("output", output), rows.shape(0), static_cast<int>(words.shape(0)), names.at(planted)});
  return output;
}

// One tile product by one warp, from float32 matrices a (16, depth), b (8, depth) and c (16, 8).
struct OneProduct {
  struct Params {
    Global<const float> a, b, c;
    Global<float> output;
    simt::Tile kind;
  };
  static uint32_t pack(simt::Tile kind, Global<const float> pair) {
    if (kind == simt::Tile::kTf32) return gpu::float_bits(round_to_tf32(pair[0]));
    if (kind == simt::Tile::kHalf) return gpu::pack_half(pair[0], pair[1]);
    return from_float<BFloat16>(pair[0]).bits | uint32_t{from_float<BFloat16>(pair[1]).bits} << 16;
  }
  static void run(const Params& p) {
    const int group = gpu::lane_index() / 4, member = gpu::lane_index() % 4;
    const bool wide = p.kind == simt::Tile::kTf32;
    const int depth = wide ? 8 : 16, step = wide ? 4 : 8, first = wide ? member : 2 * member;
    gpu::Left left;
    gpu::Right right;
    gpu::Accumulator sums;
    for (int i = 0; i < 4; ++i) {
      left.v[i] = pack(p.kind, p.a + (group + 8 * (i % 2)) * depth + first + step * (i / 2));
      sums.v[i] = p.c[(group + 8 * (i / 2)) * 8 + 2 * member + i % 2];
    }
    for (int i = 0; i < 2; ++i) right.v[i] = pack(p.kind, p.b + group * depth + first + step * i);
    sums = gpu::multiply_tiles(p.kind, left, right, sums, simt::Location::current());
    for (int i = 0; i < 4; ++i) p.output[(group + 8 * (i / 2)) * 8 + 2 * member + i % 2] = sums.v[i];
  }
};

py::array tile_product(const std::string& kind, const py::array& a, const py::array& b, const py::array& c) {
  static const std::map<std::string, simt::Tile> kinds = {
      {"float16", simt::Tile::kHalf}, {"bfloat16", simt::Tile::kBFloat16}, {"tf32", simt::Tile::kTf32}};
  simt::Queue queue;
  py::array output = py::array_t<float>(std::vector<py::ssize_t>{16, 8});
  queue.run<OneProduct>(1, 1, gpu::kLanes, 0,
                        {queue.input<float>("a", a), queue.input<float>("b", b), queue.input<float>("c", c),
                         queue.output<float>("output", output), kinds.at(kind)});
  return output;
}

// Rounds to a dtype and back, by the conversions of csrc/common/floats.h.
py::array round_trip(const std::string& kind, const py::array_t<float>& values) {
  py::array_t<float> output(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) {
    const float value = values.at(i);
    output.mutable_at(i) = kind == "float16"    ? to_float(from_float<Half>(value))
                           : kind == "bfloat16" ? to_float(from_float<BFloat16>(value))
                                                : round_to_tf32(value);
  }
  return output;
}

}  // namespace

void bind_selftest(py::module_& m) {
  m.def("largest_product", &largest_product);
  m.def("tile_product", &tile_product);
  m.def("round_trip", &round_trip);
}

}  // namespace bbq
