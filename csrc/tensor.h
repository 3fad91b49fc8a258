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

// `t` must look like `like` in shape and dtype: the kernels walk both with one set of offsets.
inline void check_same(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check_cpu(t, name);
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

inline void check_channels(const Tensor& t, const char* name, int64_t channels) {
  check_cpu(t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected dtype Float, got ",
                  toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.is_contiguous(), name, ": expected a contiguous [",
                  channels, "], got ", shape_string(t));
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
  torch::stable::parallel_for(0, tasks, grain, f);
}

}  // namespace fastres
