// 1x1 convolutions of any stride: a product of matrices, [pixels, C] times [C, K], with what follows in its own pass.
//
// A block of pixels is widened to fp32 rows in L2, a line apart from a power of two; each panel of output channels is
// multiplied from there, its sums go from registers through scale, bias, residual and activation to y. Threads take
// pixels, or panels where there are few. An element is computed alike in every case.
#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "cpu/conv.h"

namespace fastres {
namespace {

struct Shape {
  int64_t batch, height, width, channels, outputs, out_height, out_width, stride_h, stride_w;

  int64_t pixels() const { return batch * out_height * out_width; }
};

// Pixels [begin, end) of the output, from x to rows: v[pixel - first, channel].
template <class T>
struct Gather {
  Shape shape;
  const T* x;
  float* v;
  int64_t first, v_stride;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const int64_t plane = shape.out_height * shape.out_width;
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const int64_t image = pixel / plane, rest = pixel - image * plane, p = rest / shape.out_width;
      const int64_t q = rest - p * shape.out_width;
      const int64_t from = (image * shape.height + p * shape.stride_h) * shape.width + q * shape.stride_w;
      const T* row = x + from * shape.channels;
      float* to = v + (pixel - first) * v_stride;
      int64_t c = 0;
      for (; c + W <= shape.channels; c += W) store<W>(to + c, load<W>(row + c));
      for (; c < shape.channels; ++c) to[c] = load<1>(row + c);
    }
  }
};

template <class T>
struct Panels {
  Shape shape;
  const float* v;
  const float* u;  // [panels, 1, C, 2 W]
  Epilogue<T> epilogue;
  int64_t first, count, v_stride;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const int64_t size = shape.channels * kPanel<W>;
    const bool streamed = size * (end - begin) * 4 > kStreamedBytes;
    for (int64_t panel = begin; panel < end; ++panel) {
      const ToImage<T> to{epilogue, first, shape.outputs, panel * kPanel<W>};
      const float* const at = u + panel * size;
      const char* const next = streamed && panel + 1 < end ? reinterpret_cast<const char*>(at + size) : nullptr;
      product<W>({v, v_stride, at, shape.channels, next, kPanel<W> * 4}, count, to);
    }
  }
};

constexpr int64_t kBlockBytes = 1 << 19;  // of V and y: a part of an L2 cache
constexpr int64_t kFewestPixels = 56;     // of a block

template <class T>
void run_1x1(const Shape& shape, const T* x, const float* u, const Epilogue<T>& epilogue, const Tensor& like) {
  const int64_t pixels = shape.pixels(), width = panel_width(), panels = (shape.outputs + width - 1) / width;
  // Rows of x serve as they are unless their lines share a few sets of the cache.
  const bool dense = shape.stride_h == 1 && shape.stride_w == 1 && shape.channels % 256 != 0;
  const bool direct = std::is_same_v<T, float> && dense;
  const int64_t v_stride = direct ? shape.channels : spread(shape.channels);
  const int64_t workers = std::max<int64_t>(1, torch::stable::get_num_threads());
  const bool by_pixels = workers == 1 || pixels >= 2 * workers * kFewestPixels || panels < workers;
  const int64_t share = by_pixels ? (pixels + workers - 1) / workers : pixels;
  const int64_t fit = std::max(kFewestPixels, kBlockBytes / ((v_stride + shape.outputs) * 4));
  const int64_t parts = (share + fit - 1) / fit, block = (share + parts - 1) / parts;
  const int64_t blocks = (pixels + block - 1) / block, room = direct ? 0 : block * v_stride;  // of a worker
  const Scratch scratch((by_pixels ? workers : 1) * room, like);
  float* const memory = scratch.data();
  const auto gather = [&](int64_t at, float* v) { return Gather<T>{shape, x, v, at * block, v_stride}; };
  const auto panels_of = [&](int64_t at, const float* v) {
    if constexpr (std::is_same_v<T, float>) v = direct ? x + at * block * v_stride : v;
    return Panels<T>{shape, v, u, epilogue, at * block, std::min(block, pixels - at * block), v_stride};
  };
  if (by_pixels) {
    parallel_workers(workers, blocks, [&](int64_t worker, int64_t begin, int64_t end) {
      float* const v = memory + worker * room;
      for (int64_t at = begin; at < end; ++at) {
        if (!direct) run_kernel(gather(at, v), at * block, std::min(pixels, (at + 1) * block));
        run_kernel(panels_of(at, v), 0, panels);
      }
    });
    return;
  }
  for (int64_t at = 0; at < blocks; ++at) {
    const int64_t first = at * block, count = std::min(block, pixels - first);
    if (!direct) {
      parallel_workers(workers, count, [&](int64_t, int64_t begin, int64_t end) {
        run_kernel(gather(at, memory), first + begin, first + end);
      });
    }
    parallel_workers(workers, panels, [&](int64_t, int64_t begin, int64_t end) {
      run_kernel(panels_of(at, memory), begin, end);
    });
  }
}

// ---- operators -------------------------------------------------------------------------------------------------------

struct Stride {
  int64_t h, w;
};

ImageSize checked_size(const Tensor& x, const Tensor& u, int64_t outputs, Stride stride) {
  check_images(x);
  STD_TORCH_CHECK(is_packed(u, x.size(1), outputs) && u.size(1) == 1, "u: got shape ", shape_string(u),
                  ", expected a weight that _conv_direct_pack made for ", x.size(1), " and ", outputs, " channels");
  STD_TORCH_CHECK(stride.h > 0 && stride.w > 0, "stride: got ", stride.h, ", ", stride.w, ", expected at least 1");
  return {outputs, (x.size(2) + stride.h - 1) / stride.h, (x.size(3) + stride.w - 1) / stride.w};
}

void conv_1x1_to(const Tensor& y, const Tensor& x, const Tensor& u, const After& after, Stride stride) {
  if (y.numel() == 0) return;
  const Shape shape{x.size(0), x.size(2), x.size(3), x.size(1), y.size(1), y.size(2), y.size(3), stride.h, stride.w};
  dispatch_dtype(x, "x", [&](auto t) {
    using T = decltype(t);
    run_1x1<T>(shape, input<T>(x), input<float>(u), after.template epilogue<T>(y), x);
  });
}

Tensor conv_1x1_into(Tensor x, Tensor u, OptionalTensor bias, OptionalTensor residual, OptionalTensor scale, int64_t outputs,
                     int64_t stride_h, int64_t stride_w, std::string act, Tensor y) {
  const Stride stride{stride_h, stride_w};
  check_output(y, x, checked_size(x, u, outputs, stride));
  conv_1x1_to(y, x, u, After(y, bias, residual, scale, act), stride);
  return y;
}

Tensor conv_1x1(Tensor x, Tensor u, OptionalTensor bias, OptionalTensor residual, OptionalTensor scale, int64_t outputs,
                int64_t stride_h, int64_t stride_w, std::string act) {
  const Tensor y = empty_images(x, checked_size(x, u, outputs, {stride_h, stride_w}));
  return conv_1x1_into(x, u, bias, residual, scale, outputs, stride_h, stride_w, act, y);
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("_conv_1x1_native", TORCH_BOX(&fastres::conv_1x1));
  m.impl("_conv_1x1_into_native", TORCH_BOX(&fastres::conv_1x1_into));
}
