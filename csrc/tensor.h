// What every operator needs of a tensor: checks that name the tensor and say what was got and wanted, typed pointers,
// dispatch over the element type, and torch's own threads. Stable ABI only: no ATen header.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

#include "element.h"

namespace fastres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_string(const Tensor& t) {
  std::string s = "[";
  for (const int64_t size : t.sizes()) s += (s.size() > 1 ? ", " : "") + std::to_string(size);
  return s + "]";
}

inline void check_cpu(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
}

inline bool on_one_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() ? b.is_cpu() : a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
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

// Dense [N, C, H, W] in the order that the flag says. The stride of a dimension of size 1 means nothing: not read.
inline void check_layout(const Tensor& t, const char* name, bool channels_last) {
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected 4 dimensions [N, C, H, W], got ", t.dim());
  const auto sizes = t.sizes(), strides = t.strides();
  static constexpr int kOrder[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};  // innermost first: NCHW, NHWC
  int64_t expected = 1;
  for (const int d : kOrder[channels_last]) {
    STD_TORCH_CHECK(sizes[d] == 1 || strides[d] == expected, name, ": expected a dense ",
                    channels_last ? "channels_last" : "contiguous", " tensor; dimension ", d, " has stride ",
                    strides[d], ", wanted ", expected);
    expected *= sizes[d];
  }
}

// `like`: the tensor whose channels these are.
inline void check_channels(const Tensor& t, const char* name, int64_t channels, const Tensor& like,
                           const char* like_name) {
  check_device(t, name, like, like_name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected dtype Float, got ",
                  toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.is_contiguous(), name, ": expected a contiguous [",
                  channels, "], got ", shape_string(t));
}

// Uninitialised, on the device of `like`. Straight to torch's allocator: through the dispatcher, as
// torch::stable::empty_like goes, it takes as long as a small kernel.
inline Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  const bool cpu = like.is_cpu();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(),
                                                  cpu ? 0 : like.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor empty_as(const Tensor& like) {  // its dtype, sizes and strides
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided(like.sizes(), like.strides(), dtype, like);
}
inline Tensor empty_channels(int64_t channels, const Tensor& like) {  // [C], fp32
  const int64_t one = 1;
  return empty_strided({&channels, 1}, {&one, 1}, aoti_torch_dtype_float32(), like);
}

template <class T>
const T* input(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* input(const OptionalTensor& t) {
  return t ? input<T>(*t) : nullptr;
}
template <class T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <class T>
T* output(const OptionalTensor& t) {
  return t ? output<T>(*t) : nullptr;
}

// ---- Questions of a whole call (`_<op>_direct_native`), which answers instead of raising.

// [N, C, H, W], dense in one order and no other: C > 1 and H * W > 1, strides to the letter. None: neither, or both.
inline std::optional<bool> plainly_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.numel() == 0) return std::nullopt;
  const auto size = t.sizes(), stride = t.strides();
  const int64_t c = size[1], h = size[2], w = size[3];
  if (c == 1 || h * w == 1) return std::nullopt;
  if (stride[0] != c * h * w) return std::nullopt;
  if (stride[1] == 1 && stride[3] == c && stride[2] == w * c) return true;
  if (stride[3] == 1 && stride[2] == w && stride[1] == h * w) return false;
  return std::nullopt;
}

// Contiguous, the strides of dimensions of size 1 included.
inline bool is_canonically_contiguous(const Tensor& t) {
  const auto size = t.sizes(), stride = t.strides();
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (stride[d] != expected) return false;
    expected *= size[d];
  }
  return true;
}

inline bool looks_like(const OptionalTensor& t, const Tensor& like) {
  if (!t) return true;
  const auto size = t->sizes(), stride = t->strides(), size_wanted = like.sizes(), stride_wanted = like.strides();
  return on_one_device(*t, like) && t->scalar_type() == like.scalar_type() && t->dim() == like.dim() &&
         std::equal(size.begin(), size.end(), size_wanted.begin()) &&
         std::equal(stride.begin(), stride.end(), stride_wanted.begin());
}

inline bool has_kernel_dtype(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// A contiguous [C] in fp32 on the device of `like`, or nothing.
inline bool is_per_channel(const OptionalTensor& t, int64_t channels, const Tensor& like) {
  return !t || (on_one_device(*t, like) && t->scalar_type() == ScalarType::Float && t->dim() == 1 &&
                t->size(0) == channels && t->stride(0) == 1);
}
// One int64 on the device of `like`, or nothing.
inline bool is_counter(const OptionalTensor& t, const Tensor& like) {
  return !t || (on_one_device(*t, like) && t->numel() == 1 && t->scalar_type() == ScalarType::Long);
}

// Calls f with a value of the element type of `t`: float, BFloat16 or Half (element.h).
template <class F>
void dispatch_dtype(const Tensor& t, const char* name, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype Float, BFloat16 or Half, got ", toString(t.scalar_type()));
  }
}

// Calls f with std::true_type or std::false_type.
template <class F>
void with_bool(bool value, const F& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

// "relu" or "none".
inline bool is_relu(const std::string& act) {
  STD_TORCH_CHECK(act == "relu" || act == "none", "act: expected \"relu\" or \"none\", got \"", act, "\"");
  return act == "relu";
}

// Runs f(begin, end) over [0, tasks) on torch's threads. A thread is worth waking for about 16k elements; what a task
// computes never depends on which thread runs it.
template <class F>
void parallel_tasks(int64_t tasks, int64_t elements, const F& f) {
  constexpr int64_t kElementsPerThread = 16384;
  const int64_t grain = std::max<int64_t>(1, tasks * kElementsPerThread / std::max<int64_t>(1, elements));
  if (tasks <= grain) return f(0, tasks);
  torch::stable::parallel_for(0, tasks, grain, f);
}

}  // namespace fastres
