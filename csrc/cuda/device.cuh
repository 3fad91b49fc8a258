// What every kernel needs on the device: 16 bytes of a tensor in registers, as fp32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/launch.h"
#include "element.h"

namespace fastres {

// V neighboring elements as they are in memory: 16 bytes in four registers, or one element.
template <class T, int V>
struct Pack {
  static_assert(V * sizeof(T) == kVectorBytes);
  uint4 raw;
};
template <class T>
struct Pack<T, 1> {
  T raw;
};

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* p) {
  return {*reinterpret_cast<const decltype(Pack<T, V>::raw)*>(p)};
}
template <class T, int V>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& pack) {
  using Raw = decltype(Pack<T, V>::raw);
#if defined(__CUDA_ARCH__)
  if constexpr (V > 1) {  // by hand: the compiler makes four stores of an assignment where it has the words apart
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(pack.raw.x),
                 "r"(pack.raw.y), "r"(pack.raw.z), "r"(pack.raw.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Raw*>(p) = pack.raw;
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }

// To the nearest, ties to even; NaN stays NaN.
template <class T>
__device__ __forceinline__ T narrow(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else {
    return {__half_as_ushort(__float2half_rn(value))};
  }
}

// A word holds two 16-bit elements, which one instruction rounds and packs.
template <class T>
__device__ __forceinline__ void widen_word(uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  } else {
    __half2 pair;
    std::memcpy(&pair, &word, sizeof pair);
    low = __low2float(pair);
    high = __high2float(pair);
  }
}
template <class T>
__device__ __forceinline__ uint32_t narrow_word(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    std::memcpy(&word, &pair, sizeof word);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    std::memcpy(&word, &pair, sizeof word);
  }
  return word;
}

template <class T, int V>
__device__ __forceinline__ void widen(const Pack<T, V>& pack, float (&value)[V]) {
  if constexpr (V == 1) {
    value[0] = widen(pack.raw);
  } else {
    const uint32_t word[4] = {pack.raw.x, pack.raw.y, pack.raw.z, pack.raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (V == 4) {
        value[i] = __uint_as_float(word[i]);
      } else {
        widen_word<T>(word[i], value[2 * i], value[2 * i + 1]);
      }
    }
  }
}

// One lane, where a kernel goes across several packs: all lanes of all of them at once would take too many registers.
template <class T, int V>
__device__ __forceinline__ float widen_lane(const Pack<T, V>& pack, int lane) {
  if constexpr (V == 1) {
    return widen(pack.raw);
  } else {
    const uint32_t word[4] = {pack.raw.x, pack.raw.y, pack.raw.z, pack.raw.w};
    if constexpr (V == 4) {
      return __uint_as_float(word[lane]);
    } else {
      float low, high;
      widen_word<T>(word[lane / 2], low, high);
      return lane % 2 == 0 ? low : high;
    }
  }
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> narrow(const float (&value)[V]) {
  if constexpr (V == 1) {
    return {narrow<T>(value[0])};
  } else {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (V == 4) {
        word[i] = __float_as_uint(value[i]);
      } else {
        word[i] = narrow_word<T>(value[2 * i], value[2 * i + 1]);
      }
    }
    return {make_uint4(word[0], word[1], word[2], word[3])};
  }
}

}  // namespace fastres
