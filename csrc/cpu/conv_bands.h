// Convolutions of any kernel size, stride, padding and dilation by direct products, and the max-pool behind them in the
// same pass: a stem's 7x7 convolution writes a quarter of its pixels, and those that were not kept never leave the cache.
//
// The pixels of x that a band of output rows reads go to L2 with their padding, in planes: those that one tap reads for
// neighboring outputs lie side by side, whatever the stride is. So a tap is a distance, no tap asks where an image ends,
// and a product's rows may run on from one output row into the next; the pixels between are computed and left. Few
// channels stay dense: a row of the kernel is then one tap. A 1x1 convolution reads x itself where it can.
//
// A panel of output channels is multiplied with a band before the next; by tiles, where the weight stays in L2, a block of
// rows with every panel. Threads take bands, or panels where the weight is larger than x. An element is computed alike in
// every case.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv_panels.h"

namespace fastres {

// The inputs that the taps of a window read: input = output * stride + tap * dilation - padding. Those of one remainder
// modulo the stride are a plane.
struct Planes {
  std::vector<int64_t> remainders, plane, offset;  // of the planes; by tap: its plane, and how far on it starts
  int64_t extent = 0;                              // inputs of a plane past the outputs

  explicit Planes(const Window& w) {
    for (int64_t tap = 0; tap < w.size; ++tap) {
      const int64_t remainder = tap * w.dilation % w.stride;
      const auto found = std::find(remainders.begin(), remainders.end(), remainder);
      plane.push_back(found - remainders.begin());
      if (found == remainders.end()) remainders.push_back(remainder);
      offset.push_back(tap * w.dilation / w.stride);
      extent = std::max(extent, offset.back());
    }
  }
  int64_t count() const { return static_cast<int64_t>(remainders.size()); }
};

namespace {

// The larger of two, NaN before everything, as in torch's max_pool2d. By a mask: gcc 12 takes a choice between vectors
// apart, number by number, unless it is a maximum.
template <int W>
FASTRES_HD Float<W> larger(Float<W> a, Float<W> b) {
  const Float<W> most = activate(a, b);
  if constexpr (W == 1) {
    return b != b ? b : most;
  } else {
    const Int<W> nan = b != b;
    return bit_cast<Float<W>>((bit_cast<Int<W>>(b) & nan) | (bit_cast<Int<W>>(most) & ~nan));
  }
}

// Rows [begin, end) of the pooled image from rows of the convolution, which are in a ring.
template <class T>
struct MaxPool {
  Convolution shape;
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

}  // namespace

constexpr int64_t kBandBytes = 3 << 17;  // of a band's planes: a part of an L2 cache
constexpr int64_t kSlack = 16;           // words behind planes that a dense tap reads, times zeros

template <class Operands, class T>
class Bands {
 public:
  Bands(const Convolution& shape, const T* x, const float* u, const Epilogue<T>& epilogue)
      : shape_(shape), x_(x), u_(u), epilogue_(epilogue), down_(shape.down), across_(shape.across),
        depth_(shape.channels, shape.down.size, shape.across.size, shape.is_dense()) {
    const int64_t element = sizeof(typename Operands::Element);
    const Window& a = shape.across;
    if (shape.is_dense()) {
      pixel_ = depth_.pixel;
      step_ = a.stride * pixel_;
      pitch_ = (((shape.columns - 1) * a.stride + a.span()) + a.stride - 1) / a.stride;
    } else {
      pixel_ = step_ = Operands::kStep == 1 ? spread(shape.channels) : depth_.tap;
      if (pixel_ >= 128) pixel_ = step_ = spread(pixel_);
      pitch_ = shape.columns + across_.extent;
    }
    const bool plain = shape.down.size == 1 && a.size == 1 && shape.down.stride == 1 && a.stride == 1 &&
                       shape.down.padding == 0 && a.padding == 0 && shape.pool.size == 0;
    in_place_ = plain && std::is_same_v<T, typename Operands::Element> && shape.channels == depth_.tap * Operands::kGroup &&
                (Operands::kStep > 1 || shape.channels % 256 != 0);  // lines of rows a power of two apart share few sets
    if (in_place_) step_ = shape.channels * element / 4;
  }

  void operator()(const Tensor& like) const {
    const int64_t workers = std::max<int64_t>(1, torch::stable::get_num_threads());
    if (shape_.pool.size > 0) return pooled(workers, like);
    if (in_place_) return multiply_in_place(workers, like);
    const int64_t room = words(shape_.rows), most = kBandBytes / 4, weight = panels() * depth_.taps * depth_.tap * panel_width();
    const bool by_panels = workers > 1 && weight > shape_.batch * room && panels() >= workers;
    const int64_t share = by_panels ? shape_.batch : (shape_.batch + workers - 1) / workers;
    const int64_t images = std::clamp<int64_t>(most / room, 1, share);  // of a band
    int64_t height = shape_.rows;
    if (images == 1) {
      const int64_t parts = by_panels ? 1 : (workers + shape_.batch - 1) / shape_.batch;  // so that each worker has some
      const int64_t fit = std::max<int64_t>(1, most / row() / planes() - down_.extent);
      const int64_t count = std::max(parts, (shape_.rows + fit - 1) / fit);
      height = (shape_.rows + count - 1) / count;
    }
    const int64_t tall = (shape_.rows + height - 1) / height, bands = (shape_.batch + images - 1) / images * tall;
    const int64_t chunks = by_panels || bands < workers ? std::min(panels(), (workers + bands - 1) / bands) : 1;
    const std::vector<int64_t> taps = taps_for(height);
    const Scratch scratch(workers * images * words(height) + tail(), like);
    parallel_workers(workers, chunks * bands, [&](int64_t worker, int64_t begin, int64_t end) {
      float* const v = scratch.data() + worker * images * words(height);
      std::vector<Piece> pieces;
      int64_t ready = -1;
      for (int64_t at = begin; at < end; ++at) {
        const int64_t chunk = at / bands, band = at % bands, first = band % tall * height;
        if (band != ready) {
          ready = band;
          pieces.clear();
          const int64_t low = band / tall * images, high = std::min(shape_.batch, low + images);
          for (int64_t n = low; n < high; ++n) {
            const int64_t count = std::min(height, shape_.rows - first);
            if (count <= 0) break;
            float* const to = v + (n - low) * words(height);
            fill(n, first, count, height, to);
            pieces.push_back(piece(to, count, (n * shape_.rows + first) * shape_.columns));
          }
        }
        multiply(pieces, taps, epilogue_, panels() * chunk / chunks, panels() * (chunk + 1) / chunks);
      }
    });
  }

 private:
  // ---- sizes, in words
  int64_t panels() const { return (shape_.outputs + panel_width() - 1) / panel_width(); }
  int64_t planes() const { return down_.count() * (shape_.is_dense() ? 1 : across_.count()); }
  int64_t row() const { return pitch_ * step_; }
  int64_t plane(int64_t height) const { return (height + down_.extent) * row(); }
  int64_t words(int64_t height) const { return planes() * plane(height) + kSlack; }
  int64_t tail() const { return 32 * step_ + depth_.tap; }  // that tiles read past the last row

  std::vector<int64_t> taps_for(int64_t height) const {
    std::vector<int64_t> taps;
    const bool dense = shape_.is_dense();
    for (int64_t r = 0; r < shape_.down.size; ++r) {
      for (int64_t s = 0; s < (dense ? 1 : shape_.across.size); ++s) {
        const int64_t at = dense ? down_.plane[r] : down_.plane[r] * across_.count() + across_.plane[s];
        taps.push_back(at * plane(height) + down_.offset[r] * row() + (dense ? 0 : across_.offset[s] * pixel_));
      }
    }
    return taps;
  }

  // The planes of output rows [first, first + count) of an image.
  void fill(int64_t n, int64_t first, int64_t count, int64_t height, float* v) const {
    const bool dense = shape_.is_dense();
    const T* const image = x_ + n * shape_.height * shape_.width * shape_.channels;
    const Window &d = shape_.down, &a = shape_.across;
    for (int64_t i = 0; i < planes(); ++i) {
      const int64_t across = dense ? 1 : across_.count();
      const int64_t from_x = (dense ? 0 : across_.remainders[i % across]) - a.padding, stride = dense ? 1 : a.stride;
      const int64_t length = dense ? pitch_ * a.stride : pitch_;  // pixels of a row
      const int64_t low = std::clamp<int64_t>((-from_x + stride - 1) / stride, 0, length);
      const int64_t high = std::clamp<int64_t>((shape_.width - from_x + stride - 1) / stride, low, length);
      for (int64_t p = 0; p < count + down_.extent; ++p) {
        const int64_t y = (first + p) * d.stride + down_.remainders[i / across] - d.padding;
        float* const to = v + i * plane(height) + p * row();
        if (y < 0 || y >= shape_.height || low == high) {
          std::memset(to, 0, row() * 4);
          continue;
        }
        std::memset(to, 0, low * pixel_ * 4);
        std::memset(to + high * pixel_, 0, (length - high) * pixel_ * 4);
        const T* const from = image + (y * shape_.width + low * stride + from_x) * shape_.channels;
        copy(from, to + low * pixel_, high - low, stride * shape_.channels);
      }
      std::memset(v + i * plane(height) + (count + down_.extent) * row(), 0, kSlack * 4);
    }
  }

  void copy(const T* from, float* to, int64_t pixels, int64_t from_stride) const {
    const int64_t depth = shape_.is_dense() ? depth_.pixel : depth_.tap;
    const bool solid = from_stride == shape_.channels && pixel_ * Operands::kGroup == shape_.channels;
    if (solid) {
      run_kernel(CopyPixels<Operands, T>{from, to, 0, 0, pixels * shape_.channels, pixels * pixel_}, 0, 1);
    } else {
      run_kernel(CopyPixels<Operands, T>{from, to, from_stride, pixel_, shape_.channels, depth}, 0, pixels);
    }
  }

  // The rows of `count` output rows: in one run, or line by line where that is less work.
  Piece piece(const float* v, int64_t count, int64_t at) const {
    const int64_t run = (count - 1) * pitch_ + shape_.columns;
    if (count * work(shape_.columns) < work(run)) return {v, count, row(), shape_.columns, at, shape_.columns, shape_.columns};
    return {v, 1, 0, run, at, pitch_, shape_.columns};
  }

  static int64_t work(int64_t rows) {  // of a product with so many rows, in blocks
    if (has_tiles<Operands>()) return rows / 32 * 4 + (rows % 32 > 16 ? 4 : rows % 32 > 0 ? 3 : 0);
    const int64_t block = panel_width() == kPanel<16> ? kRows<16> : kNarrowRows;
    return (rows + block - 1) / block;
  }

  // A 1x1 convolution of x as it is: pixels are rows. Tiles read whole blocks: the last pixels are copied.
  void multiply_in_place(int64_t workers, const Tensor& like) const {
    const int64_t pixels = shape_.batch * shape_.rows * shape_.columns;
    const int64_t weight = panels() * depth_.tap * panel_width();
    const bool by_panels = workers > 1 && weight > pixels * step_ && panels() >= workers;
    const int64_t share = by_panels ? pixels : (pixels + workers - 1) / workers;
    // A band of x and y that stays near, the larger the more there is to read of the weight for it.
    const int64_t size = step_ * 4 + shape_.outputs * static_cast<int64_t>(sizeof(T));
    const int64_t fit = std::max<int64_t>(64, std::clamp<int64_t>(8 * weight, 1 << 17, 2 * kBandBytes) / size);
    const int64_t parts = (share + fit - 1) / fit;
    const bool whole = has_tiles<Operands>();
    const int64_t even = (share + parts - 1) / parts, band = whole ? (even + 31) / 32 * 32 : even, bands = (pixels + band - 1) / band;
    const int64_t chunks = by_panels || bands < workers ? std::min(panels(), (workers + bands - 1) / bands) : 1;
    const int64_t room = 32 * step_;
    const std::vector<int64_t> taps{0};
    const Scratch scratch(whole ? workers * room : 0, like);
    const float* const v = reinterpret_cast<const float*>(x_);
    parallel_workers(workers, chunks * bands, [&](int64_t worker, int64_t begin, int64_t end) {
      std::vector<Piece> pieces;
      for (int64_t at = begin; at < end; ++at) {
        const int64_t chunk = at / bands, first = at % bands * band, count = std::min(band, pixels - first);
        const int64_t rest = whole && first + count == pixels ? count % 16 : 0, direct = count - rest;
        pieces.clear();
        if (direct > 0) pieces.push_back({v + first * step_, 1, 0, direct, first, direct, direct, true});
        if (rest > 0) {
          float* const to = scratch.data() + worker * room;
          std::memcpy(to, v + (first + direct) * step_, rest * step_ * 4);
          pieces.push_back({to, 1, 0, rest, first + direct, rest, rest});
        }
        multiply(pieces, taps, epilogue_, panels() * chunk / chunks, panels() * (chunk + 1) / chunks);
      }
    });
  }

  // Threads take pooled rows, of which neighbors share rows of the convolution: kept in a ring.
  void pooled(int64_t workers, const Tensor& like) const {
    const Pool pool = shape_.pool;
    const int64_t ring_rows = pool.size + 4 * pool.stride, wide = spread(shape_.columns * shape_.outputs + 16);
    const int64_t ring = spread(ring_rows * shape_.columns * shape_.outputs + 16);
    const int64_t room = words(ring_rows) + ring + wide;
    const std::vector<int64_t> taps = taps_for(ring_rows);
    const Scratch scratch(workers * room + tail(), like);
    parallel_workers(workers, shape_.batch * shape_.out_rows, [&](int64_t worker, int64_t begin, int64_t end) {
      float* const kept = scratch.data() + worker * room;
      float* const v = kept + ring + wide;  // tiles read past its last row
      Epilogue<float> to_ring{epilogue_.scale, epilogue_.bias, nullptr, kept, epilogue_.act};
      std::vector<Piece> pieces;
      int64_t image = -1, done = 0;  // rows of the convolution before it are in the ring, or no longer needed
      for (int64_t at = begin; at < end; ++at) {
        const int64_t n = at / shape_.out_rows, p = at % shape_.out_rows;
        const int64_t low = std::max<int64_t>(0, p * pool.stride - pool.padding);
        const int64_t high = std::min(shape_.rows, p * pool.stride - pool.padding + pool.size);
        if (n != image) image = n, done = low;
        const int64_t last = std::min(shape_.out_rows - 1, p + end - 1 - at);  // the worker's, of this image
        const int64_t ahead = std::min(last * pool.stride - pool.padding + pool.size, low + ring_rows);
        for (done = std::max(done, low); done < high;) {  // as many as have room
          const int64_t slot = done % ring_rows;
          const int64_t count = std::min(std::min(shape_.rows, std::max(high, ahead)) - done, ring_rows - slot);
          fill(n, done, count, ring_rows, v);
          pieces.assign(1, piece(v, count, slot * shape_.columns));
          multiply(pieces, taps, to_ring, 0, panels());
          done += count;
        }
        T* const to = epilogue_.y + n * shape_.out_rows * shape_.out_columns * shape_.outputs;
        run_kernel(MaxPool<T>{shape_, kept, kept + ring, ring_rows, to}, p, p + 1);
      }
    });
  }

  template <class To>
  void multiply(const std::vector<Piece>& pieces, const std::vector<int64_t>& taps, const Epilogue<To>& to, int64_t begin,
                int64_t end) const {
    const auto count = static_cast<int64_t>(taps.size());
    run_kernel(Multiply<Operands, To>{pieces, u_, taps.data(), to, count, depth_.tap, step_, shape_.outputs}, begin, end);
  }

  Convolution shape_;
  const T* x_;
  const float* u_;
  Epilogue<T> epilogue_;
  Planes down_, across_;
  Depth<Operands> depth_;
  int64_t pixel_, step_, pitch_;  // words of a pixel in a plane, to the next output's, and how many of these a row has
  bool in_place_;
};

}  // namespace fastres
