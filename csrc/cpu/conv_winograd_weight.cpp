// The gradient of the weight of a 3x3 convolution of stride 1 by Winograd's F(3x3, 2x2): 2.25 times fewer products than the
// direct sum over pixels.
//
//   dg = G' [ sum over tiles of (B' d B) . (A z A') ] G       d: a tile of x, 4x4; z: of dy, 2x2; dg: 3x3
//
// The transposed bilinear form of F(2x2, 3x3), with its matrices. Each of the 16 taps is a product of matrices over the
// tiles: E' [K, tiles] times V [tiles, C]. Blocks of tiles are transformed into V and E, which stay in the last-level
// cache; threads then take tasks of 2 W input by 2 W output channels. Blocks follow from the sizes alone and sum in order,
// so an element does not depend on the number of threads. Few channels make the transforms a share of 1 / C and 1 / K.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/winograd.h"

namespace fastres {
namespace {

constexpr int kTile = 2;
constexpr int64_t kTapCount = kTaps<kTile>;

// Tiles [begin, end) of dy to E.
template <class T>
struct TransformGradient {
  WinogradShape shape;
  const T* dy;
  float* e;
  int64_t first;
  Layout to;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const int64_t height = shape.out_height(), width = shape.out_width();
    for (int64_t tile = begin; tile < end; ++tile) {
      const TilePlace at(shape, tile);
      const int64_t y = at.row * kTile, x = at.column * kTile, t = tile - first;
      const T* from = dy + ((at.image * height + y) * width + x) * shape.outputs;
      const bool below = y + 1 < height, beside = x + 1 < width;
      int64_t k = 0;
      for (; k + W <= shape.outputs; k += W) at_channel<W>(from + k, e + to.at(t, k), below, beside);
      for (; k < shape.outputs; ++k) at_channel<1>(from + k, e + to.at(t, k), below, beside);
    }
  }

  template <int W>
  FASTRES_HD void at_channel(const T* from, float* out, bool below, bool beside) const {
    const int64_t row = shape.out_width() * shape.outputs;
    const Float<W> zero{};
    const Float<W> z[2][2] = {{load<W>(from), beside ? load<W>(from + shape.outputs) : zero},
                              {below ? load<W>(from + row) : zero,
                               below && beside ? load<W>(from + row + shape.outputs) : zero}};
    Float<W> half[kEdge<kTile>][2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Float<W> column[] = {z[0][j], z[1][j]};
      Float<W> o[kEdge<kTile>];
      Transform<kTile>::output_gradient(column, o);
#pragma GCC unroll 4
      for (int i = 0; i < kEdge<kTile>; ++i) half[i][j] = o[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < kEdge<kTile>; ++i) {
      Float<W> o[kEdge<kTile>];
      Transform<kTile>::output_gradient(half[i], o);
#pragma GCC unroll 4
      for (int j = 0; j < kEdge<kTile>; ++j) store<W>(out + (i * kEdge<kTile> + j) * to.tap, o[j]);
    }
  }
};

constexpr int64_t kSummed = 128;  // tiles in one accumulator: longer sums lose digits

// Products of taps [begin, end) of one pair of groups, over the tiles of a block.
struct SumTiles {
  const float* e;  // of a group: [taps, tiles, 2 W]
  const float* v;
  float* d;  // [taps, 2 W of k, 2 W of c]
  int64_t rows, count, e_tap, v_tap;
  bool add;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t tap = begin; tap < end; ++tap) {
      for (int64_t t = 0; t < count; t += kSummed) {
        const int64_t at = t * kPanel<W>, depth = count - t < kSummed ? count - t : kSummed;
        product<W, true>({e + tap * e_tap + at, kPanel<W>, v + tap * v_tap + at, depth, nullptr, 0}, rows,
                         ToMemory{d + tap * kPanel<W> * kPanel<W>, add || t > 0});
      }
    }
  }
};

// Output channels [begin, end) of a group of dy's, for a group of x's: dg of each from D.
template <class T>
struct TransformSum {
  const float* d;  // [taps, 2 W of k, 2 W of c]
  T* gradient;     // of the first channels of both groups
  int64_t channels, along[4];
  std::atomic<bool>* finite;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; ++k) {
      int64_t c = 0;
      for (; c + W <= channels; c += W) at_channel<W>(k, c);
      for (; c < channels; ++c) at_channel<1>(k, c, kPanel<W>);
    }
  }

  template <int W>
  FASTRES_HD void at_channel(int64_t k, int64_t c, int64_t panel = kPanel<W>) const {
    const float* from = d + k * panel + c;
    Float<W> half[3][kEdge<kTile>], zeros{};  // zeros: the sum of the outputs times 0
#pragma GCC unroll 4
    for (int j = 0; j < kEdge<kTile>; ++j) {
      Float<W> o[kEdge<kTile>], g[3];
#pragma GCC unroll 4
      for (int i = 0; i < kEdge<kTile>; ++i) o[i] = load<W>(from + (i * kEdge<kTile> + j) * panel * panel);
      Transform<kTile>::weight_gradient(o, g);
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) half[r][j] = g[r];
    }
    for (int r = 0; r < 3; ++r) {
      Float<W> g[3];
      Transform<kTile>::weight_gradient(half[r], g);
      for (int s = 0; s < 3; ++s) {
        zeros += g[s] * 0.0f;
        T* const to = gradient + k * along[0] + c * along[1] + r * along[2] + s * along[3];
        if (W == 1 || along[1] == 1) {
          store<W>(to, g[s]);
          continue;
        }
        float lanes[W];
        store<W>(lanes, g[s]);
        for (int j = 0; j < W; ++j) store<1>(to + j * along[1], lanes[j]);
      }
    }
    if (!(sum_lanes<W>(zeros) == 0)) finite->store(false, std::memory_order_relaxed);
  }
};

constexpr int64_t kBlockBytes = 4 << 20;  // of V and E
constexpr int64_t kFewestTiles = 128;      // of a block

template <class T>
void run_weight(const WinogradShape& shape, const T* x, const T* dy, T* gradient, const int64_t* along, const Tensor& like,
                std::atomic<bool>* finite) {
  const int64_t tiles = shape.tiles(), width = panel_width();
  const int64_t inputs = (shape.channels + width - 1) / width, outputs = (shape.outputs + width - 1) / width;
  const int64_t fit = std::max(kFewestTiles, kBlockBytes / (kTapCount * (inputs + outputs) * width * 4));
  const int64_t blocks = (tiles + fit - 1) / fit, block = (tiles + blocks - 1) / blocks;
  int shift = 0;
  while ((1 << shift) < width) ++shift;
  const auto layout = [&](int64_t groups) { return Layout{spread(groups * block * width), width, block * width, shift}; };
  const Layout v_at = layout(inputs), e_at = layout(outputs);
  const int64_t workers = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t pairs = inputs * outputs, d_size = kTapCount * width * width;
  const bool once = blocks == 1;  // a pair's sums go to the gradient at once
  const int64_t v_size = kTapCount * v_at.tap, e_size = kTapCount * e_at.tap;
  const Scratch scratch(v_size + e_size + (once ? std::min(workers, pairs) : pairs) * d_size, like);
  float* const v = scratch.data();
  float* const e = v + v_size;
  float* const sums = e + e_size;
  const auto sum = [&](int64_t pair, float* d, int64_t count, bool add, int64_t begin, int64_t end) {
    const int64_t k = pair / inputs, rows = std::min(width, shape.outputs - k * width);
    run_kernel(SumTiles{e + k * e_at.group, v + pair % inputs * v_at.group, d, rows, count, e_at.tap, v_at.tap, add},
               begin, end);
  };
  const auto finish = [&](int64_t pair, const float* d) {
    const int64_t c = pair % inputs * width, k = pair / inputs * width;
    const TransformSum<T> kernel{d, gradient + k * along[0] + c * along[1], std::min(width, shape.channels - c),
                                 {along[0], along[1], along[2], along[3]}, finite};
    run_kernel(kernel, 0, std::min(width, shape.outputs - k));
  };
  for (int64_t at = 0; at < blocks; ++at) {
    const int64_t first = at * block, count = std::min(block, tiles - first);
    parallel_workers(workers, count, [&](int64_t, int64_t begin, int64_t end) {
      run_kernel(TransformInput<T, kTile>{shape, x, v, first, v_at}, first + begin, first + end);
      run_kernel(TransformGradient<T>{shape, dy, e, first, e_at}, first + begin, first + end);
    });
    if (once) {
      parallel_workers(std::min(workers, pairs), pairs, [&](int64_t worker, int64_t begin, int64_t end) {
        float* const d = sums + worker * d_size;
        for (int64_t pair = begin; pair < end; ++pair) {
          sum(pair, d, count, false, 0, kTapCount);
          finish(pair, d);
        }
      });
      return;
    }
    parallel_workers(workers, pairs * kTapCount, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t pair = begin / kTapCount; pair * kTapCount < end; ++pair) {
        const int64_t from = std::max<int64_t>(0, begin - pair * kTapCount);
        sum(pair, sums + pair * d_size, count, at > 0, from, std::min(kTapCount, end - pair * kTapCount));
      }
    });
  }
  parallel_workers(workers, pairs, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) finish(pair, sums + pair * d_size);
  });
}

// ---- operator --------------------------------------------------------------------------------------------------------

// The gradient of a weight [K, C, 3, 3], in channels_last if asked for; nothing where it is not finite.
OptionalTensor conv_winograd_weight(Tensor x, Tensor dy, int64_t pad_h, int64_t pad_w, bool channels_last) {
  check_geometry(x, {pad_h, pad_w});
  check_images(dy);
  const int64_t outputs = dy.size(1), channels = x.size(1);
  const WinogradShape shape = winograd_shape(x, outputs, {pad_h, pad_w}, kTile);
  const bool fits = dy.size(0) == shape.batch && dy.size(2) == shape.out_height() && dy.size(3) == shape.out_width();
  STD_TORCH_CHECK(fits && dy.scalar_type() == x.scalar_type() && dy.numel() > 0, "dy: got shape ", shape_string(dy),
                  ", expected [", shape.batch, ", K, ", shape.out_height(), ", ", shape.out_width(), "] of x's dtype");
  const int64_t sizes[] = {outputs, channels, 3, 3};
  const int64_t nchw[] = {channels * 9, 9, 3, 1}, nhwc[] = {channels * 9, 1, channels * 3, channels};
  const int64_t* const along = channels_last ? nhwc : nchw;
  const Tensor gradient = empty_strided({sizes, 4}, {along, 4}, dtype_of(x), x);
  std::atomic<bool> finite{true};
  dispatch_dtype(x, "x", [&](auto t) {
    using T = decltype(t);
    run_weight<T>(shape, input<T>(x), input<T>(dy), output<T>(gradient), along, x, &finite);
  });
  return finite ? OptionalTensor(gradient) : std::nullopt;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) { m.impl("_conv_winograd_weight_native", TORCH_BOX(&fastres::conv_winograd_weight)); }
