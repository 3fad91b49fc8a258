// What csrc/cuda/conv_sm80.cuh needs of a chip, on a machine without one: the toolkit's own types, the threads of a block
// as fibers, and in C++ the instructions that CUTLASS writes as PTX: ld/st.global, cp.async, ldmatrix, mma.sync. The
// headers of cutlass/ beside this file stand in place of the few of CUTLASS's that hold them; everything else that a kernel
// consists of, CUTLASS's and ours, is compiled as it is shipped.
//
// Stricter than a chip: an access of global memory must be aligned and lie in a tensor of the call, shared memory holds
// NaN at first, and a copy by cp.async is done no earlier than the thread waits for it. Unlike a chip: a tensor core adds
// up its products in fp32 one after the other, where a chip's order and rounding are its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <string>

#include "../emulator/fibers.h"

// What nvcc says of itself, and CUTLASS chooses some of its code by.
#define __CUDACC_VER_MAJOR__ (CUDART_VERSION / 1000)
#define __CUDACC_VER_MINOR__ (CUDART_VERSION % 1000 / 10)

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define cudaFuncSetAttribute emulated_attribute  // the toolkit's lead into its runtime
#define cudaLaunchKernelEx emulated_launch
#define cudaOccupancyMaxActiveClusters emulated_occupancy

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange(value)[lane];
}

namespace emulator {

// ---- Global memory. The first fault of a launch is its message.

struct Range {
  uintptr_t begin, end;
  bool writable;
};
inline std::vector<Range> tensors;
inline std::string fault;

inline bool accessible(const void* p, int bytes, bool write) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const char* what = write ? "a store" : "a load";
  if (address % bytes != 0) {
    if (fault.empty()) fault = what + std::string(" of ") + std::to_string(bytes) + " bytes is not aligned";
    return false;
  }
  for (const Range& t : tensors) {
    if (address >= t.begin && address + bytes <= t.end && (t.writable || !write)) return true;
  }
  if (fault.empty()) {
    fault = what + std::string(" of ") + std::to_string(bytes) + " bytes is outside of the tensors, by thread " +
            std::to_string(current) + " of block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y);
  }
  return false;
}
template <int kBytes>
void load(void* to, const void* from, bool wanted) {
  if (wanted && accessible(from, kBytes, false)) std::memcpy(to, from, kBytes);
}
template <int kBytes>
void store(void* to, const void* from, bool wanted) {
  if (wanted && accessible(to, kBytes, true)) std::memcpy(to, from, kBytes);
}

// ---- cp.async. The groups of each thread that are still to be copied; the last one is open. A chip may copy at any time
// from the instruction to the wait for it: here that is as late as it can be, or (at_once) as early.

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool zeros;
};
inline std::deque<std::vector<Copy>> groups[kThreads];
inline bool at_once = false;

inline void perform(const Copy& copy) {
  if (copy.zeros) {
    std::memset(copy.to, 0, copy.bytes);
  } else if (accessible(copy.from, copy.bytes, false)) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}
inline void copy_async(const Copy& copy) {
  if (at_once) return perform(copy);
  std::deque<std::vector<Copy>>& mine = groups[current];
  if (mine.empty()) mine.emplace_back();
  mine.back().push_back(copy);
}
inline void commit_group() { groups[current].emplace_back(); }
inline void wait_group(size_t left) {  // until only the last `left` of them are on their way
  for (std::deque<std::vector<Copy>>& mine = groups[current]; mine.size() > left; mine.pop_front()) {
    for (const Copy& copy : mine.front()) perform(copy);
  }
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements, or 8x4 of 32-bit ones. Lane 8 i + j has the address of row j of the i-th;
// every lane gets four bytes of each, two elements of row lane / 4.
template <int kMatrices>
void load_matrices(unsigned* to, const void* row) {
  const void* const* rows = exchange(row);
  for (int i = 0; i < kMatrices; ++i) {
    std::memcpy(to + i, static_cast<const unsigned*>(rows[8 * i + lane() / 4]) + lane() % 4, sizeof *to);
  }
}

// ---- mma.sync.m16n8k(32 bytes): d = a b + c, a of 16 rows, b of 8 columns, fp32 sums.

struct Half {
  static constexpr int kPerWord = 2;
  static void widen(uint32_t word, float* two) {
    for (int i = 0; i < 2; ++i) {
      const uint32_t bits = word >> 16 * i, magnitude = (bits & 0x7fff) << 13;
      const bool finite = (bits & 0x7c00) != 0x7c00;
      std::memcpy(two + i, &magnitude, sizeof(float));
      two[i] *= finite ? 0x1p112f : 1.f;  // the exponents' difference: also right for subnormals
      uint32_t wide;
      std::memcpy(&wide, two + i, sizeof wide);
      wide |= (finite ? 0 : 0x7f800000) | (bits & 0x8000) << 16;
      std::memcpy(two + i, &wide, sizeof wide);
    }
  }
};
struct BFloat16 {
  static constexpr int kPerWord = 2;
  static void widen(uint32_t word, float* two) {
    const uint32_t wide[] = {word << 16, word & 0xffff0000};
    std::memcpy(two, wide, sizeof wide);
  }
};
struct TFloat32 {
  static constexpr int kPerWord = 1;
  static void widen(uint32_t word, float* one) {
    word &= 0xffffe000;  // a tensor core does not see the last 13 bits
    std::memcpy(one, &word, sizeof word);
  }
};

// Words of a lane: a has row lane / 4 at depth lane % 4, the same of row + 8, then both 4 words deeper; b has column
// lane / 4, at depth lane % 4 and 4 words deeper; c and d have columns 2 (lane % 4) and the next, of both rows.
template <class Element>
void multiply(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  constexpr int kPer = Element::kPerWord;
  struct Offer {
    float rows[2][2 * kPer], column[2 * kPer];
  } mine;
  for (int deeper = 0; deeper < 2; ++deeper) {
    for (int row = 0; row < 2; ++row) Element::widen(a[2 * deeper + row], mine.rows[row] + deeper * kPer);
    Element::widen(b[deeper], mine.column + deeper * kPer);
  }
  const Offer* all = exchange(mine);
  float sums[2][2] = {{c[0], c[1]}, {c[2], c[3]}};
  for (int deeper = 0; deeper < 2; ++deeper) {
    for (int word = 0; word < 4; ++word) {
      const Offer& from = all[lane() / 4 * 4 + word];  // the rows of this lane
      for (int i = deeper * kPer; i < (deeper + 1) * kPer; ++i) {
        for (int column = 0; column < 2; ++column) {
          const float factor = all[(2 * (lane() % 4) + column) * 4 + word].column[i];
          for (int row = 0; row < 2; ++row) sums[row][column] += from.rows[row][i] * factor;
        }
      }
    }
  }
  std::memcpy(d, sums, sizeof sums);
}

// ---- Launches. A kernel may have the shared memory that was asked for, beyond 48 KB; a store after its end is a fault.

constexpr int64_t kMostShared = 163 << 10, kBeyond = 1024;
inline std::map<const void*, int64_t> shared_limits;

}  // namespace emulator

namespace fastres {
extern char shared[emulator::kMostShared + emulator::kBeyond];
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute name, int64_t value) {
  if (name != cudaFuncAttributeMaxDynamicSharedMemorySize || value > emulator::kMostShared) return cudaErrorInvalidValue;
  emulator::shared_limits[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int*, Kernel, const cudaLaunchConfig_t*) {
  return cudaErrorInvalidValue;  // no kernel here has clusters
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  using namespace emulator;
  const int64_t bytes = static_cast<int64_t>(config->dynamicSmemBytes);
  const auto known = shared_limits.find(reinterpret_cast<const void*>(kernel));
  if (bytes > (known == shared_limits.end() ? 48 << 10 : known->second) || config->numAttrs != 0) {
    return cudaErrorInvalidValue;
  }
  const auto check = [=] {
    for (int64_t i = 0; i < kBeyond && fault.empty(); ++i) {
      if (fastres::shared[bytes + i] != '\xff') fault = "a store beyond the shared memory of a block";
    }
  };
  std::memset(fastres::shared, 0xff, bytes + kBeyond);
  const bool run = run_grid(config->gridDim, config->blockDim, [=] { kernel(arguments...); }, [=] {
    check();
    std::memset(fastres::shared, 0xff, bytes + kBeyond);
    for (std::deque<std::vector<Copy>>& left : groups) left.clear();
  });
  check();
  return run ? cudaSuccess : cudaErrorInvalidValue;
}
