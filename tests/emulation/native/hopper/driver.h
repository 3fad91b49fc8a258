// The functions of CUDA's driver and runtime that CUTLASS's host code names, defined: include once.
#pragma once

#include "hopper/host.h"

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                           const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                           CUtensorMapFloatOOBfill fill) {
  hopper::Descriptor d{0, type, rank, reinterpret_cast<int64_t>(address)};
  for (unsigned i = 0; i < rank; ++i) d.dims[i] = static_cast<int64_t>(dims[i]);
  for (unsigned i = 0; i + 1 < rank; ++i) d.strides[i] = static_cast<int64_t>(strides[i]);
  for (unsigned i = 0; i < rank; ++i) d.box[i] = box[i], d.element_strides[i] = element_strides[i];
  return hopper::encode(map, d, interleave, swizzle, promotion, fill);
}

extern "C" CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                            const cuuint64_t* dims, const cuuint64_t* strides, const int* lower,
                                            const int* upper, cuuint32_t channels, cuuint32_t pixels,
                                            const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                            CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                            CUtensorMapFloatOOBfill fill) {
  hopper::Descriptor d{1, type, rank, reinterpret_cast<int64_t>(address)};
  for (unsigned i = 0; i < rank; ++i) d.dims[i] = static_cast<int64_t>(dims[i]);
  for (unsigned i = 0; i < rank; ++i) d.element_strides[i] = element_strides[i];
  for (unsigned i = 0; i + 1 < rank; ++i) d.strides[i] = static_cast<int64_t>(strides[i]);
  for (unsigned i = 0; i + 2 < rank; ++i) d.lower[i] = lower[i], d.upper[i] = upper[i];
  d.box[0] = channels;
  d.box[1] = pixels;
  return hopper::encode(map, d, interleave, swizzle, promotion, fill);
}

// Of initialize_workspace() and of a number of multiprocessors that nobody has given: neither is called.
extern "C" cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaErrorNoDevice; }
extern "C" cudaError_t cudaGetLastError() { return cudaErrorNoDevice; }
extern "C" cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorNoDevice; }
extern "C" cudaError_t cudaGetDevice(int*) { return cudaErrorNoDevice; }
