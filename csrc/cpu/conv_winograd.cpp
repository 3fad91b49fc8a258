// 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3) and F(4x4, 3x3) (Winograd 1980; Lavin and Gray 2016): 2.25 and 4
// times fewer products than the direct sum. docs/winograd.md has the derivation, the points and the figures.
//
//   y = A' [ (G g G') . (B' d B) ] A       d: a tile of x, (m+2)^2; g: the weight, 3x3; y: m x m outputs
//
// Channels sum inside the brackets, so each of the (m+2)^2 taps is a product of matrices: V [tiles, C] times U [C, K]. A
// block of tiles is transformed into V, which stays in L2; for each panel of output channels the products go to M, also
// in L2, and from there with bias, residual and activation to y: x and y cross memory once. Points 0, +-1, inf for m = 2;
// 0, +-sqrt(1/2), +-sqrt(2), inf for m = 4, whose error is 1.2 to 1.4 times a direct sum's.
//
// Threads take tiles; where there are too few, each takes some of the output channels and the transform is shared. An
// element is computed alike in every case. It stops being good at few channels (the transforms cost a share of 1 / C and
// 1 / K), and at batch 1 with many (U is (m+2)^2 / 9 times the weight, and is read once a call).
#include <algorithm>
#include <cstdint>
#include <string>

#include "cpu/conv.h"
#include "cpu/winograd_transforms.h"

namespace fastres {
namespace {

struct Shape {
  int64_t batch, height, width, channels, outputs, pad_h, pad_w, rows, columns;  // rows, columns: of tiles

  int64_t tiles() const { return batch * rows * columns; }
  FASTRES_HD int64_t out_height() const { return height + 2 * pad_h - 2; }
  FASTRES_HD int64_t out_width() const { return width + 2 * pad_w - 2; }
};

struct Place {  // of a tile
  int64_t image, row, column;

  FASTRES_HD Place(const Shape& s, int64_t tile) {
    image = tile / (s.rows * s.columns);
    const int64_t rest = tile - image * s.rows * s.columns;
    row = rest / s.columns;
    column = rest - row * s.columns;
  }
};

// Tiles [begin, end) of x to rows of V: v[tap, tile - first, channel].
template <class T, int M>
struct TransformInput {
  Shape shape;
  const T* x;
  float* v;
  int64_t first, v_stride, tap_stride;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t tile = begin; tile < end; ++tile) {
      const Place at(shape, tile);
      const int64_t y = at.row * M - shape.pad_h, x0 = at.column * M - shape.pad_w;
      const T* from = x + ((at.image * shape.height + y) * shape.width + x0) * shape.channels;
      float* to = v + (tile - first) * v_stride;
      // rows and columns of the tile that are in the image
      const int top = y < 0 ? -y : 0, left = x0 < 0 ? -x0 : 0;
      const int bottom = shape.height - y < kEdge<M> ? shape.height - y : kEdge<M>;
      const int right = shape.width - x0 < kEdge<M> ? shape.width - x0 : kEdge<M>;
      const bool whole = top == 0 && left == 0 && bottom == kEdge<M> && right == kEdge<M>;
      int64_t c = 0;
      if (whole) {
        for (; c + W <= shape.channels; c += W) at_channel<W, true>(from + c, to + c, 0, 0, 0, 0);
      } else {
        for (; c + W <= shape.channels; c += W) at_channel<W, false>(from + c, to + c, top, bottom, left, right);
      }
      for (; c < shape.channels; ++c) at_channel<1, false>(from + c, to + c, top, bottom, left, right);
    }
  }

  template <int W, bool kWhole>
  FASTRES_HD void at_channel(const T* from, float* to, int top, int bottom, int left, int right) const {
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
      for (int j = 0; j < kEdge<M>; ++j) store<W>(to + (i * kEdge<M> + j) * tap_stride, o[j]);
    }
  }
};

// Tiles [begin, end) of M, one panel of channels from k on, to y: m[tap, tile - first, 2 W].
template <class T, int M>
struct TransformOutput {
  Shape shape;
  const float* m;
  Epilogue<T> epilogue;
  int64_t first, tap_stride, k;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const int64_t height = shape.out_height(), width = shape.out_width();
    for (int64_t tile = begin; tile < end; ++tile) {
      const Place at(shape, tile);
      const int64_t y = at.row * M, x = at.column * M;
      const int64_t to = ((at.image * height + y) * width + x) * shape.outputs;
      const float* from = m + (tile - first) * kPanel<W>;
      const int bottom = height - y < M ? height - y : M, right = width - x < M ? width - x : M;
      const int64_t last = shape.outputs - k < kPanel<W> ? shape.outputs - k : kPanel<W>;
      int64_t j = 0;
      for (; j + W <= last; j += W) at_channel<W>(from + j, to + k + j, k + j, bottom, right);
      for (; j < last; ++j) at_channel<1>(from + j, to + k + j, k + j, bottom, right);
    }
  }

  template <int W>
  FASTRES_HD void at_channel(const float* from, int64_t to, int64_t channel, int bottom, int right) const {
    Float<W> half[M][kEdge<M>];
#pragma GCC unroll 6
    for (int j = 0; j < kEdge<M>; ++j) {
      Float<W> q[kEdge<M>], o[M];
#pragma GCC unroll 6
      for (int i = 0; i < kEdge<M>; ++i) q[i] = load<W>(from + (i * kEdge<M> + j) * tap_stride);
      Transform<M>::output(q, o);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) half[i][j] = o[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      if (i >= bottom) break;
      Float<W> o[M];
      Transform<M>::output(half[i], o);
#pragma GCC unroll 6
      for (int j = 0; j < M; ++j) {
        if (j >= right) break;
        epilogue.template put<W>(o[j], to + (i * shape.out_width() + j) * shape.outputs, channel);
      }
    }
  }
};

constexpr int64_t kStreamedBytes = 4 << 20;  // of U: more does not stay in L2 and is fetched ahead

// Panels [begin, end) of output channels, for the tiles of a block: products, then their way to y.
template <class T, int M>
struct Panels {
  Shape shape;
  const float* v;  // [taps, tiles, channels], with strides
  const float* u;  // [panels, taps, channels, 2 W]
  float* m;        // [taps, tiles, 2 W], with a stride
  Epilogue<T> epilogue;
  int64_t first, count, v_stride, v_tap_stride, m_tap_stride;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const int64_t size = shape.channels * kPanel<W>, whole = shape.outputs * shape.channels * kTaps<M> * 4;
    const int64_t next = whole > kStreamedBytes ? size : 0;
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int tap = 0; tap < kTaps<M>; ++tap) {
        const float* weights = u + (panel * kTaps<M> + tap) * size;
        product<W>({v + tap * v_tap_stride, v_stride, weights, shape.channels, next}, count, ToMemory{m + tap * m_tap_stride});
      }
      const TransformOutput<T, M> output{shape, m, epilogue, first, m_tap_stride, panel * kPanel<W>};
      call<W>(output, first, first + count);
    }
  }
};

constexpr int64_t kBlockBytes = 1 << 20;  // of V: about half of an L2 cache; M and a panel's tap of U take the rest
constexpr int64_t kFewestTiles = 28;      // of a block: fewer, and U is read again too often

template <class T, int M>
void run_winograd(const Shape& shape, const T* x, const float* u, const Epilogue<T>& epilogue, const Tensor& like) {
  const int64_t tiles = shape.tiles(), width = panel_width(), panels = (shape.outputs + width - 1) / width;
  const int64_t v_stride = shape.channels + 16;
  const int64_t fit = std::max(kFewestTiles, kBlockBytes / (kTaps<M> * v_stride * 4));
  const int64_t workers = std::max<int64_t>(1, torch::stable::get_num_threads());
  const bool by_tiles = workers == 1 || tiles >= workers * kFewestTiles || panels < workers;
  const int64_t share = by_tiles ? (tiles + workers - 1) / workers : tiles;
  const int64_t parts = (share + fit - 1) / fit, block = (share + parts - 1) / parts;
  const int64_t blocks = (tiles + block - 1) / block;
  const int64_t v_tap = spread(block * v_stride), m_tap = spread(block * width);
  const int64_t v_size = kTaps<M> * v_tap, m_size = kTaps<M> * m_tap;
  const int64_t sizes[] = {(by_tiles ? workers * v_size : v_size) + workers * m_size + 16}, one[] = {1};
  const Tensor scratch = empty_strided({sizes, 1}, {one, 1}, aoti_torch_dtype_float32(), like);
  float* const memory = output<float>(scratch);
  float* const products = memory + (by_tiles ? workers * v_size : v_size);
  const auto panels_of = [&](int64_t at, float* v, float* m) {
    const int64_t first = at * block, count = std::min(block, tiles - first);
    return Panels<T, M>{shape, v, u, m, epilogue, first, count, v_stride, v_tap, m_tap};
  };
  const auto input_of = [&](int64_t at, float* v) {
    return TransformInput<T, M>{shape, x, v, at * block, v_stride, v_tap};
  };
  if (by_tiles) {
    parallel_workers(workers, blocks, [&](int64_t worker, int64_t begin, int64_t end) {
      float* const v = memory + worker * v_size;
      for (int64_t at = begin; at < end; ++at) {
        run_kernel(input_of(at, v), at * block, std::min(tiles, (at + 1) * block));
        run_kernel(panels_of(at, v, products + worker * m_size), 0, panels);
      }
    });
    return;
  }
  for (int64_t at = 0; at < blocks; ++at) {
    const int64_t first = at * block, count = std::min(block, tiles - first);
    parallel_workers(workers, count, [&](int64_t, int64_t begin, int64_t end) {
      run_kernel(input_of(at, memory), first + begin, first + end);
    });
    parallel_workers(workers, panels, [&](int64_t worker, int64_t begin, int64_t end) {
      run_kernel(panels_of(at, memory, products + worker * m_size), begin, end);
    });
  }
}

// ---- weights ---------------------------------------------------------------------------------------------------------

// U = G g G' in fp64, rounded once: [panels, taps, C, panel]; output channels past K are zeros.
template <class T, int M>
struct Pack {
  const T* w;
  float* u;
  int64_t outputs, channels, along[4];  // along: the weight's strides

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    constexpr int kWidth = kPanel<W>;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / channels, c = task % channels, k = panel * kWidth;
      const int64_t count = outputs - k < kWidth ? outputs - k : kWidth;
      double g[3][3][kWidth] = {}, half[kEdge<M>][3][kWidth];
      for (int64_t j = 0; j < count; ++j) {
        const T* at = w + (k + j) * along[0] + c * along[1];
        for (int r = 0; r < 3; ++r) {
          for (int s = 0; s < 3; ++s) g[r][s][j] = static_cast<double>(load<1>(at + r * along[2] + s * along[3]));
        }
      }
      for (int s = 0; s < 3; ++s) {
        for (int j = 0; j < kWidth; ++j) {
          const double column[] = {g[0][s][j], g[1][s][j], g[2][s][j]};
          double o[kEdge<M>];
          Transform<M>::weight(column, o);
          for (int i = 0; i < kEdge<M>; ++i) half[i][s][j] = o[i];
        }
      }
      float* const to = u + (panel * kTaps<M> * channels + c) * kWidth;
      for (int i = 0; i < kEdge<M>; ++i) {
        float* const row = to + i * kEdge<M> * channels * kWidth;
        for (int j = 0; j < kWidth; ++j) {
          const double columns[] = {half[i][0][j], half[i][1][j], half[i][2][j]};
          double o[kEdge<M>];
          Transform<M>::weight(columns, o);
          for (int q = 0; q < kEdge<M>; ++q) row[q * channels * kWidth + j] = static_cast<float>(o[q]);
        }
      }
    }
  }
};

template <class T, int M>
void pack(const Tensor& weight, float* u) {
  const int64_t outputs = weight.size(0), channels = weight.size(1), width = panel_width();
  const int64_t panels = (outputs + width - 1) / width;
  const auto strides = weight.strides();
  const Pack<T, M> kernel{input<T>(weight), u, outputs, channels, {strides[0], strides[1], strides[2], strides[3]}};
  parallel_tasks(panels * channels, panels * channels * width * kTaps<M>,
                 [&](int64_t begin, int64_t end) { run_kernel(kernel, begin, end); });
}

// ---- operators -------------------------------------------------------------------------------------------------------

void check_tile(int64_t tile) { STD_TORCH_CHECK(tile == 2 || tile == 4, "tile: got ", tile, ", expected 2 or 4"); }

Tensor conv_winograd_pack(Tensor weight, int64_t tile) {
  check_tile(tile);
  const bool fits = weight.is_cpu() && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3;
  STD_TORCH_CHECK(fits && has_kernel_dtype(weight),
                  "weight: got shape ", shape_string(weight), ", expected [K, C, 3, 3] of a kernel's dtype on a CPU");
  const int64_t width = panel_width(), panels = (weight.size(0) + width - 1) / width, channels = weight.size(1);
  const int64_t taps = (tile + 2) * (tile + 2);
  const int64_t sizes[] = {panels, taps, channels, width}, strides[] = {taps * channels * width, channels * width, width, 1};
  const Tensor u = empty_strided({sizes, 4}, {strides, 4}, aoti_torch_dtype_float32(), weight);
  dispatch_dtype(weight, "weight", [&](auto t) {
    using T = decltype(t);
    tile == 2 ? pack<T, 2>(weight, output<float>(u)) : pack<T, 4>(weight, output<float>(u));
  });
  return u;
}

struct Padding {
  int64_t h, w;
};

// y, uninitialized, once the arguments are known to fit each other.
Tensor checked_output(const Tensor& x, const Tensor& u, int64_t outputs, Padding pad) {
  check_images(x);
  const bool fits = is_packed(u, x.size(1), outputs) && (u.size(1) == 16 || u.size(1) == 36);
  STD_TORCH_CHECK(fits, "u: got shape ", shape_string(u), ", expected a weight that _conv_winograd_pack made for ",
                  x.size(1), " and ", outputs, " channels");
  STD_TORCH_CHECK(pad.h >= 0 && pad.h <= 2 && pad.w >= 0 && pad.w <= 2, "padding: got ", pad.h, ", ", pad.w,
                  ", expected 0, 1 or 2");
  STD_TORCH_CHECK(x.size(2) + 2 * pad.h > 2 && x.size(3) + 2 * pad.w > 2, "x: got images of ", x.size(2), "x", x.size(3),
                  ", too small for a 3x3 kernel");
  return empty_images(x, outputs, x.size(2) + 2 * pad.h - 2, x.size(3) + 2 * pad.w - 2);
}

void conv_winograd_to(const Tensor& y, const Tensor& x, const Tensor& u, const After& after, Padding pad) {
  const int64_t tile = u.size(1) == 16 ? 2 : 4;
  Shape shape{x.size(0), x.size(2), x.size(3), x.size(1), y.size(1), pad.h, pad.w, 0, 0};
  shape.rows = (shape.out_height() + tile - 1) / tile;
  shape.columns = (shape.out_width() + tile - 1) / tile;
  if (y.numel() == 0) return;
  dispatch_dtype(x, "x", [&](auto t) {
    using T = decltype(t);
    const auto epilogue = after.template epilogue<T>(y);
    tile == 2 ? run_winograd<T, 2>(shape, input<T>(x), input<float>(u), epilogue, x)
              : run_winograd<T, 4>(shape, input<T>(x), input<float>(u), epilogue, x);
  });
}

Tensor conv_winograd(Tensor x, Tensor u, OptionalTensor bias, OptionalTensor residual, OptionalTensor scale, int64_t outputs,
                     int64_t pad_h, int64_t pad_w, std::string act) {
  const Padding pad{pad_h, pad_w};
  const Tensor y = checked_output(x, u, outputs, pad);
  conv_winograd_to(y, x, u, After(y, bias, residual, scale, act), pad);
  return y;
}

Tensor conv_winograd_over(Tensor x, Tensor u, OptionalTensor bias, Tensor residual, OptionalTensor scale, int64_t outputs,
                          int64_t pad_h, int64_t pad_w, std::string act) {
  const Padding pad{pad_h, pad_w};
  const After after(checked_output(x, u, outputs, pad), bias, residual, scale, act);
  conv_winograd_to(residual, x, u, after, pad);
  return residual;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("_conv_winograd_pack_native", TORCH_BOX(&fastres::conv_winograd_pack));
  m.impl("_conv_winograd_native", TORCH_BOX(&fastres::conv_winograd));
  m.impl("_conv_winograd_over_native", TORCH_BOX(&fastres::conv_winograd_over));
}
