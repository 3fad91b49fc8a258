// torch's side of a CUDA launch: checks, the tensor's own device made current, torch's current stream on it. Stable ABI.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "cuda/runtime.h"
#include "tensor.h"

namespace fastres {

inline void check_cuda_tensor(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
}

inline Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Half:
      return Type::kHalf;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, ": expected dtype Float, BFloat16 or Half, got ", toString(t.scalar_type()), " of shape ",
                  shape_string(t));
}

inline void* data(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }
inline void* data(const OptionalTensor& t) { return t ? data(*t) : nullptr; }

// While it lives, the tensor's device is the current one: kernels and allocations go there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = {static_cast<int>(device_), static_cast<cudaStream_t>(stream)};
  }
  const Stream& stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceIndex device_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

}  // namespace fastres
