// Vector lanes and run-time choice of the instruction set for the CPU kernels. Includes nothing of torch.
//
// A kernel is a struct with `template <int W> FASTRES_HD void run(int64_t begin, int64_t end) const`, written once on
// Lanes<W> (a compiler's vector of W floats). run_kernel() compiles it for AVX-512 (W = 16), AVX2 + FMA + F16C (W = 8)
// and the build's baseline (W = 4: SSE2, NEON), and calls the widest one that this machine has. Plain function targets,
// not target_clones: clones do not apply to templates, and autovectorised loops convert fp16 one element at a time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <type_traits>

#include "element.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTRES_BASELINE_ONLY)
#define FASTRES_X86_TARGETS 1
#include <immintrin.h>  // declares the conversion builtins used below
#if defined(__linux__)
#define FASTRES_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastres {

template <int W>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * W)));
  typedef int32_t Int __attribute__((vector_size(4 * W)));
  typedef uint16_t Bits16 __attribute__((vector_size(2 * W)));
  typedef int16_t Short __attribute__((vector_size(2 * W)));  // what gcc's builtins take
};
template <>
struct Lanes<1> {  // the tail of a run
  using Float = float;
  using Int = int32_t;
  using Bits16 = uint16_t;
  using Short = int16_t;
};
template <int W>
using Float = typename Lanes<W>::Float;
template <int W>
using Int = typename Lanes<W>::Int;

template <class To, class From>
FASTRES_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class P>
FASTRES_HD V load_bytes(const P* p) {  // any alignment
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int W>
FASTRES_HD Float<W> broadcast(float value) {
  return Float<W>{} + value;
}

// The number at p in every lane, by one load. gcc lowers a vector made of a variable before it inlines a kernel into its
// instruction set: W insertions, in a product's inner loop.
template <int W>
FASTRES_HD Float<W> load_broadcast(const float* p) {
#if FASTRES_X86_TARGETS
  if constexpr (W == 8 || W == 16) {
    Float<W> value;
    asm("vbroadcastss %1, %0" : "=v"(value) : "m"(*p));
    return value;
  }
#endif
  return Float<W>{} + *p;
}

// ---- fp16 by integer arithmetic: the tail of a run, and machines without F16C. Subnormals go through a sum with 0.5
// whose last place is 2^-24, so that they survive torch.set_flush_denormal(True) as they do in hardware.
template <int W>
FASTRES_HD Float<W> float_from_half(Int<W> h) {
  const Int<W> magnitude = h & 0x7fff;
  const Int<W> normal = (magnitude << 13) + (112 << 23);
  const Int<W> special = normal + (112 << 23);  // infinity and NaN: exponent 255
  const Int<W> subnormal = bit_cast<Int<W>>(bit_cast<Float<W>>(magnitude | (126 << 23)) - 0.5f);
  const Int<W> bits = magnitude < 0x0400 ? subnormal : (magnitude < 0x7c00 ? normal : special);
  return bit_cast<Float<W>>(bits | ((h & 0x8000) << 16));
}

template <int W>
FASTRES_HD Int<W> half_from_float(Float<W> value) {
  const Int<W> bits = bit_cast<Int<W>>(value);
  const Int<W> magnitude = bits & 0x7fffffff;
  const Int<W> normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Int<W> subnormal = bit_cast<Int<W>>(bit_cast<Float<W>>(magnitude) + 0.5f) - (126 << 23);
  const Int<W> infinity = Int<W>{} + 0x7c00;
  const Int<W> nan = ((magnitude >> 13) & 0x3ff) | 0x7e00;
  const Int<W> special = magnitude > 0x7f800000 ? nan : infinity;
  const Int<W> finite = magnitude < (113 << 23) ? subnormal : normal;
  return (magnitude < 0x47800000 ? finite : special) | ((bits >> 16) & 0x8000);
}

// ---- Loads widen to fp32, stores round once to T.
template <int W, class T>
FASTRES_HD Float<W> load(const T* p) {
  using Bits16 = typename Lanes<W>::Bits16;
  if constexpr (std::is_same_v<T, float>) {
    return load_bytes<Float<W>>(p);
  } else {
    const auto bits = load_bytes<Bits16>(p);
#if FASTRES_X86_TARGETS  // gcc 12 does not find these two instructions behind __builtin_convertvector
    using Short = typename Lanes<W>::Short;
    if constexpr (std::is_same_v<T, Half> && W == 8) return __builtin_ia32_vcvtph2ps256((Short)bits);
    if constexpr (std::is_same_v<T, Half> && W == 16) {
      return __builtin_ia32_vcvtph2ps512_mask((Short)bits, Float<W>{}, -1, _MM_FROUND_CUR_DIRECTION);
    }
    if constexpr (std::is_same_v<T, BFloat16> && W == 8) {
      return (Float<W>)((Int<W>)__builtin_ia32_pmovzxwd256((Short)bits) << 16);
    }
    if constexpr (std::is_same_v<T, BFloat16> && W == 16) {
      return (Float<W>)((Int<W>)__builtin_ia32_pmovzxwd512_mask((Short)bits, Int<W>{}, -1) << 16);
    }
#endif
    Int<W> wide;
    if constexpr (W == 1) {
      wide = bits;
    } else {
      wide = __builtin_convertvector(bits, Int<W>);
    }
    if constexpr (std::is_same_v<T, BFloat16>) return bit_cast<Float<W>>(wide << 16);
    return float_from_half<W>(wide);
  }
}

template <int W, class T>
FASTRES_HD void store(T* p, Float<W> value) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(p, &value, sizeof value);
  } else {
#if FASTRES_X86_TARGETS
    if constexpr (std::is_same_v<T, Half> && W == 8) {
      const auto bits = __builtin_ia32_vcvtps2ph256(value, _MM_FROUND_TO_NEAREST_INT);
      std::memcpy(p, &bits, sizeof bits);
      return;
    }
    if constexpr (std::is_same_v<T, Half> && W == 16) {
      using Short = typename Lanes<W>::Short;
      const auto bits = __builtin_ia32_vcvtps2ph512_mask(value, _MM_FROUND_TO_NEAREST_INT, Short{}, -1);
      std::memcpy(p, &bits, sizeof bits);
      return;
    }
#endif
    Int<W> wide;
    if constexpr (std::is_same_v<T, BFloat16>) {
      wide = bfloat16_bits(bit_cast<Int<W>>(value));
    } else {
      wide = half_from_float<W>(value);
    }
    typename Lanes<W>::Bits16 bits;
    if constexpr (W == 1) {
      bits = static_cast<uint16_t>(wide);
    } else {
      bits = __builtin_convertvector(wide, typename Lanes<W>::Bits16);
    }
    std::memcpy(p, &bits, sizeof bits);
  }
}

// store, or past the caches (kStream): a plain store first reads the line that it overwrites, and pushes out another.
// A streamed `p` must be aligned to the vector's size, and the kernel must end with end_stream().
template <int W, bool kStream, class T>
FASTRES_HD void put(T* p, Float<W> value) {
#if FASTRES_X86_TARGETS
  if constexpr (kStream && std::is_same_v<T, float> && W == 16) return __builtin_ia32_movntps512(p, value);
  if constexpr (kStream && std::is_same_v<T, float> && W == 8) return __builtin_ia32_movntps256(p, value);
#endif
  store<W>(p, value);
}

FASTRES_HD void end_stream() {
#if FASTRES_X86_TARGETS
  __builtin_ia32_sfence();  // other threads read what was written only after it
#endif
}

template <int W, class T>
FASTRES_HD bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (W * sizeof(T)) == 0;
}

// The value as T holds it.
template <int W, class T>
FASTRES_HD Float<W> rounded_to(Float<W> value) {
  T stored[W];
  store<W>(stored, value);
  return load<W>(stored);
}

// A fixed order: halves are added until one lane is left.
template <int W>
FASTRES_HD float sum_lanes(Float<W> value) {
  float lanes[W];
  std::memcpy(lanes, &value, sizeof lanes);
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// ---- The instruction set of this machine; FASTRES_ISA=avx512, avx2 or baseline asks for a narrower one. AMX is AVX-512
// with AMX's tiles of bf16 and int8, which the system must let this process use.
enum class Isa { kBaseline, kAvx2, kAvx512, kAmx };

#if FASTRES_AMX
inline bool find_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  constexpr long kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
}
#else
inline bool find_amx() { return false; }
#endif

inline Isa runtime_isa() {
#if FASTRES_X86_TARGETS
  static const Isa isa = [] {
    __builtin_cpu_init();
    const char* const name = std::getenv("FASTRES_ISA");
    const std::string asked = name == nullptr ? "" : name;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!avx2 || asked == "baseline") return Isa::kBaseline;
    if (!avx512 || asked == "avx2") return Isa::kAvx2;
    return asked != "avx512" && __builtin_cpu_supports("avx512bf16") && find_amx() ? Isa::kAmx : Isa::kAvx512;
  }();
  return isa;
#else
  return Isa::kBaseline;
#endif
}

// Whether it multiplies pairs of bf16 numbers.
inline bool has_pairs() {
#if FASTRES_X86_TARGETS
  static const bool found = runtime_isa() >= Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

inline const char* isa_name(Isa isa) {
  const char* const names[] = {"baseline", "avx2", "avx512", "amx"};
  return names[static_cast<int>(isa)];
}

// Whether a tensor of so many bytes, and the handful that a pass reads and writes with it, stay in the last-level cache.
// Measured with 32 MiB: 3.2 MB do, 6.4 MB do not.
inline bool is_cached(int64_t bytes) {
  static const int64_t cache = [] {
    int64_t kib = 0;  // sysconf(_SC_LEVEL3_CACHE_SIZE) is wrong by a factor of ten on some AMD machines
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;
    return kib > 0 ? kib << 10 : int64_t{32} << 20;
  }();
  return 8 * bytes <= cache;
}

#if FASTRES_X86_TARGETS
template <class Kernel>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"), noinline)) void run_avx512(
    const Kernel& kernel, int64_t begin, int64_t end) {
  kernel.template run<16>(begin, end);
}
template <class Kernel>
__attribute__((target("avx2,fma,f16c"), noinline)) void run_avx2(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel.template run<8>(begin, end);
}
#endif

template <class Kernel>
void run_kernel(const Kernel& kernel, int64_t begin, int64_t end) {
#if FASTRES_X86_TARGETS
  const Isa isa = runtime_isa();
  if (isa >= Isa::kAvx512) return run_avx512(kernel, begin, end);
  if (isa == Isa::kAvx2) return run_avx2(kernel, begin, end);
#endif
  kernel.template run<4>(begin, end);
}

}  // namespace fastres
