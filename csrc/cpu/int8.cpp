// quantize, dequantize, max_pool_int8 and mean_int8: what stands between int8 convolutions, on uint8 in channels_last.
//
// All are bound by memory: one pass, a byte for each number. An input in NCHW is transposed on its way to channels_last.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/conv.h"

namespace fastres {
namespace {

constexpr int64_t kBlock = 8192;  // elements of a task of a flat pass
constexpr int64_t kChannels = 64;  // channels of a task of the mean

template <int W>
struct Bytes {
  typedef uint8_t type __attribute__((vector_size(W)));
  typedef char Signed __attribute__((vector_size(W)));  // what gcc's builtins take
};
template <>
struct Bytes<1> {
  using type = uint8_t;
};

template <int W>
FASTRES_HD void store_bytes(uint8_t* p, Int<W> value) {  // each of 0..255
  if constexpr (W == 1) {
    *p = static_cast<uint8_t>(value);
  } else {
#if FASTRES_X86_TARGETS  // gcc 12 takes vectors apart for this
    if constexpr (W == 16) {
      const auto bytes = __builtin_ia32_pmovdb512_mask(value, typename Bytes<W>::Signed{}, -1);
      std::memcpy(p, &bytes, sizeof bytes);
      return;
    }
#endif
    const auto bytes = __builtin_convertvector(value, typename Bytes<W>::type);
    std::memcpy(p, &bytes, sizeof bytes);
  }
}

template <int W>
FASTRES_HD Int<W> load_bytes_wide(const uint8_t* p) {
  if constexpr (W == 1) {
    return *p;
  } else {
#if FASTRES_X86_TARGETS
    if constexpr (W == 16) {
      return __builtin_ia32_pmovzxbd512_mask(load_bytes<typename Bytes<W>::Signed>(p), Int<W>{}, -1);
    }
#endif
    return __builtin_convertvector(load_bytes<typename Bytes<W>::type>(p), Int<W>);
  }
}

struct Scale {
  float inverse;
  int32_t zero_point;

  // clamp before rounding: the bounds are integers, and the sum with 1.5 * 2^23 rounds to even what is below 2^22
  template <int W>
  FASTRES_HD Int<W> quantized(Float<W> x) const {
    const Float<W> low = broadcast<W>(static_cast<float>(-zero_point)), high = low + 255.0f;
    Float<W> v = x * inverse;
    v = v > low ? v : low;  // NaN too
    v = v < high ? v : high;
    const Float<W> rounded = (v + 12582912.0f) - 12582912.0f;
    if constexpr (W == 1) {
      return static_cast<int32_t>(rounded) + zero_point;
    } else {
      return __builtin_convertvector(rounded, Int<W>) + zero_point;
    }
  }
};

template <class T>
struct QuantizeFlat {
  Scale scale;
  const T* x;
  uint8_t* y;
  int64_t n;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const int64_t last = end * kBlock < n ? end * kBlock : n;
    int64_t i = begin * kBlock;
    for (; i + W <= last; i += W) store_bytes<W>(y + i, scale.quantized<W>(load<W>(x + i)));
    for (; i < last; ++i) store_bytes<1>(y + i, scale.quantized<1>(load<1>(x + i)));
  }
};

// NCHW -> NHWC: rows of an image, W pixels of every channel at a time.
template <class T>
struct QuantizeRows {
  Scale scale;
  const T* x;  // [N, C, H, W]
  uint8_t* y;  // [N, H, W, C]
  int64_t channels, height, width;

  template <int W>
  FASTRES_HD void pixels(const T* from, uint8_t* to) const {
    uint8_t line[W];
    for (int64_t c = 0; c < channels; ++c) {
      store_bytes<W>(line, scale.quantized<W>(load<W>(from + c * height * width)));
      for (int i = 0; i < W; ++i) to[i * channels + c] = line[i];
    }
  }

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / height, h = row % height;
      const T* const from = x + (image * channels * height + h) * width;
      uint8_t* const to = y + row * width * channels;
      int64_t i = 0;
      for (; i + W <= width; i += W) pixels<W>(from + i, to + i * channels);
      for (; i < width; ++i) pixels<1>(from + i, to + i * channels);
    }
  }
};

// Images of up to 4 channels as blocks of 2x2 pixels, padded: y[n, i, j, (dy, dx, c)], c padded to 4 with the zero point.
// A pixel is a word of 4 bytes; two of a row lie side by side, at every 16th byte.
struct QuantizeBlocks {
  Scale scale;
  const float* x;
  uint8_t* y;  // [N, rows, columns, 16]
  int64_t channels, height, width, rows, columns, top, left;
  bool channels_last;

  int64_t at(int64_t image, int64_t row) const { return (image * (channels_last ? 1 : channels) * height + row) * width; }

  template <int W>
  FASTRES_HD void words(const float* from, uint32_t* to) const {  // W pixels of NCHW
    Int<W> word = Int<W>{} + (channels < 4 ? scale.zero_point << 24 : 0);
    for (int64_t c = 0; c < 4; ++c) {
      if (c < channels) {
        word |= scale.quantized<W>(load<W>(from + c * height * width)) << static_cast<int>(8 * c);
      } else if (c < 3) {
        word |= (Int<W>{} + scale.zero_point) << static_cast<int>(8 * c);
      }
    }
    std::memcpy(to, &word, sizeof word);
  }

  // A row of pixels, as words behind the padding.
  template <int W>
  FASTRES_HD void line(int64_t image, int64_t row, uint32_t* to) const {
    if (channels_last) {
      const float* from = x + at(image, row) * channels;
      for (int64_t i = 0; i < width; ++i) {
        uint8_t bytes[4];
        for (int64_t c = 0; c < 4; ++c) {
          bytes[c] = c < channels ? static_cast<uint8_t>(scale.quantized<1>(*from++)) : static_cast<uint8_t>(scale.zero_point);
        }
        std::memcpy(to + i, bytes, 4);
      }
      return;
    }
    const float* const from = x + at(image, row);
    int64_t i = 0;
    for (; i + W <= width; i += W) words<W>(from + i, to + i);
    for (; i < width; ++i) words<1>(from + i, to + i);
  }

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const uint32_t zero = static_cast<uint32_t>(scale.zero_point) * 0x01010101u;
    std::vector<uint32_t> buffer(std::max(2 * columns, left + width), zero);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = block / rows, i = block % rows;
      for (int64_t dy = 0; dy < 2; ++dy) {
        const int64_t row = 2 * i + dy - top;
        uint8_t* const to = y + block * columns * 16 + dy * 8;
        if (row < 0 || row >= height) {
          for (int64_t j = 0; j < columns; ++j) std::memset(to + j * 16, scale.zero_point, 8);
          continue;
        }
        line<W>(image, row, buffer.data() + left);
        for (int64_t j = 0; j < columns; ++j) std::memcpy(to + j * 16, buffer.data() + 2 * j, 8);
      }
    }
  }
};

struct Dequantize {
  float scale;
  int32_t zero_point;
  const uint8_t* x;
  float* y;
  int64_t n;

  template <int W>
  FASTRES_HD void at(int64_t i) const {
    const Int<W> q = load_bytes_wide<W>(x + i) - zero_point;
    if constexpr (W == 1) {
      y[i] = static_cast<float>(q) * scale;
    } else {
      store<W>(y + i, __builtin_convertvector(q, Float<W>) * scale);
    }
  }

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const int64_t last = end * kBlock < n ? end * kBlock : n;
    int64_t i = begin * kBlock;
    for (; i + W <= last; i += W) at<W>(i);
    for (; i < last; ++i) at<1>(i);
  }
};

struct MaxPool {
  const uint8_t* x;  // [N, H, W, C]
  uint8_t* y;        // [N, P, Q, C]
  int64_t channels, height, width, rows, columns;
  int64_t kernel[2], stride[2], padding[2];

  template <int V>
  FASTRES_HD void largest(const uint8_t* from, int64_t down, int64_t across, uint8_t* to) const {
    typename Bytes<V>::type most = load_bytes<typename Bytes<V>::type>(from);
    for (int64_t r = 0; r < down; ++r) {
      for (int64_t s = 0; s < across; ++s) {
        const auto other = load_bytes<typename Bytes<V>::type>(from + (r * width + s) * channels);
        most = other > most ? other : most;
      }
    }
    std::memcpy(to, &most, sizeof most);
  }

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / rows, top = row % rows * stride[0] - padding[0];
      const int64_t first = top > 0 ? top : 0, low = top + kernel[0] < height ? top + kernel[0] : height;
      for (int64_t q = 0; q < columns; ++q) {
        const int64_t left = q * stride[1] - padding[1];
        const int64_t start = left > 0 ? left : 0, right = left + kernel[1] < width ? left + kernel[1] : width;
        const uint8_t* const from = x + ((image * height + first) * width + start) * channels;
        uint8_t* const to = y + (row * columns + q) * channels;
        int64_t c = 0;
        for (; c + 4 * W <= channels; c += 4 * W) largest<4 * W>(from + c, low - first, right - start, to + c);
        for (; c + W <= channels; c += W) largest<W>(from + c, low - first, right - start, to + c);
        for (; c < channels; ++c) largest<1>(from + c, low - first, right - start, to + c);
      }
    }
  }
};

struct Mean {
  const uint8_t* x;  // [N, pixels, C]
  int64_t channels, pixels, tasks;  // of an image: blocks of kChannels
  double scale;      // of the sum
  int64_t zero_sum;
  float* wide;       // [N, C], or
  uint8_t* y;        // [N, C]
  int32_t y_zero;

  template <int W>
  FASTRES_HD void add(const uint8_t* from, int32_t* to) const {
    Int<W> sum = load_bytes<Int<W>>(to);
    for (int64_t i = 0; i < pixels; ++i) sum += load_bytes_wide<W>(from + i * channels);
    std::memcpy(to, &sum, sizeof sum);
  }

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tasks, first = task % tasks * kChannels;
      const int64_t count = channels - first < kChannels ? channels - first : kChannels;
      const uint8_t* const from = x + image * pixels * channels + first;
      int32_t sums[kChannels] = {};
      int64_t c = 0;
      for (; c + W <= count; c += W) add<W>(from + c, sums + c);
      for (; c < count; ++c) add<1>(from + c, sums + c);
      for (c = 0; c < count; ++c) {
        const double value = static_cast<double>(sums[c] - zero_sum) * scale;
        const int64_t at = image * channels + first + c;
        if (wide != nullptr) {
          wide[at] = static_cast<float>(value);
        } else {
          const double q = std::nearbyint(value) + y_zero;
          y[at] = static_cast<uint8_t>(q < 0 ? 0 : q > 255 ? 255 : q);
        }
      }
    }
  }
};

template <class Kernel>
void launch(const Kernel& kernel, int64_t tasks, int64_t elements) {
  parallel_tasks(tasks, elements, [&](int64_t begin, int64_t end) { run_kernel(kernel, begin, end); });
}

int64_t blocks(int64_t n) { return (n + kBlock - 1) / kBlock; }

bool is_bytes(const Tensor& x) { return x.is_cpu() && x.scalar_type() == ScalarType::Byte && x.numel() > 0; }

OptionalTensor quantize(Tensor x, double scale, int64_t zero_point) {
  if (!x.is_cpu() || !has_kernel_dtype(x) || x.numel() == 0) return std::nullopt;
  const Scale how{static_cast<float>(1.0 / scale), static_cast<int32_t>(zero_point)};
  const auto size = x.sizes();
  const bool images = x.dim() == 4;
  const auto layout = channels_last_of(x);
  const bool flat = images ? layout.value_or(false) : x.is_contiguous();
  if (!flat && !(images && layout.has_value())) return std::nullopt;
  const Tensor y = images ? empty_images(x, {size[1], size[2], size[3]}, aoti_torch_dtype_uint8())
                          : empty_strided(size, x.strides(), aoti_torch_dtype_uint8(), x);
  dispatch_dtype(x, "x", [&](auto t) {
    using T = decltype(t);
    if (flat) return launch(QuantizeFlat<T>{how, input<T>(x), output<uint8_t>(y), x.numel()}, blocks(x.numel()), x.numel());
    const QuantizeRows<T> rows{how, input<T>(x), output<uint8_t>(y), size[1], size[2], size[3]};
    launch(rows, size[0] * size[2], x.numel());
  });
  return y;
}

OptionalTensor quantize_blocks(Tensor x, double scale, int64_t zero_point, std::vector<int64_t> padding, int64_t rows,
                               int64_t columns) {
  const auto layout = channels_last_of(x);
  const bool one = x.dim() == 4 && x.is_contiguous();
  if (!x.is_cpu() || x.scalar_type() != ScalarType::Float || x.numel() == 0 || padding.size() != 2) return std::nullopt;
  if (!(layout.has_value() || one) || x.size(1) > 4) return std::nullopt;
  const Scale how{static_cast<float>(1.0 / scale), static_cast<int32_t>(zero_point)};
  const Tensor y = empty_images(x, {16, rows, columns}, aoti_torch_dtype_uint8());
  const QuantizeBlocks kernel{how, input<float>(x), output<uint8_t>(y), x.size(1), x.size(2), x.size(3), rows, columns,
                              padding[0], padding[1], layout.value_or(false)};
  launch(kernel, x.size(0) * rows, x.size(0) * rows * columns * 16);
  return y;
}

OptionalTensor dequantize(Tensor x, double scale, int64_t zero_point) {
  if (!is_bytes(x) || !has_lasting_strides(x)) return std::nullopt;
  const Tensor y = empty_strided(x.sizes(), x.strides(), aoti_torch_dtype_float32(), x);
  const Dequantize kernel{static_cast<float>(scale), static_cast<int32_t>(zero_point), input<uint8_t>(x), output<float>(y),
                          x.numel()};
  launch(kernel, blocks(x.numel()), x.numel());
  return y;
}

// Dense in channels_last, one pixel or one channel too, whose strides say nothing.
bool is_nhwc(const Tensor& x) {
  if (!is_bytes(x) || x.dim() != 4) return false;
  const auto size = x.sizes(), stride = x.strides();
  const int64_t wanted[4] = {size[1] * size[2] * size[3], 1, size[1] * size[3], size[1]};
  for (int d = 0; d < 4; ++d) {
    if (size[d] > 1 && stride[d] != wanted[d]) return false;
  }
  return true;
}

OptionalTensor max_pool(Tensor x, std::vector<int64_t> window, int64_t p, int64_t q) {
  if (!is_nhwc(x) || window.size() != 6) return std::nullopt;
  const auto size = x.sizes();
  const Tensor y = empty_images(x, {size[1], p, q}, aoti_torch_dtype_uint8());
  const MaxPool kernel{input<uint8_t>(x), output<uint8_t>(y), size[1], size[2], size[3], p, q,
                       {window[0], window[1]}, {window[2], window[3]}, {window[4], window[5]}};
  launch(kernel, size[0] * p, size[0] * p * q * size[1]);
  return y;
}

OptionalTensor mean(Tensor x, double scale, int64_t zero_point, double y_scale, int64_t y_zero_point) {
  if (!is_nhwc(x) || x.size(2) * x.size(3) > (int64_t{1} << 22)) return std::nullopt;
  const auto size = x.sizes();
  const int64_t pixels = size[2] * size[3], tasks = (size[1] + kChannels - 1) / kChannels;
  const bool wide = y_scale == 0;
  const Tensor y = empty_images(x, {size[1], 1, 1}, wide ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8());
  const double each = scale / static_cast<double>(pixels);
  const Mean kernel{input<uint8_t>(x), size[1], pixels, tasks, wide ? each : each / y_scale, pixels * zero_point,
                    wide ? output<float>(y) : nullptr, wide ? nullptr : output<uint8_t>(y),
                    static_cast<int32_t>(y_zero_point)};
  launch(kernel, size[0] * tasks, x.numel());
  return y;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("_quantize_native", TORCH_BOX(&fastres::quantize));
  m.impl("_quantize_blocks_native", TORCH_BOX(&fastres::quantize_blocks));
  m.impl("_dequantize_native", TORCH_BOX(&fastres::dequantize));
  m.impl("_max_pool_int8_native", TORCH_BOX(&fastres::max_pool));
  m.impl("_mean_int8_native", TORCH_BOX(&fastres::mean));
}
