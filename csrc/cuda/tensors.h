// torch's side of a CUDA launch: checks, the tensor's own device made current, torch's current stream on it. Stable ABI.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "cuda/runtime.h"
#include "tensor.h"

namespace fastres {

inline void check_cuda_tensor(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
}

inline std::string device_string(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}
inline void check_device(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(on_one_device(t, like), name, ": expected device ", device_string(like), " as ", like_name, ", got ",
                  device_string(t), " (shape ", shape_string(t), ", dtype ", toString(t.scalar_type()), ")");
}

// `t` must look like `like` in device, shape and dtype: the kernels walk both with one set of offsets.
inline void check_same(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check_device(t, name, like, like_name);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected dtype ", toString(like.scalar_type()),
                  " as ", like_name, ", got ", toString(t.scalar_type()));
  const auto sizes = t.sizes(), wanted = like.sizes();
  STD_TORCH_CHECK(sizes.size() == wanted.size() && std::equal(sizes.begin(), sizes.end(), wanted.begin()), name,
                  ": expected shape ", shape_string(like), " as ", like_name, ", got ", shape_string(t));
}

// Dense [N, C, H, W] in channels_last order. The stride of a dimension of size 1 means nothing: not read.
inline void check_channels_last(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected 4 dimensions [N, C, H, W], got ", t.dim());
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(sizes[d] == 1 || strides[d] == expected, name, ": expected a dense channels_last tensor; dimension ",
                    d, " has stride ", strides[d], ", wanted ", expected);
    expected *= sizes[d];
  }
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
