// What Winograd's forward pass and its gradient of the weight share: their tiles, and the transform of their images.
#pragma once

#include <cstdint>

#include "cpu/conv.h"
#include "cpu/winograd_transforms.h"

namespace fastres {

struct WinogradShape {
  int64_t batch, height, width, channels, outputs, pad_h, pad_w, rows, columns;  // rows, columns: of tiles

  int64_t tiles() const { return batch * rows * columns; }
  FASTRES_HD int64_t out_height() const { return height + 2 * pad_h - 2; }
  FASTRES_HD int64_t out_width() const { return width + 2 * pad_w - 2; }
};

struct TilePlace {  // of a tile
  int64_t image, row, column;

  FASTRES_HD TilePlace(const WinogradShape& s, int64_t tile) {
    image = tile / (s.rows * s.columns);
    const int64_t rest = tile - image * s.rows * s.columns;
    row = rest / s.columns;
    column = rest - row * s.columns;
  }
};

struct Padding {
  int64_t h, w;
};

inline WinogradShape winograd_shape(const Tensor& x, int64_t outputs, Padding pad, int64_t tile) {
  WinogradShape shape{x.size(0), x.size(2), x.size(3), x.size(1), outputs, pad.h, pad.w, 0, 0};
  shape.rows = (shape.out_height() + tile - 1) / tile;
  shape.columns = (shape.out_width() + tile - 1) / tile;
  return shape;
}

inline void check_geometry(const Tensor& x, Padding pad) {
  check_images(x);
  STD_TORCH_CHECK(pad.h >= 0 && pad.h <= 2 && pad.w >= 0 && pad.w <= 2, "padding: got ", pad.h, ", ", pad.w,
                  ", expected 0, 1 or 2");
  STD_TORCH_CHECK(x.size(2) + 2 * pad.h > 2 && x.size(3) + 2 * pad.w > 2, "x: got images of ", x.size(2), "x", x.size(3),
                  ", too small for a 3x3 kernel");
}

// A place in memory for each tap, tile and channel.
struct Layout {
  int64_t tap, tile, group;  // strides
  int shift;                 // 1 << shift channels, a multiple of W, are a group of neighbors

  FASTRES_HD int64_t at(int64_t t, int64_t c) const {
    return t * tile + (c >> shift) * group + (c & ((int64_t{1} << shift) - 1));
  }
};

// Tiles [begin, end) of x to V; its groups of channels are whole, the last with zeros.
template <class T, int M>
struct TransformInput {
  WinogradShape shape;
  const T* x;
  float* v;
  int64_t first;
  Layout to;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t tile = begin; tile < end; ++tile) {
      const TilePlace at(shape, tile);
      const int64_t y = at.row * M - shape.pad_h, x0 = at.column * M - shape.pad_w;
      const T* from = x + ((at.image * shape.height + y) * shape.width + x0) * shape.channels;
      const int64_t t = tile - first;
      // rows and columns of the tile that are in the image
      const int top = y < 0 ? -y : 0, left = x0 < 0 ? -x0 : 0;
      const int bottom = shape.height - y < kEdge<M> ? shape.height - y : kEdge<M>;
      const int right = shape.width - x0 < kEdge<M> ? shape.width - x0 : kEdge<M>;
      const bool whole = top == 0 && left == 0 && bottom == kEdge<M> && right == kEdge<M>;
      int64_t c = 0;
      if (whole) {
        for (; c + W <= shape.channels; c += W) at_channel<W, true>(from + c, v + to.at(t, c), 0, 0, 0, 0);
      } else {
        for (; c + W <= shape.channels; c += W) at_channel<W, false>(from + c, v + to.at(t, c), top, bottom, left, right);
      }
      for (; c < shape.channels; ++c) at_channel<1, false>(from + c, v + to.at(t, c), top, bottom, left, right);
      for (; c & ((1 << to.shift) - 1); ++c) {  // the last group's rest
        for (int tap = 0; tap < kTaps<M>; ++tap) v[to.at(t, c) + tap * to.tap] = 0.0f;
      }
    }
  }

  template <int W, bool kWhole>
  FASTRES_HD void at_channel(const T* from, float* out, int top, int bottom, int left, int right) const {
    const int64_t row = shape.width * shape.channels;
    Float<W> half[kEdge<M>][kEdge<M>];
#pragma GCC unroll 6
    for (int j = 0; j < kEdge<M>; ++j) {
      Float<W> d[kEdge<M>], o[kEdge<M>];
      const bool column = kWhole || (j >= left && j < right);
#pragma GCC unroll 6
      for (int i = 0; i < kEdge<M>; ++i) {
        d[i] = kWhole || (column && i >= top && i < bottom) ? load<W>(from + i * row + j * shape.channels) : Float<W>{};
      }
      Transform<M>::input(d, o);
#pragma GCC unroll 6
      for (int i = 0; i < kEdge<M>; ++i) half[i][j] = o[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kEdge<M>; ++i) {
      Float<W> o[kEdge<M>];
      Transform<M>::input(half[i], o);
#pragma GCC unroll 6
      for (int j = 0; j < kEdge<M>; ++j) store<W>(out + (i * kEdge<M> + j) * to.tap, o[j]);
    }
  }
};

}  // namespace fastres
