// What module.cpp asks of the CUDA half. Includes nothing of CUDA.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace fastres {

struct KernelAttributes {
  std::string name;
  int registers;         // a thread
  int64_t shared_bytes;  // a block
  int64_t local_bytes;   // a thread: spills
  int threads;           // a full block
  int blocks;            // that fit a multiprocessor at once
  int architecture;      // of the code that runs here: 90
};

// Of every kernel, on the current device; empty where there is none.
std::vector<KernelAttributes> kernel_attributes();

// A kernel of conv_act: what its choice follows from. Needs no GPU.
struct ConvKernel {
  std::string name;          // sm90_128x128_pingpong
  std::string element;       // float16
  int architecture;          // 90: that chip alone; 80: it and every newer one
  int pixels, channels;      // of a tile of y
  int depth;                 // channels of x per step
  int cluster;               // blocks that share a tile of the weights
  bool splits_depth;         // blocks share the depth of a tile
  int threads;               // of a block
  int64_t shared_bytes;      // of a block
};

// In the order of the operator's `tile`; none where the build had no CUTLASS.
std::vector<ConvKernel> conv_kernels();

// Why kernel `tile` cannot take a convolution; empty: it can. N, H, W, C, K, R, S, P, Q, then stride, padding and
// dilation, two each. Needs no GPU.
std::string why_not_conv(int tile, const std::array<int64_t, 15>& shape);

int cuda_version();  // of the headers: 13000

}  // namespace fastres
