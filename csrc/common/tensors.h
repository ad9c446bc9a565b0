// Tensors of torch's stable ABI, for the libraries of every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace bbq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Lets kernels fill a contiguous buffer for an output whose strides may be others.
class ContiguousOutput {
 public:
  explicit ContiguousOutput(const Tensor& output)
      : output_(output), buffer_(output.is_contiguous() ? output : torch::stable::contiguous(output)) {}
  const Tensor& buffer() const { return buffer_; }
  // Copies into the output where they differ, and returns it.
  Tensor finish() {
    if (buffer_.get() != output_.get()) torch::stable::copy_(output_, buffer_);
    return output_;
  }

 private:
  Tensor output_;
  Tensor buffer_;
};

}  // namespace bbq
