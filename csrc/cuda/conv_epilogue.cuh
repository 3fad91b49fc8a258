// What the epilogues of both generations of kernels share.
#pragma once

#include <cutlass/array.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cutlass/tfloat32.h>

#include "cuda/conv_act.h"

namespace fastres {

// CUTLASS's name of an element type, and the one whose products its tensor cores form.
template <class T>
struct ConvElement;
template <>
struct ConvElement<Half> {
  using Memory = cutlass::half_t;
  using Product = cutlass::half_t;
};
template <>
struct ConvElement<BFloat16> {
  using Memory = cutlass::bfloat16_t;
  using Product = cutlass::bfloat16_t;
};
template <>
struct ConvElement<float> {
  using Memory = float;
  using Product = cutlass::tfloat32_t;
};

template <class T>
constexpr Type type_constant() {
  return std::is_same_v<T, float> ? Type::kFloat : std::is_same_v<T, Half> ? Type::kHalf : Type::kBFloat16;
}

// ReLU, ReLU6 or nothing, as bounds. By comparison: a maximum, as CUTLASS's own ReLU is, would turn NaN into 0.
struct Bounds {
  float lower = 0, upper = 0;
};
CUTLASS_HOST_DEVICE float bounded(float z, const Bounds& bounds) {
  return z < bounds.lower ? bounds.lower : z > bounds.upper ? bounds.upper : z;
}

// The same as an activation of CUTLASS: of a number, or of several.
template <class T>
struct Bounded {
  using Arguments = Bounds;
  CUTLASS_HOST_DEVICE float operator()(float z, const Bounds& bounds) const { return bounded(z, bounds); }
};
template <class T, int N>
struct Bounded<cutlass::Array<T, N>> {
  using Arguments = Bounds;
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(const cutlass::Array<T, N>& z, const Bounds& bounds) const {
    cutlass::Array<T, N> y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) y[i] = bounded(z[i], bounds);
    return y;
  }
};

}  // namespace fastres
