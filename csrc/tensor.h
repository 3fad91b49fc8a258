// What every operator needs of a tensor: what it asks of it, typed pointers, dispatch over the element type, and torch's
// own threads. Stable ABI only: no ATen header.
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

inline bool on_one_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() ? b.is_cpu() : a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// Uninitialized, on the device of `like`. Straight to torch's allocator: through the dispatcher, as
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
inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}
inline Tensor empty_as(const Tensor& like) {  // its dtype, sizes and strides
  return empty_strided(like.sizes(), like.strides(), dtype_of(like), like);
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

// ---- Questions about a call. An operator whose tensors are others returns nothing, having done nothing: Python then makes
// them dense, and says what is wrong with bad input.

// The memory order of [N, C, H, W] whose strides are those of a new tensor, of dimensions of size 1 too: true for
// channels_last, false for NCHW. One pixel is NCHW, as eager's batch_norm has it. Nothing for any other tensor.
inline std::optional<bool> channels_last_of(const Tensor& t) {
  if (t.dim() != 4 || t.numel() == 0) return std::nullopt;
  const auto size = t.sizes(), stride = t.strides();
  const int64_t c = size[1], h = size[2], w = size[3];
  if (stride[0] != c * h * w) return std::nullopt;
  if (stride[3] == 1 && stride[2] == w && stride[1] == h * w) return false;
  if (size[0] * h * w > 1 && stride[1] == 1 && stride[3] == c && stride[2] == w * c) return true;
  return std::nullopt;
}

// Dense in some order, with strides that eager's elementwise operators give their output too.
inline bool has_lasting_strides(const Tensor& t) {
  const auto size = t.sizes(), stride = t.strides();
  int64_t expected = 1;
  bool contiguous = true;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    contiguous = contiguous && stride[d] == expected;
    expected *= size[d];
  }
  if (contiguous) return true;
  if (t.is_contiguous()) return false;  // but for dimensions of size 1, whose strides eager makes canonical
  if (channels_last_of(t)) return true;
  for (int64_t d = 0; d < t.dim(); ++d) {
    int64_t inner = 1;  // elements of the dimensions inside this one
    for (int64_t e = 0; e < t.dim(); ++e) inner *= e != d && stride[e] <= stride[d] ? size[e] : 1;
    if (size[d] == 1 || stride[d] != inner) return false;
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

// A contiguous [C] on the device of `like`, in fp32 unless `any_dtype`; or nothing.
inline bool is_per_channel(const OptionalTensor& t, int64_t channels, const Tensor& like, bool any_dtype = false) {
  return !t || (on_one_device(*t, like) && t->dim() == 1 && t->size(0) == channels && t->stride(0) == 1 &&
                (any_dtype ? has_kernel_dtype(*t) : t->scalar_type() == ScalarType::Float));
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

// Runs f(begin, end) over [0, tasks) on torch's threads. A thread is worth waking for about 16k elements; what a task
// computes never depends on which thread runs it.
template <class F>
void parallel_tasks(int64_t tasks, int64_t elements, const F& f) {
  constexpr int64_t kElementsPerThread = 16384;
  const int64_t grain = std::max<int64_t>(1, tasks * kElementsPerThread / std::max<int64_t>(1, elements));
  if (tasks <= grain) return f(0, tasks);
  torch::stable::parallel_for(0, tasks, grain, f);
}

// Runs f(worker, begin, end) for each of `workers` equal shares of [0, count), each on a thread of its own where there
// are as many: a worker has scratch memory of its own.
template <class F>
void parallel_workers(int64_t workers, int64_t count, const F& f) {
  const auto share = [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      const int64_t from = count * w / workers, to = count * (w + 1) / workers;
      if (from < to) f(w, from, to);
    }
  };
  if (workers == 1) return share(0, 1);
  torch::stable::parallel_for(0, workers, 1, share);
}

}  // namespace fastres
