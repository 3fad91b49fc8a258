// bf16 as CUDA's intrinsics name it, by the CPU kernels' conversion.
#pragma once

#include "cpu/isa.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 low, high;
};

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {static_cast<uint16_t>(fastres::bfloat16_bits(static_cast<int32_t>(__float_as_uint(value))))};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
