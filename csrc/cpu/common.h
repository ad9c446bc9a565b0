// Shared by the CPU operators: stable-ABI includes, loops over cores, memory.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#if defined(BBQ_STD_THREADS)
#include <thread>
#endif
#include <vector>

#include "common/tensors.h"
#include "simd_targets.h"

namespace bbq {

inline Element element_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      throw std::invalid_argument(std::string(name) + ": expected dtype float32, bfloat16 or float16");
  }
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Calls f() on up to `workers` threads at once.
template <class F>
void on_threads(int64_t workers, const F& f) {
#if defined(BBQ_STD_THREADS)  // for ThreadSanitizer, which cannot see the barriers of the OpenMP that torch runs on
  std::vector<std::thread> threads;
  for (int64_t w = 0; w < workers; ++w) threads.emplace_back([&] { f(); });
  for (std::thread& thread : threads) thread.join();
#else
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { f(); });
#endif
}

// Calls f(scratch, 0), ..., f(scratch, count - 1), on all cores, each of which takes the next one when it is done and
// has a scratch of its own, made by make_scratch().
template <class Make, class F>
void for_all(int64_t count, const Make& make_scratch, const F& f) {
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  on_threads(workers, [&] {
    auto scratch = make_scratch();
    for (int64_t u; (u = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(scratch, u);
  });
}

// The same without scratch: f(0), ..., f(count - 1).
template <class F>
void for_all(int64_t count, const F& f) {
  for_all(count, [] { return 0; }, [&](int, int64_t u) { f(u); });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialized memory, aligned to the widest vectors.
template <class T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), kAlignment))) {}
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { ::operator delete(data_, kAlignment); }
  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace bbq
