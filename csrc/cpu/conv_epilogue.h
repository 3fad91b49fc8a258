// What follows a CPU convolution in its own pass: y = act(scale * c + bias + residual), on fp32 lanes, rounded once.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/isa.h"

namespace fastres {

enum class Act : int { kNone, kRelu, kRelu6, kHardswish };

inline int act_index(const std::string& name) {  // -1: none of them
  const char* names[] = {"none", "relu", "relu6", "hardswish"};
  for (int i = 0; i < 4; ++i) {
    if (name == names[i]) return i;
  }
  return -1;
}

// Comparisons are false for NaN, which passes, as in torch's activations.
template <class V>
FASTRES_HD V apply(Act act, V z) {
  switch (act) {
    case Act::kRelu:
      return activate(z, V{});
    case Act::kRelu6: {
      const V six = V{} + 6.0f, low = activate(z, V{});
      return low > six ? six : low;
    }
    case Act::kHardswish: {
      const V six = V{} + 6.0f, low = activate(z + 3.0f, V{});
      return z * (low > six ? six : low) / 6.0f;
    }
    default:
      return z;
  }
}

template <class T>
struct Epilogue {
  const float* scale;  // [K] or null
  const float* bias;   // [K] or null
  const T* residual;   // as y, or null; y's own memory, perhaps
  T* y;
  Act act;

  // Writes y[at], the result of output channel k; W of both at once.
  template <int W>
  FASTRES_HD void put(Float<W> c, int64_t at, int64_t k) const {
    if (scale != nullptr) c *= load<W>(scale + k);
    if (bias != nullptr) c += load<W>(bias + k);
    if (residual != nullptr) c += load<W>(residual + at);
    store<W>(y + at, apply(act, c));
  }
};

}  // namespace fastres
