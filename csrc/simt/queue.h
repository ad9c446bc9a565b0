// Memory and launches for operators that run in csrc/simt: what a CUDA stream is to them on a GPU.
#pragma once

#include <cxxabi.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <list>
#include <memory>
#include <typeinfo>
#include <vector>

#include "simt/simt.h"

namespace bbq::simt {

// The limits that plans of operators ask for; tests shrink them.
struct Limits {
  int processors = 3;
  int shared_per_block = 227 * 1024;
};
Limits& limits();

class Queue {
 public:
  // Memory as it is after cudaMalloc, only worse: NaN in every float.
  template <class T>
  Pointer<T> scratch(int64_t count) {
    storage_.push_back(std::make_unique<std::byte[]>(count * sizeof(T) + 16));
    std::memset(storage_.back().get(), 0xff, count * sizeof(T));
    return region<T>("scratch memory", storage_.back().get(), count * sizeof(T));
  }
  // Without any bytes a null pointer, as PyTorch gives one for a tensor without elements.
  template <class T>
  Pointer<T> region(const char* name, void* memory, size_t bytes) {
    if (bytes == 0) return nullptr;
    regions_.push_back({name, static_cast<std::byte*>(memory), bytes, {}});
    return {reinterpret_cast<uintptr_t>(memory), &regions_.back()};
  }
  // An argument: contiguous, in the dtype that the caller checked.
  template <class T>
  Pointer<const T> input(const char* name, const pybind11::array& array) {
    if (!(array.flags() & pybind11::array::c_style) || array.itemsize() != sizeof(T)) {
      throw std::invalid_argument(std::string(name) + ": expected a contiguous array of the right dtype");
    }
    return region<T>(name, const_cast<void*>(array.data()), array.nbytes());
  }
  // A result, NaN (or -1) before the kernels run.
  template <class T>
  Pointer<T> output(const char* name, pybind11::array& array) {
    std::memset(array.mutable_data(), 0xff, array.nbytes());
    return region<T>(name, array.mutable_data(), array.nbytes());
  }

  template <class Kernel>
  void run(int64_t blocks, int64_t blocks_y, int threads, int shared_bytes, const typename Kernel::Params& params) {
    if (blocks < 1 || blocks_y < 1) throw Fault("a launch without blocks");  // CUDA refuses it
    if (shared_bytes > limits().shared_per_block) throw Fault("a launch with more shared memory than there is");
    int status;
    const std::unique_ptr<char, void (*)(void*)> name(
        abi::__cxa_demangle(typeid(Kernel).name(), nullptr, nullptr, &status), std::free);
    launch(name.get(), {{blocks, blocks_y, 1}, threads, shared_bytes}, [&] { Kernel::run(params); });
  }

 private:
  std::vector<std::unique_ptr<std::byte[]>> storage_;
  std::list<Region> regions_;  // pointers to them stay valid
};

}  // namespace bbq::simt
