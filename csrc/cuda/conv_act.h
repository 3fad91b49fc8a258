// What one launch of conv_act on tensor cores takes, and the tiles that there are. Plain numbers and pointers: neither
// torch nor CUTLASS, so that the operator and the files of kernels share it.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cuda/runtime.h"

namespace fastres {

// y = act(conv2d(x, weight) + bias [+ residual]), everything channels_last: x [N, H, W, C], weight [K, R, S, C],
// residual and y [N, P, Q, K].
struct ConvShape {
  int64_t n, h, w, c, k, r, s, p, q;
  int64_t stride[2], padding[2], dilation[2];

  int64_t pixels() const { return n * p * q; }

  // A 1x1 convolution that skips no pixel is a matrix product: its pixels are one line, and no tile has to be divided
  // into images and rows.
  bool is_pointwise() const {
    return r == 1 && s == 1 && stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  }
  ConvShape as_line() const {
    if (!is_pointwise()) return *this;
    return {1, 1, pixels(), c, k, 1, 1, 1, pixels(), {1, 1}, {0, 0}, {1, 1}};
  }
};

struct ConvTensors {
  const void* x;
  const void* weight;
  const void* bias;      // [K]; null: 0
  const void* residual;  // null: 0
  void* y;
  float lower, upper;  // the activation: z below or above is cut, NaN passes
};

// "relu", "relu6" and "none" as bounds of z.
inline bool activation_bounds(const std::string& act, float& lower, float& upper) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  lower = act == "none" ? -kInfinity : 0.0f;
  upper = act == "relu6" ? 6.0f : kInfinity;
  return act == "relu" || act == "relu6" || act == "none";
}

// A kernel: one element type, one tile of y.
struct ConvTile {
  std::string name;  // sm90_128x256_cluster2
  Type type;
  int architecture;         // 90: that chip alone; 80: it and every newer one
  int pixels, channels;     // of a tile of y
  int depth;                // channels of x per step
  int cluster;              // blocks that share a tile of the weights
  bool splits_depth;        // blocks share the depth of a tile where there are too few tiles (stream-K)
  int threads;
  int64_t shared_bytes;
  const void* function;

  std::string (*refusal)(const ConvShape&);  // why it cannot take a call; empty: it can
  int64_t (*workspace)(const ConvShape&, int multiprocessors);
  void (*run)(const ConvShape&, const ConvTensors&, void* workspace, const Stream&);

  std::string label() const;  // conv_act<half, sm90_128x256_cluster2>
};

// What every kernel asks of a shape; `size` of an element. Empty: nothing.
std::string conv_refusal(const ConvShape& shape, int64_t size);

// All kernels of this build, in an order that no two calls see change; none where it had no CUTLASS.
const std::vector<ConvTile>& conv_tiles();

// Each file of kernels lists its own.
void list_conv_sm90_128x256(std::vector<ConvTile>& tiles);
void list_conv_sm90_256x128(std::vector<ConvTile>& tiles);
void list_conv_sm90_128x128(std::vector<ConvTile>& tiles);
void list_conv_sm90_128x64(std::vector<ConvTile>& tiles);
void list_conv_sm90_64x128(std::vector<ConvTile>& tiles);
void list_conv_sm90_streamk(std::vector<ConvTile>& tiles);
void list_conv_sm80_128x128(std::vector<ConvTile>& tiles);
void list_conv_sm80_64x64(std::vector<ConvTile>& tiles);

}  // namespace fastres
