// What nvcc knows and a C++ compiler does not: with this header in front, the latter compiles csrc/cuda/conv_sm90.cuh
// and CUTLASS behind it. Functions of the device become plain ones; the headers beside this one, which shadow CUTLASS's
// of the same names, are the instructions: they note what they are given, and nothing waits.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#define __launch_bounds__(...)
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline void __syncthreads() {}
inline void __syncwarp() {}

// Named in templates of CUTLASS that nothing here uses.
inline unsigned __byte_perm(unsigned, unsigned, unsigned) { std::abort(); }
inline int __dp4a(int, int, int) { std::abort(); }
inline __half2 __hfma2(__half2, __half2, __half2) { std::abort(); }
namespace cutlass::arch {
inline int SmId() { std::abort(); }
}  // namespace cutlass::arch

#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL 1
#include <cutlass/arch/wmma.h>  // before the compiler has a version: empty, it would need nvcc
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

namespace hopper {

// The arguments of cuTensorMapEncodeTiled or cuTensorMapEncodeIm2col, all of them.
struct Descriptor {
  int64_t im2col, type, rank, address;
  int64_t dims[5], strides[4];  // in elements; in bytes, of dims[1] and up
  int64_t box[5];               // im2col: channels, pixels
  int64_t element_strides[5];
  int64_t lower[3], upper[3];  // im2col: the corners of the bounding box, innermost first
  int64_t interleave, swizzle, promotion, fill;
};
inline std::vector<Descriptor> descriptors;

inline CUresult encode(CUtensorMap* map, Descriptor d, int interleave, int swizzle, int promotion, int fill) {
  d.interleave = interleave;
  d.swizzle = swizzle;
  d.promotion = promotion;
  d.fill = fill;
  map->opaque[0] = descriptors.size();  // copies of the map keep it
  descriptors.push_back(d);
  return CUDA_SUCCESS;
}

// One copy instruction.
struct Copy {
  int64_t descriptor, shared, barrier;  // the places in shared memory, in bytes from its start
  int64_t coordinates[5], offsets[2];
  int64_t multicast;  // a bit for each block of the cluster that gets it; 0: the block's own
};
inline std::vector<Copy> copies;

struct Place {
  dim3 block_in_cluster{0, 0, 0};
  const char* shared = nullptr;
};
inline Place place;

inline int64_t index_of(const void* descriptor) { return static_cast<const int64_t*>(descriptor)[0]; }
inline int64_t offset_of(const void* p) { return static_cast<const char*>(p) - place.shared; }

}  // namespace hopper
