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
#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "cpu/winograd.h"

namespace fastres {
namespace {

// Tiles [begin, end) of M, one panel of channels from k on, to y: m[tap, tile - first, 2 W].
template <class T, int M>
struct TransformOutput {
  WinogradShape shape;
  const float* m;
  Epilogue<T> epilogue;
  int64_t first, tap_stride, k;
  std::atomic<bool>* finite;  // told where a sum is not; or null

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const int64_t height = shape.out_height(), width = shape.out_width();
    Float<W> zeros[M] = {};  // the sum of each column's outputs times 0
    float tail[M] = {};
    for (int64_t tile = begin; tile < end; ++tile) {
      const TilePlace at(shape, tile);
      const int64_t y = at.row * M, x = at.column * M;
      const int64_t to = ((at.image * height + y) * width + x) * shape.outputs;
      const float* from = m + (tile - first) * kPanel<W>;
      const int bottom = height - y < M ? height - y : M, right = width - x < M ? width - x : M;
      const int64_t last = shape.outputs - k < kPanel<W> ? shape.outputs - k : kPanel<W>;
      int64_t j = 0;
      for (; j + W <= last; j += W) at_channel<W>(from + j, to + k + j, k + j, bottom, right, zeros);
      for (; j < last; ++j) at_channel<1>(from + j, to + k + j, k + j, bottom, right, tail);
    }
    if (finite == nullptr) return;
    for (int j = 0; j < M; ++j) {
      if (!(sum_lanes<W>(zeros[j]) == 0 && tail[j] == 0)) finite->store(false, std::memory_order_relaxed);
    }
  }

  template <int W>
  FASTRES_HD void at_channel(const float* from, int64_t to, int64_t channel, int bottom, int right,
                             Float<W>* zeros) const {
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
        zeros[j] += o[j] * 0.0f;
        epilogue.template put<W>(o[j], to + (i * shape.out_width() + j) * shape.outputs, channel);
      }
    }
  }
};

constexpr int64_t kStreamedBytes = 4 << 20;  // of U: more does not stay in L2 and is fetched ahead

// Panels [begin, end) of output channels, for the tiles of a block: products, then their way to y.
template <class T, int M>
struct Panels {
  WinogradShape shape;
  const float* v;  // [taps, tiles, channels], with strides
  const float* u;  // [panels, taps, channels, 2 W]
  float* m;        // [taps, tiles, 2 W], with a stride
  Epilogue<T> epilogue;
  int64_t first, count, v_stride, v_tap_stride, m_tap_stride;
  std::atomic<bool>* finite;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const int64_t size = shape.channels * kPanel<W>, whole = shape.outputs * shape.channels * kTaps<M> * 4;
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int tap = 0; tap < kTaps<M>; ++tap) {
        const float* const weights = u + (panel * kTaps<M> + tap) * size;
        const bool fetches = whole > kStreamedBytes && (panel + 1 < end || tap + 1 < kTaps<M>);
        const char* const next = fetches ? reinterpret_cast<const char*>(weights + size) : nullptr;
        product<W>({v + tap * v_tap_stride, v_stride, weights, shape.channels, next, kPanel<W> * 4}, count,
                   ToMemory{m + tap * m_tap_stride, false});
      }
      const TransformOutput<T, M> output{shape, m, epilogue, first, m_tap_stride, panel * kPanel<W>, finite};
      call<W>(output, first, first + count);
    }
  }
};

constexpr int64_t kBlockBytes = 1 << 20;  // of V: about half of an L2 cache; M and a panel's tap of U take the rest
constexpr int64_t kFewestTiles = 28;      // of a block: fewer, and U is read again too often

template <class T, int M>
void run_winograd(const WinogradShape& shape, const T* x, const float* u, const Epilogue<T>& epilogue,
                  std::atomic<bool>* finite, const Tensor& like) {
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
  const Scratch scratch((by_tiles ? workers * v_size : v_size) + workers * m_size, like);
  float* const memory = scratch.data();
  float* const products = memory + (by_tiles ? workers * v_size : v_size);
  const auto panels_of = [&](int64_t at, float* v, float* m) {
    const int64_t first = at * block, count = std::min(block, tiles - first);
    return Panels<T, M>{shape, v, u, m, epilogue, first, count, v_stride, v_tap, m_tap, finite};
  };
  const auto input_of = [&](int64_t at, float* v) {
    return TransformInput<T, M>{shape, x, v, at * block, {v_tap, v_stride, 16, 4}};
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

constexpr int64_t kPackedAtOnce = 16;  // channels: what is read and written meanwhile stays in L1 or L2

// U = G g G': [panels, taps, C, panel]; output channels past K are zeros. A task is some channels of a panel: their
// weights are gathered, and their taps leave in runs: C is often a power of two, and taps then share a set of the cache.
template <class T, int M>
struct Pack {
  const T* w;
  float* u;
  int64_t outputs, channels, along[4];  // along: the weight's strides

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    constexpr int64_t kWidth = kPanel<W>, kRun = kPackedAtOnce * kWidth, kTapStride = kRun + 16;
    alignas(64) float g[9 * kRun], taps[kTaps<M> * kTapStride];
    int64_t offsets[9];
    for (int i = 0; i < 9; ++i) offsets[i] = i / 3 * along[2] + i % 3 * along[3];
    const int64_t groups = (channels + kPackedAtOnce - 1) / kPackedAtOnce;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / groups, first = task % groups * kPackedAtOnce, k = panel * kWidth;
      const int64_t count = channels - first < kPackedAtOnce ? channels - first : kPackedAtOnce;
      for (int64_t j = 0; j < kWidth; ++j) {
        const T* from = w + (k + j) * along[0] + first * along[1];
        float* to = g + j;
        const bool there = k + j < outputs;
        for (int i = 0; there && i < 9; ++i) {  // what the next task reads here, in nine runs or in one
          const int64_t at = along[1] == 1 ? offsets[i] : i * 64 / static_cast<int64_t>(sizeof(T));
          __builtin_prefetch(from + kPackedAtOnce * along[1] + at);
        }
        for (int64_t c = 0; c < count; ++c, from += along[1], to += 9 * kWidth) {
#pragma GCC unroll 9
          for (int i = 0; i < 9; ++i) to[i * kWidth] = there ? load<1>(from + offsets[i]) : 0.0f;
        }
      }
      for (int64_t at = 0; at < count * kWidth; at += W) {
        const int64_t c = at / kWidth, j = at % kWidth;
        Float<W> half[kEdge<M>][3];
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          Float<W> column[3], o[kEdge<M>];
#pragma GCC unroll 3
          for (int r = 0; r < 3; ++r) column[r] = load<W>(g + (c * 9 + r * 3 + s) * kWidth + j);
          Transform<M>::weight(column, o);
#pragma GCC unroll 6
          for (int i = 0; i < kEdge<M>; ++i) half[i][s] = o[i];
        }
#pragma GCC unroll 6
        for (int i = 0; i < kEdge<M>; ++i) {
          Float<W> o[kEdge<M>];
          Transform<M>::weight(half[i], o);
#pragma GCC unroll 6
          for (int q = 0; q < kEdge<M>; ++q) store<W>(taps + (i * kEdge<M> + q) * kTapStride + at, o[q]);
        }
      }
      for (int tap = 0; tap < kTaps<M>; ++tap) {
        float* const to = u + ((panel * kTaps<M> + tap) * channels + first) * kWidth;
        std::memcpy(to, taps + tap * kTapStride, count * kWidth * sizeof(float));
      }
    }
  }
};

// The sizes of U for K output and C input channels.
template <int M>
int64_t packed_size(int64_t outputs, int64_t channels) {
  const int64_t width = panel_width();
  return (outputs + width - 1) / width * kTaps<M> * channels * width;
}

// A weight as the kernels here see it: turned, it is the one of the gradient of x, from output to input channels.
template <class T>
struct Weight {
  const T* w;
  int64_t outputs, channels, along[4];

  Weight(const Tensor& t, bool turned) : w(input<T>(t)), outputs(t.size(0)), channels(t.size(1)) {
    std::copy_n(t.strides().begin(), 4, along);
    if (!turned) return;
    std::swap(outputs, channels);
    std::swap(along[0], along[1]);
    w += 2 * (along[2] + along[3]);
    along[2] = -along[2];
    along[3] = -along[3];
  }
};

template <class T, int M>
void pack(const Weight<T>& weight, float* u) {
  const int64_t width = panel_width(), groups = (weight.channels + kPackedAtOnce - 1) / kPackedAtOnce;
  Pack<T, M> kernel{weight.w, u, weight.outputs, weight.channels, {}};
  std::copy_n(weight.along, 4, kernel.along);
  parallel_tasks((weight.outputs + width - 1) / width * groups, packed_size<M>(weight.outputs, weight.channels),
                 [&](int64_t begin, int64_t end) { run_kernel(kernel, begin, end); });
}

// ---- operators -------------------------------------------------------------------------------------------------------

// Calls f with std::integral_constant<int, 2> or 4.
template <class F>
void with_tile(int64_t tile, const F& f) {
  STD_TORCH_CHECK(tile == 2 || tile == 4, "tile: got ", tile, ", expected 2 or 4");
  tile == 2 ? f(std::integral_constant<int, 2>{}) : f(std::integral_constant<int, 4>{});
}

void check_weight(const Tensor& weight) {
  const bool fits = weight.is_cpu() && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3;
  STD_TORCH_CHECK(fits && has_kernel_dtype(weight),
                  "weight: got shape ", shape_string(weight), ", expected [K, C, 3, 3] of a kernel's dtype on a CPU");
}

Tensor conv_winograd_pack(Tensor weight, int64_t tile) {
  check_weight(weight);
  const int64_t width = panel_width(), panels = (weight.size(0) + width - 1) / width, channels = weight.size(1);
  const int64_t taps = (tile + 2) * (tile + 2);
  const int64_t sizes[] = {panels, taps, channels, width}, strides[] = {taps * channels * width, channels * width, width, 1};
  const Tensor u = empty_strided({sizes, 4}, {strides, 4}, aoti_torch_dtype_float32(), weight);
  with_tile(tile, [&](auto m) {
    dispatch_dtype(weight, "weight", [&](auto t) {
      using T = decltype(t);
      pack<T, m>(Weight<T>(weight, false), output<float>(u));
    });
  });
  return u;
}

ImageSize output_size(const Tensor& x, int64_t outputs, Padding pad) {
  check_geometry(x, pad);
  return {outputs, x.size(2) + 2 * pad.h - 2, x.size(3) + 2 * pad.w - 2};
}

ImageSize checked_size(const Tensor& x, const Tensor& u, int64_t outputs, Padding pad) {
  const bool fits = x.dim() == 4 && is_packed(u, x.size(1), outputs) && (u.size(1) == 16 || u.size(1) == 36);
  STD_TORCH_CHECK(fits, "u: got shape ", shape_string(u), ", expected a weight that _conv_winograd_pack made for ",
                  x.dim() == 4 ? x.size(1) : 0, " and ", outputs, " channels");
  return output_size(x, outputs, pad);
}

void conv_winograd_to(const Tensor& y, const Tensor& x, const Tensor& u, const After& after, Padding pad) {
  if (y.numel() == 0) return;
  with_tile(u.size(1) == 16 ? 2 : 4, [&](auto m) {
    dispatch_dtype(x, "x", [&](auto t) {
      using T = decltype(t);
      const WinogradShape shape = winograd_shape(x, y.size(1), pad, m);
      run_winograd<T, m>(shape, input<T>(x), input<float>(u), after.template epilogue<T>(y), nullptr, x);
    });
  });
}

Tensor conv_winograd_into(Tensor x, Tensor u, OptionalTensor bias, OptionalTensor residual, OptionalTensor scale,
                          int64_t outputs, int64_t pad_h, int64_t pad_w, std::string act, Tensor y) {
  const Padding pad{pad_h, pad_w};
  check_output(y, x, checked_size(x, u, outputs, pad));
  conv_winograd_to(y, x, u, After(y, bias, residual, scale, act), pad);
  return y;
}

Tensor conv_winograd(Tensor x, Tensor u, OptionalTensor bias, OptionalTensor residual, OptionalTensor scale, int64_t outputs,
                     int64_t pad_h, int64_t pad_w, std::string act) {
  const Tensor y = empty_images(x, checked_size(x, u, outputs, {pad_h, pad_w}));
  return conv_winograd_into(x, u, bias, residual, scale, outputs, pad_h, pad_w, act, y);
}

// The same on a weight as it is, [K, C, 3, 3], by F(2x2); turned, for the gradient of x, from K to C channels. Nothing
// where an output is not finite: a tile spreads an infinity or a NaN to its neighbors.
OptionalTensor conv_winograd_once(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, OptionalTensor scale,
                                  int64_t pad_h, int64_t pad_w, std::string act, bool turned) {
  constexpr int kTile = 2;
  check_weight(weight);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == weight.size(turned ? 0 : 1) && x.scalar_type() == weight.scalar_type(),
                  "x: got shape ", shape_string(x), ", expected ", weight.size(turned ? 0 : 1),
                  " channels of weight's dtype");
  const Padding pad{pad_h, pad_w};
  const Tensor y = empty_images(x, output_size(x, weight.size(turned ? 1 : 0), pad));
  const After after(y, bias, residual, scale, act);
  std::atomic<bool> finite{true};
  if (y.numel() == 0) return y;
  dispatch_dtype(x, "x", [&](auto t) {
    using T = decltype(t);
    const Weight<T> kernel(weight, turned);
    const Scratch u(packed_size<kTile>(kernel.outputs, kernel.channels), x);
    pack<T, kTile>(kernel, u.data());
    const WinogradShape shape = winograd_shape(x, kernel.outputs, pad, kTile);
    run_winograd<T, kTile>(shape, input<T>(x), u.data(), after.template epilogue<T>(y), &finite, x);
  });
  return finite ? OptionalTensor(y) : std::nullopt;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("_conv_winograd_pack_native", TORCH_BOX(&fastres::conv_winograd_pack));
  m.impl("_conv_winograd_native", TORCH_BOX(&fastres::conv_winograd));
  m.impl("_conv_winograd_once_native", TORCH_BOX(&fastres::conv_winograd_once));
  m.impl("_conv_winograd_into_native", TORCH_BOX(&fastres::conv_winograd_into));
}
