// CUDA's runtime on a machine without one, as far as fastres' kernels use it: what tests/native/emulated.cpp compiles
// csrc/cuda/*.cu against, with an ordinary C++ compiler. Blocks run one after the other; the threads of a block are fibers
// that give way at barriers and shuffles, in ascending or (emulator::backwards) descending order: what depends on the
// order between two barriers gives different results in the two.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};
inline dim3 threadIdx, blockIdx, blockDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
typedef void* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

namespace emulator {

constexpr size_t kStack = 64 << 10;
inline bool backwards = false;
inline int launches = 0;

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it gave way: a jump there asks the system for nothing, unlike swapcontext
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false, done = false;
};
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline Barrier block;
inline std::vector<Barrier> warps;
inline std::vector<float> lanes;  // what the lanes of each warp offer in a shuffle
inline int current = 0, live = 0;

__attribute__((noinline)) inline void give_way() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, int all) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived >= all) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (generation == barrier.generation) give_way();
  }
}

inline void enter() {
  for (;;) {  // a block after the other
    body();
    fibers[current].done = true;
    --live;
    if (block.arrived > 0 && block.arrived >= live) {  // those that have left no longer count
      block.arrived = 0;
      ++block.generation;
    }
    give_way();
  }
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

inline void run_block(int threads) {
  if (fibers.empty()) fibers = std::vector<Fiber>(1024);  // they never move
  warps.assign(threads / 32, {});
  lanes.assign(threads, 0);
  block = {};
  live = threads;
  for (int i = 0; i < threads; ++i) fibers[i].done = false;
  while (live > 0) {
    for (int i = 0; i < threads; ++i) {
      current = backwards ? threads - 1 - i : i;
      if (fibers[current].done) continue;
      threadIdx.x = current;
      resume(fibers[current]);
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block, emulator::live); }

inline float __shfl_down_sync(unsigned, float value, int step) {
  const int thread = emulator::current, warp = thread / 32;
  emulator::lanes[thread] = value;
  emulator::wait(emulator::warps[warp], 32);
  if (thread % 32 + step < 32) value = emulator::lanes[thread + step];
  emulator::wait(emulator::warps[warp], 32);
  return value;
}

inline float __frcp_rn(float value) { return 1 / value; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  if (config->blockDim.x == 0 || config->blockDim.x > 1024 || config->blockDim.x % 32 || config->gridDim.x == 0) {
    return cudaErrorInvalidValue;
  }
  ++emulator::launches;
  blockDim = config->blockDim;
  emulator::body = [=] { kernel(arguments...); };
  for (unsigned i = 0; i < config->gridDim.x; ++i) {
    blockIdx.x = i;
    emulator::run_block(static_cast<int>(config->blockDim.x));
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

// The number of a device is its number of multiprocessors.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = device;
  return cudaSuccess;
}
