// Shared by the CUDA operators: stable-ABI includes, and launches on PyTorch's stream with memory of its allocator.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/tensors.h"
#include "cuda/device.cuh"

// The headers of a CPU build of torch hide it; its CUDA libraries export it in every version >= 2.10.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace bbq {

inline void check_cuda(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA, ") + doing + ": " + cudaGetErrorString(error));
  }
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// The stream of a tensor's device, which is the current device while this lives.
class CudaQueue {
 public:
  explicit CudaQueue(const Tensor& tensor) : like_(tensor), guard_(tensor.get_device_index()) {
    const int device = tensor.get_device_index();
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    const auto ask = [device](cudaDeviceAttr attribute) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "asking for an attribute of the device");
      return value;
    };
    machine_ = {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }

  const Machine& machine() const { return machine_; }

  // Freed with the queue; PyTorch's allocator then gives it to later work of the same stream only.
  template <class U>
  U* scratch(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(U));
    scratch_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
    return mutable_data<U>(scratch_.back());
  }

  template <class Kernel>
  void run(int64_t blocks, int64_t blocks_y, int threads, int shared_bytes, const typename Kernel::Params& params) {
    if (blocks > 0x7fffffff || blocks_y > 65535) {
      throw std::invalid_argument(
          "too many rows, sequences or levels for one launch on this device; give fewer at once");
    }
    const auto kernel = &entry<Kernel>;
    if (shared_bytes > 48 * 1024) {  // more has to be asked for
      const auto set = [kernel](cudaFuncAttribute attribute, int value) {
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value),
                   "asking for shared memory");
      };
      set(cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);  // for several blocks
    }
    kernel<<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_y)), threads, shared_bytes, stream_>>>(
        params);
    check_cuda(cudaGetLastError(), "launching a kernel");
  }

 private:
  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  Machine machine_{};
  std::vector<Tensor> scratch_;
};

}  // namespace bbq
