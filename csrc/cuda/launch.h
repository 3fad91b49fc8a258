// How the CUDA kernels cut a tensor up: heads, vectors and tails of flat arrays, tiles of images, splits of reductions.
// Plain C++ without CUDA or torch: the host plans a launch with it, the device finds its elements with it, and
// tests/emulation/test_cuda_launch.py holds both against an index model on a machine without a GPU.
//
// An image tensor is a matrix of rows, each a line of positions; a channel is `plane` neighboring positions:
//
//                      rows       line      plane
//     channels_last    N*H*W      C         1
//     NCHW             N          C*H*W     H*W
//
// A thread has one place on the line, a vector of 16 bytes, and walks down the rows. So the channels of its elements
// never change: their parameters are read once into registers, and a reduction over a channel needs neither a division
// nor a shuffle until the walk is over. A tile is as wide as `width` vectors and takes `height` rows at a time; tiles
// on one line are blocks apart, and the rows of a tile are shared by `splits` blocks.
//
// A plane of more than a block's width is a tile by itself, cut into `chunks` that count as rows. Shorter ones share a
// tile, and a vector may lie across the border of two of them (14x14 in fp16): that is why a plane has to be at least a
// vector long. Where lines do not divide into vectors, or a tensor is not aligned, everything goes element by element.
#pragma once

#include <cstdint>
#include <numeric>

#include "element.h"

namespace fastres {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of a grid's x axis; y and z end at 65535

FASTRES_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTRES_HD constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTRES_HD constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline bool is_aligned16(uintptr_t address) { return address % kVectorBytes == 0; }

// ---- Flat arrays. The head, up to the first aligned address, and the tail go element by element, in the first block.
struct Flat {
  int64_t head, vectors, tail;

  // Of n elements of `size` bytes from `address` on; 1 lane: no vectors, no head, no tail.
  static Flat of(int64_t n, uintptr_t address, int64_t size, int lanes) {
    if (lanes == 1) return {0, n, 0};
    const int64_t off = static_cast<int64_t>(address % kVectorBytes);
    const int64_t head = smaller(n, off == 0 ? 0 : (kVectorBytes - off) / size);
    const int64_t vectors = (n - head) / lanes;
    return {head, vectors, n - head - vectors * lanes};
  }
  int64_t blocks(int unroll) const { return larger(1, ceil_div(vectors, int64_t{kThreads} * unroll)); }

  // The vector that a thread takes as its u-th; there is none where it is not below `vectors`.
  FASTRES_HD int64_t vector(int64_t block, int thread, int u, int unroll) const {
    return (block * unroll + u) * kThreads + thread;
  }
  FASTRES_HD int64_t offset(int64_t vector, int lanes) const { return head + vector * lanes; }

  // The single element of a thread of the first block; -1: none.
  FASTRES_HD int64_t single(int64_t thread, int lanes) const {
    if (thread < head) return thread;
    return thread < head + tail ? thread + vectors * lanes : -1;
  }
};

// ---- Division of 0 <= n < 2^31 by a number known at launch: a product and a shift, not a loop.
struct FastDivide {
  uint32_t divisor, magic, shift;

  static FastDivide by(int64_t divisor) {
    uint32_t shift = 0;
    while (int64_t{1} << shift < divisor) ++shift;
    const uint64_t power = uint64_t{1} << 32;
    const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
    return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(power * excess / static_cast<uint64_t>(divisor) + 1),
            shift};
  }
  FASTRES_HD uint32_t divide(uint32_t n) const {
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(n) * magic >> 32);
    return (high + n) >> shift;
  }
};

// ---- Images.

// Where both orders are the same memory, the longer line: [N, C, 1, 1] is rows of C, one channel is a single plane.
struct View {
  int64_t images, channels, plane;

  static View of(int64_t batch, int64_t channels, int64_t plane, bool channels_last) {
    if (channels == 1) return {1, 1, batch * plane};
    if (channels_last || plane == 1) return {batch * plane, channels, 1};
    return {batch, channels, plane};
  }
  FASTRES_HD int64_t line() const { return channels * plane; }
  FASTRES_HD int64_t per_channel() const { return images * plane; }

  // Channels that tiles must hold a multiple of, so that each begins at a vector.
  int64_t unit(int lanes) const { return lanes / std::gcd(plane, int64_t{lanes}); }

  // Lanes of a vector, 16 / size where all tensors are aligned and the lines allow it, else 1.
  int lanes(int64_t size, bool aligned) const {
    const int lanes = static_cast<int>(kVectorBytes / size);
    if (!aligned || line() % lanes != 0) return 1;
    if (plane == 1) return lanes;
    if (plane < lanes) return 1;
    return plane % lanes == 0 || unit(lanes) * plane <= int64_t{kThreads} * lanes ? lanes : 1;
  }
};

// Where a thread is.
struct Place {
  int64_t tile, split;
  int x, y;  // in the tile; y >= height: has no work
};

// The channels of a thread's lanes: at most two neighbors, or (plane 1) one each.
struct Channels {
  int64_t first;
  int64_t left;  // lanes of the first one
  bool each;

  FASTRES_HD int64_t of(int lane) const { return each ? first + lane : first + (lane >= left ? 1 : 0); }
};

struct Tiling {
  int64_t rows;        // images, times chunks
  int64_t row_stride;  // elements from one image to the next
  int64_t span;        // positions from one tile to the next
  int64_t line, plane, channels;
  int64_t row_tiles;  // groups of height * unroll rows
  int64_t tiles, splits;
  int64_t tile_vectors;  // of a whole tile, all its chunks
  int width, height, unroll, lanes;
  FastDivide chunks;

  // `widest`: vectors that a tile of channels_last may have. `wanted`: blocks that the launch would like.
  static Tiling of(const View& view, int lanes, int unroll, int64_t widest, int64_t wanted) {
    Tiling t{};
    t.row_stride = t.line = view.line();
    t.plane = view.plane;
    t.channels = view.channels;
    t.lanes = lanes;
    t.unroll = unroll;
    int64_t width = 0, chunks = 1;
    if (view.plane == 1) {
      const int64_t vectors = view.channels / lanes;
      t.tiles = ceil_div(vectors, widest);
      width = ceil_div(vectors, t.tiles);
      t.tile_vectors = width;
      t.span = width * lanes;
    } else if (view.plane % lanes == 0 && view.plane / lanes > kThreads) {
      t.tile_vectors = view.plane / lanes;
      chunks = ceil_div(t.tile_vectors, kThreads);
      width = ceil_div(t.tile_vectors, chunks);
      t.tiles = view.channels;
      t.span = view.plane;
    } else {
      const int64_t unit = view.unit(lanes);
      const int64_t most = int64_t{kThreads} * lanes / view.plane / unit * unit;
      t.tiles = ceil_div(view.channels, most);
      const int64_t together = smaller(view.channels, ceil_div(ceil_div(view.channels, t.tiles), unit) * unit);
      t.tiles = ceil_div(view.channels, together);
      t.span = together * view.plane;
      width = t.tile_vectors = t.span / lanes;
    }
    t.width = static_cast<int>(width);
    t.height = static_cast<int>(larger(1, kThreads / width));
    t.chunks = FastDivide::by(chunks);
    t.rows = view.images * chunks;
    t.row_tiles = ceil_div(t.rows, int64_t{t.height} * unroll);
    t.splits = split(wanted, t.tiles, t.row_tiles);
    return t;
  }

  // Blocks that share a tile's rows. Where one wave would leave part of the GPU idle, several: the last one's idle part
  // is a smaller share of the work.
  static int64_t split(int64_t wanted, int64_t tiles, int64_t most) {
    int64_t splits = wanted / tiles;
    if (10 * splits * tiles < 8 * wanted) splits = ceil_div(4 * wanted, tiles);
    return larger(1, smaller(splits, most));
  }

  int64_t blocks() const { return tiles * splits; }
  int threads() const { return static_cast<int>(ceil_div(int64_t{width} * height, 32) * 32); }

  FASTRES_HD Place place(int64_t block, int thread) const {
    return {block % tiles, block / tiles, thread % width, thread / width};
  }

  // The row that a thread takes as the u-th of a row tile; there is none where it is not below `rows`.
  FASTRES_HD int64_t row(const Place& p, int64_t row_tile, int u) const {
    return (row_tile * unroll + u) * height + p.y;
  }

  // The element where a thread's vector of that row begins; -1: none.
  FASTRES_HD int64_t offset(const Place& p, int64_t row) const {
    int64_t image = row, vector = p.x;
    if (chunks.divisor > 1) {
      image = chunks.divide(static_cast<uint32_t>(row));
      vector += (row - image * chunks.divisor) * width;
    }
    const int64_t position = p.tile * span + vector * lanes;
    if (p.y >= height || row >= rows || vector >= tile_vectors || position >= line) return -1;
    return image * row_stride + position;
  }

  // The same for the U rows of a row tile at once: one multiplication where there are no chunks.
  template <int U>
  FASTRES_HD void offsets(const Place& p, int64_t row_tile, int64_t (&found)[U]) const {
    const int64_t first = row(p, row_tile, 0);
    if (chunks.divisor > 1) {
      for (int u = 0; u < U; ++u) found[u] = offset(p, row(p, row_tile, u));
      return;
    }
    const int64_t position = p.tile * span + static_cast<int64_t>(p.x) * lanes;
    const int64_t base = first * row_stride + position, step = height * row_stride;
    const int64_t left = has_work(p) ? rows - first : 0;
    for (int u = 0; u < U; ++u) found[u] = static_cast<int64_t>(u) * height < left ? base + u * step : -1;
  }

  FASTRES_HD Channels channels_of(const Place& p) const {
    const int64_t position = p.tile * span + static_cast<int64_t>(p.x) * lanes;
    if (plane == 1) return {position, lanes, true};
    const int64_t first = position / plane;
    return {first, (first + 1) * plane - position, false};
  }
  // Whether the thread ever has elements; its channels are only then below C.
  FASTRES_HD bool has_work(const Place& p) const {
    return p.y < height && p.tile * span + static_cast<int64_t>(p.x) * lanes < line;
  }
};

}  // namespace fastres
