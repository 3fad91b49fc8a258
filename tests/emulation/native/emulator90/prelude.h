// What nvcc knows without being told, for a C++ compiler that compiles kernels for sm_90a: included before everything
// else. CUDA's own headers come first, as the host sees them.
#pragma once

#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>

#undef __launch_bounds__
#define __launch_bounds__(...)
#define EMULATED_ARCH 900
#define __CUDA_ARCH_FEAT_SM90_ALL
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
#define CUTE_ARCH_LDSM_SM75_ACTIVATED 1

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

// An operand of inline PTX: where what is written goes (null: it is only read), and its bits.
struct Operand {
  void* to;
  uint64_t bits;
  char kind;  // of register, as in the constraint: r, l, f, h, n

  int32_t number() const { return static_cast<int32_t>(bits); }
};

constexpr size_t size_of(char kind) { return kind == 'l' || kind == 'd' ? 8 : kind == 'h' ? 2 : 4; }

template <char kKind, class T>
uint64_t bits_of(const T& value) {
  uint64_t bits = 0;
  if constexpr (std::is_enum_v<T> || std::is_same_v<T, bool>) {
    bits = static_cast<uint64_t>(value);
  } else {
    static_assert(kKind == 'n' || sizeof(T) <= size_of(kKind), "an operand wider than its register");
    std::memcpy(&bits, &value, sizeof value);
  }
  return bits;
}
template <char kKind, class T>
Operand in(const T& value) {
  return {nullptr, bits_of<kKind>(value), kKind};
}
template <char kKind, class T>
Operand out(T& value) {
  static_assert(sizeof(T) == size_of(kKind));
  return {&value, 0, kKind};
}
template <char kKind, class T>
Operand inout(T& value) {
  static_assert(sizeof(T) == size_of(kKind));
  return {&value, bits_of<kKind>(value), kKind};
}

// For the test: before a call, which forgets counts and tensor maps of earlier ones; and how often something ran since.
void start(uint64_t seed);
inline bool planning = false;  // launches are counted and not run
int64_t counted(const char* what);

void ptx(const char* text, std::initializer_list<Operand> operands);

char* shared_memory();  // of the block
uint32_t shared_address(const void* pointer);
[[noreturn]] void fail(const char* what);

uint32_t shuffle(uint32_t value, int from);
void sync_warp();
void sync_block();
void add(float* to, float value);  // in one piece
cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned, T value, int lane, int = 32) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulator::shuffle(bits, lane % 32);
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void __syncwarp(unsigned = ~0u) { emulator::sync_warp(); }
inline void __syncthreads() { emulator::sync_block(); }
inline size_t __cvta_generic_to_shared(const void* pointer) { return emulator::shared_address(pointer); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulator::sync_warp(); }
[[noreturn]] inline void __trap() { emulator::fail("__trap"); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int = 32) {
  return __shfl_sync(mask, value, (threadIdx.x % 32) ^ lanes);
}
inline void atomicAdd(float* to, float value) { emulator::add(to, value); }

template <class Parameter>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameter), const Parameter& argument) {
  return emulator::launch(*config, [=] { kernel(argument); });
}
