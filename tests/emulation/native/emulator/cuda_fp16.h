// fp16 as CUDA's intrinsics name it, by the CPU kernels' conversions.
#pragma once

#include "cpu/isa.h"
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half low, high;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline float __half2float(__half value) { return fastres::float_from_half<1>(value.bits); }
inline __half __float2half_rn(float value) { return {static_cast<uint16_t>(fastres::half_from_float<1>(value))}; }
inline float __low2float(__half2 pair) { return __half2float(pair.low); }
inline float __high2float(__half2 pair) { return __half2float(pair.high); }
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
