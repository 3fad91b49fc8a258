// Convolutions of any kernel size, stride, padding and dilation by direct products, and the max-pool behind them in the
// same pass: a stem's 7x7 convolution writes a quarter of its pixels, and those that were not kept never leave the cache.
//
// The rows of x that a band of output rows reads are widened to fp32 in L2 with their padding, so that no tap asks where
// an image ends. A row of a kernel is one tap where its pixels lie side by side (few channels), else each of its pixels is.
// A panel of output channels is multiplied with a band before the next. Threads take bands, or panels where one band has
// all of x. An element is computed alike in every case.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/conv.h"

namespace fastres {
namespace {

struct Window {  // along one dimension
  int64_t size, stride, padding, dilation;

  int64_t span() const { return (size - 1) * dilation + 1; }
  int64_t outputs(int64_t inputs) const { return (inputs + 2 * padding - span()) / stride + 1; }
};

struct Pool {
  int64_t size, stride, padding;  // size 0: none
};

struct Direct {
  int64_t batch, channels, height, width, outputs;
  Window down, across;
  int64_t rows, columns;  // of the convolution
  Pool pool;
  int64_t out_rows, out_columns;  // of the output: pooled, perhaps

  // ---- the widened rows: [rows, padded width], a pixel every `pixel` floats, the last of them cut off
  bool is_dense() const { return across.dilation == 1 && channels < 16; }  // a row of the kernel is one tap
  int64_t pixel() const { return is_dense() ? channels : spread(channels); }
  int64_t padded() const { return (columns - 1) * across.stride + across.span(); }
  int64_t row() const { return spread(padded() * pixel()); }
  int64_t band(int64_t count) const { return (count - 1) * down.stride + down.span(); }  // of x, for so many rows
};

// Rows [begin, end) of x, of which 0 is the image's first and others may be padding, to v: [row - first, padded, pixel].
template <class T>
struct Widen {
  Direct shape;
  const T* image;
  float* v;
  int64_t first;

  template <int W>
  FASTRES_HD void copy(const T* from, float* to, int64_t count) const {
    int64_t c = 0;
    for (; c + W <= count; c += W) store<W>(to + c, load<W>(from + c));
    for (; c < count; ++c) to[c] = load<1>(from + c);
  }

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const int64_t pixel = shape.pixel(), channels = shape.channels, padded = shape.padded(), left = shape.across.padding;
    const int64_t inside = std::max<int64_t>(0, std::min(shape.width, padded - left));
    for (int64_t y = begin; y < end; ++y) {
      float* const to = v + (y - first) * shape.row();
      const bool outside = y < 0 || y >= shape.height;
      const int64_t before = outside ? padded : std::min(left, padded), after = std::min(padded, left + inside);
      std::memset(to, 0, before * pixel * sizeof(float));
      if (outside) continue;
      std::memset(to + after * pixel, 0, (padded - after) * pixel * sizeof(float));
      const T* const from = image + y * shape.width * channels;
      if (pixel == channels) {
        copy<W>(from, to + left * pixel, inside * channels);
      } else {
        for (int64_t x = 0; x < inside; ++x) copy<W>(from + x * channels, to + (left + x) * pixel, channels);
      }
    }
  }
};

// Output rows [first, first + count) of an image: its products with panels [begin, end), to y at the pixel `at`.
template <class T>
struct Multiply {
  Direct shape;
  const float* v;  // the widened rows, from that of the first output row on
  const float* u;  // [panels, R * S, C, 2 W]
  const int64_t* taps;  // from v to each tap
  Epilogue<T> epilogue;
  int64_t count, at;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const bool dense = shape.is_dense();
    const int64_t tap_count = dense ? shape.down.size : shape.down.size * shape.across.size;
    const int64_t depth = dense ? shape.across.size * shape.channels : shape.channels, stride = shape.across.stride;
    const int64_t size = tap_count * depth * kPanel<W>;
    const bool streamed = size * (end - begin) * 4 > kStreamedBytes;
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* const own = u + panel * size;
      const char* next = streamed && panel + 1 < end ? reinterpret_cast<const char*>(own + size) : nullptr;
      for (int64_t p = 0; p < count; ++p, next = nullptr) {
        const float* const from = v + p * shape.down.stride * shape.row();
        const ToImage<T> to{epilogue, at + p * shape.columns, shape.outputs, panel * kPanel<W>};
        const Panel rows{from, stride * shape.pixel(), own, depth, next, kPanel<W> * 4, taps, tap_count};
        product<W>(rows, shape.columns, to);
      }
    }
  }
};

// The larger of two, NaN before everything, as in torch's max_pool2d.
template <int W>
FASTRES_HD Float<W> larger(Float<W> a, Float<W> b) {
  const Float<W> most = b > a ? b : a;
  return b != b ? b : most;
}

// Rows [begin, end) of the pooled image from rows of the convolution, which are in a ring.
template <class T>
struct MaxPool {
  Direct shape;
  const float* ring;  // [ring_rows, columns, K]
  float* row;         // [columns, K]
  int64_t ring_rows;
  T* image;

  template <int W>
  FASTRES_HD void down(int64_t low, int64_t high) const {
    const int64_t size = shape.columns * shape.outputs;
    const float* const first = ring + low % ring_rows * size;
    for (int64_t i = 0; i < size; i += W) store<W>(row + i, load<W>(first + i));
    for (int64_t p = low + 1; p < high; ++p) {
      const float* const other = ring + p % ring_rows * size;
      for (int64_t i = 0; i < size; i += W) store<W>(row + i, larger<W>(load<W>(row + i), load<W>(other + i)));
    }
  }

  template <int W>
  FASTRES_HD void across(T* to, int64_t k, int64_t low, int64_t high) const {
    Float<W> most = load<W>(row + low * shape.outputs + k);
    for (int64_t q = low + 1; q < high; ++q) most = larger<W>(most, load<W>(row + q * shape.outputs + k));
    store<W>(to + k, most);
  }

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const Pool pool = shape.pool;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t top = p * pool.stride - pool.padding;
      down<W>(std::max<int64_t>(0, top), std::min(shape.rows, top + pool.size));
      for (int64_t q = 0; q < shape.out_columns; ++q) {
        const int64_t left = q * pool.stride - pool.padding;
        const int64_t low = std::max<int64_t>(0, left), high = std::min(shape.columns, left + pool.size);
        T* const to = image + (p * shape.out_columns + q) * shape.outputs;
        int64_t k = 0;
        for (; k + W <= shape.outputs; k += W) across<W>(to, k, low, high);
        for (; k < shape.outputs; ++k) across<1>(to, k, low, high);
      }
    }
  }
};

constexpr int64_t kBandBytes = 3 << 16;  // of widened rows: a part of an L2 cache
constexpr int64_t kAllBytes = 1 << 20;   // of all rows of x, where threads take panels

template <class T>
class Run {
 public:
  Run(const Direct& shape, const T* x, const float* u, const Epilogue<T>& epilogue)
      : shape_(shape), x_(x), u_(u), epilogue_(epilogue) {
    for (int64_t r = 0; r < shape.down.size; ++r) {
      for (int64_t s = 0; s < (shape.is_dense() ? 1 : shape.across.size); ++s) {
        taps_.push_back(r * shape.down.dilation * shape.row() + s * shape.across.dilation * shape.pixel());
      }
    }
  }

  void operator()(const Tensor& like) const {
    const int64_t workers = std::max<int64_t>(1, torch::stable::get_num_threads());
    if (shape_.pool.size > 0) return pooled(workers, like);
    const int64_t all = shape_.batch * shape_.band(shape_.rows) * shape_.row();
    if (workers > 1 && all * 4 <= kAllBytes && panels() >= workers) return by_panels(workers, like, all);
    by_bands(workers, like);
  }

 private:
  int64_t panels() const { return (shape_.outputs + panel_width() - 1) / panel_width(); }
  const T* image(int64_t n) const { return x_ + n * shape_.height * shape_.width * shape_.channels; }

  void widen(int64_t n, int64_t first, int64_t count, float* v) const {  // for output rows from `first` on
    const int64_t top = first * shape_.down.stride - shape_.down.padding;
    run_kernel(Widen<T>{shape_, image(n), v, top}, top, top + shape_.band(count));
  }

  // Threads take bands of output rows, through all panels.
  void by_bands(int64_t workers, const Tensor& like) const {
    const int64_t fit = (kBandBytes / 4 / shape_.row() - shape_.down.span()) / shape_.down.stride + 1;
    const int64_t most = std::clamp<int64_t>(fit, 1, shape_.rows);
    const int64_t bands = (shape_.rows + most - 1) / most, height = (shape_.rows + bands - 1) / bands;
    const int64_t room = shape_.band(height) * shape_.row();
    const Scratch scratch(workers * room, like);
    parallel_workers(workers, shape_.batch * bands, [&](int64_t worker, int64_t begin, int64_t end) {
      float* const v = scratch.data() + worker * room;
      for (int64_t at = begin; at < end; ++at) {
        const int64_t n = at / bands, first = at % bands * height, count = std::min(height, shape_.rows - first);
        if (count <= 0) continue;
        widen(n, first, count, v);
        multiply(v, epilogue_, count, (n * shape_.rows + first) * shape_.columns, 0, panels());
      }
    });
  }

  // Threads take panels, through all images.
  void by_panels(int64_t workers, const Tensor& like, int64_t all) const {
    const Scratch scratch(all, like);
    float* const v = scratch.data();
    const int64_t rows = shape_.band(shape_.rows), room = rows * shape_.row();
    parallel_workers(workers, shape_.batch * rows, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t n = at / rows, low = at % rows, high = std::min(rows, low + end - at), top = -shape_.down.padding;
        run_kernel(Widen<T>{shape_, image(n), v + n * room, top}, top + low, top + high);
        at += high - low;
      }
    });
    parallel_workers(workers, panels(), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t n = 0; n < shape_.batch; ++n) {
          multiply(v + n * room, epilogue_, shape_.rows, n * shape_.rows * shape_.columns, panel, panel + 1);
        }
      }
    });
  }

  // Threads take pooled rows, of which neighbors share rows of the convolution: kept in a ring.
  void pooled(int64_t workers, const Tensor& like) const {
    const Pool pool = shape_.pool;
    const int64_t ring_rows = pool.size + pool.stride, wide = spread(shape_.columns * shape_.outputs);
    const int64_t rows = shape_.band(ring_rows) * shape_.row(), ring = spread(ring_rows * shape_.columns * shape_.outputs + 16);
    const int64_t room = rows + ring + wide + 16;
    const Scratch scratch(workers * room, like);
    parallel_workers(workers, shape_.batch * shape_.out_rows, [&](int64_t worker, int64_t begin, int64_t end) {
      float* const v = scratch.data() + worker * room;
      Epilogue<float> to_ring{epilogue_.scale, epilogue_.bias, nullptr, v + rows, epilogue_.act};
      int64_t image = -1, done = 0;  // rows of the convolution before it are in the ring, or no longer needed
      for (int64_t at = begin; at < end; ++at) {
        const int64_t n = at / shape_.out_rows, p = at % shape_.out_rows;
        const int64_t low = std::max<int64_t>(0, p * pool.stride - pool.padding);
        const int64_t high = std::min(shape_.rows, p * pool.stride - pool.padding + pool.size);
        if (n != image) image = n, done = low;
        for (done = std::max(done, low); done < high;) {
          const int64_t slot = done % ring_rows, count = std::min(high - done, ring_rows - slot);
          widen(n, done, count, v);
          multiply(v, to_ring, count, slot * shape_.columns, 0, panels());
          done += count;
        }
        T* const to = epilogue_.y + n * shape_.out_rows * shape_.out_columns * shape_.outputs;
        run_kernel(MaxPool<T>{shape_, v + rows, v + rows + ring, ring_rows, to}, p, p + 1);
      }
    });
  }

  template <class To>
  void multiply(const float* v, const Epilogue<To>& to, int64_t count, int64_t at, int64_t begin, int64_t end) const {
    run_kernel(Multiply<To>{shape_, v, u_, taps_.data(), to, count, at}, begin, end);
  }

  Direct shape_;
  const T* x_;
  const float* u_;
  Epilogue<T> epilogue_;
  std::vector<int64_t> taps_;
};

// ---- operators -------------------------------------------------------------------------------------------------------

Tensor conv_direct_pack(Tensor weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && has_kernel_dtype(weight), "weight: got shape ",
                  shape_string(weight), ", expected [K, C, R, S] of a kernel's dtype on a CPU");
  const int64_t outputs = weight.size(0), channels = weight.size(1), across = weight.size(3), taps = weight.size(2) * across;
  const int64_t width = panel_width(), panels = (outputs + width - 1) / width;
  const int64_t sizes[] = {panels, taps, channels, width};
  const int64_t strides[] = {taps * channels * width, channels * width, width, 1};
  const Tensor u = empty_strided({sizes, 4}, {strides, 4}, aoti_torch_dtype_float32(), weight);
  const auto stride = weight.strides();
  dispatch_dtype(weight, "weight", [&](auto t) {
    using T = decltype(t);
    const T* const w = input<T>(weight);
    float* const to = output<float>(u);
    parallel_tasks(panels, panels * taps * channels * width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * taps * channels; row < end * taps * channels; ++row) {
        const int64_t panel = row / (taps * channels), tap = row / channels % taps, c = row % channels;
        const T* const from = w + c * stride[1] + tap / across * stride[2] + tap % across * stride[3];
        for (int64_t j = 0; j < width; ++j) {
          const int64_t k = panel * width + j;
          to[row * width + j] = k < outputs ? load<1>(from + k * stride[0]) : 0.0f;
        }
      }
    });
  });
  return u;
}

// where: kernel, stride, padding, dilation, two numbers each; pool: kernel, stride, padding, or empty.
Direct checked_shape(const Tensor& x, const Tensor& u, int64_t outputs, const std::vector<int64_t>& where,
                     const std::vector<int64_t>& pool) {
  check_images(x);
  STD_TORCH_CHECK(where.size() == 8 && (pool.empty() || pool.size() == 3), "where, pool: got ", where.size(), " and ",
                  pool.size(), " numbers, expected 8 and none or 3");
  const Window down{where[0], where[2], where[4], where[6]}, across{where[1], where[3], where[5], where[7]};
  for (const Window& w : {down, across}) {
    STD_TORCH_CHECK(w.size > 0 && w.stride > 0 && w.padding >= 0 && w.dilation > 0,
                    "where: expected positive kernel sizes, strides and dilations, and no negative padding");
  }
  STD_TORCH_CHECK(is_packed(u, x.size(1), outputs) && u.size(1) == down.size * across.size, "u: got shape ",
                  shape_string(u), ", expected a weight that _conv_direct_pack made, of ", down.size, "x", across.size,
                  " for ", x.size(1), " and ", outputs, " channels");
  Direct shape{x.size(0), x.size(1), x.size(2), x.size(3), outputs, down, across};
  const bool fits = x.size(2) + 2 * down.padding >= down.span() && x.size(3) + 2 * across.padding >= across.span();
  STD_TORCH_CHECK(fits, "x: got shape ", shape_string(x), ", too small for the kernel");
  shape.rows = shape.out_rows = down.outputs(x.size(2));
  shape.columns = shape.out_columns = across.outputs(x.size(3));
  if (!pool.empty()) {
    shape.pool = {pool[0], pool[1], pool[2]};
    const bool valid = pool[0] > 0 && pool[1] > 0 && pool[2] >= 0 && 2 * pool[2] <= pool[0];
    STD_TORCH_CHECK(valid && std::min(shape.rows, shape.columns) + 2 * pool[2] >= pool[0],
                    "pool: expected a window, stride and padding (at most half the window) that fit the convolution's output");
    const Window window{pool[0], pool[1], pool[2], 1};
    shape.out_rows = window.outputs(shape.rows);
    shape.out_columns = window.outputs(shape.columns);
  }
  return shape;
}

Tensor conv_direct_into(Tensor x, Tensor u, OptionalTensor bias, OptionalTensor residual, OptionalTensor scale,
                        int64_t outputs, std::vector<int64_t> where, std::vector<int64_t> pool, std::string act, Tensor y) {
  const Direct shape = checked_shape(x, u, outputs, where, pool);
  check_output(y, x, {outputs, shape.out_rows, shape.out_columns});
  STD_TORCH_CHECK(!residual || pool.empty(), "residual: expected none before a pool");
  const After after(y, bias, residual, scale, act);
  if (y.numel() == 0) return y;
  dispatch_dtype(x, "x", [&](auto t) {
    using T = decltype(t);
    Run<T>(shape, input<T>(x), input<float>(u), after.template epilogue<T>(y))(x);
  });
  return y;
}

Tensor conv_direct(Tensor x, Tensor u, OptionalTensor bias, OptionalTensor residual, OptionalTensor scale, int64_t outputs,
                   std::vector<int64_t> where, std::vector<int64_t> pool, std::string act) {
  const Direct shape = checked_shape(x, u, outputs, where, pool);
  const Tensor y = empty_images(x, {outputs, shape.out_rows, shape.out_columns});
  return conv_direct_into(x, u, bias, residual, scale, outputs, where, pool, act, y);
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("_conv_direct_pack_native", TORCH_BOX(&fastres::conv_direct_pack));
  m.impl("_conv_direct_native", TORCH_BOX(&fastres::conv_direct));
  m.impl("_conv_direct_into_native", TORCH_BOX(&fastres::conv_direct_into));
}
