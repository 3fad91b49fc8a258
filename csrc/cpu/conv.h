// What the CPU convolutions share: their images and what follows the products, the width of a panel of their weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/conv_epilogue.h"
#include "cpu/product.h"
#include "tensor.h"

namespace fastres {

constexpr int64_t kStreamedBytes = 1 << 20;  // of a weight: more does not stay in L2 and is fetched ahead

inline int64_t panel_width() {
  const Isa isa = runtime_isa();
  return isa >= Isa::kAvx512 ? kPanel<16> : isa == Isa::kAvx2 ? kPanel<8> : kPanel<4>;
}

// An odd number of lines: rows and taps a power of two apart would share a few sets of the cache.
FASTRES_HD int64_t spread(int64_t floats) { return ((floats + 15) / 16 | 1) * 16; }

// [K] of any kernel dtype as fp32.
inline std::vector<float> widened(const OptionalTensor& t) {
  std::vector<float> wide;
  if (!t) return wide;
  wide.resize(t->size(0));
  dispatch_dtype(*t, "bias", [&](auto zero) {
    using T = decltype(zero);
    for (int64_t k = 0; k < t->size(0); ++k) wide[k] = load<1>(input<T>(*t) + k);
  });
  return wide;
}

inline bool is_nhwc(const Tensor& t) {  // the strides of dimensions of size 1 say nothing
  const auto size = t.sizes(), stride = t.strides();
  const int64_t expected[] = {size[1] * size[2] * size[3], 1, size[1] * size[3], size[1]};
  for (int d = 0; d < 4; ++d) {
    if (size[d] > 1 && stride[d] != expected[d]) return false;
  }
  return true;
}

inline void check_images(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && has_kernel_dtype(x) && is_nhwc(x), "x: got shape ", shape_string(x),
                  ", expected [N, C, H, W] in channels_last, of a kernel's dtype, on a CPU");
}

// Whether u is [panels, taps, C, panel] for so many channels on this machine.
inline bool is_packed(const Tensor& u, int64_t channels, int64_t outputs) {
  return u.is_cpu() && u.scalar_type() == ScalarType::Float && u.dim() == 4 && u.is_contiguous() &&
         u.size(2) == channels && u.size(3) == panel_width() && outputs > (u.size(0) - 1) * u.size(3) &&
         outputs <= u.size(0) * u.size(3);
}

struct ImageSize {
  int64_t channels, height, width;
};

// As many as x has, in channels_last, uninitialized.
inline Tensor empty_images(const Tensor& x, ImageSize size, int32_t dtype) {
  const int64_t sizes[] = {x.size(0), size.channels, size.height, size.width};
  const int64_t row = size.width * size.channels, strides[] = {size.height * row, 1, row, size.channels};
  return empty_strided({sizes, 4}, {strides, 4}, dtype, x);
}

inline Tensor empty_images(const Tensor& x, ImageSize size) { return empty_images(x, size, dtype_of(x)); }

inline void check_output(const Tensor& y, const Tensor& x, ImageSize size) {
  check_images(y);
  const bool fits = y.scalar_type() == x.scalar_type() && y.size(0) == x.size(0) && y.size(1) == size.channels &&
                    y.size(2) == size.height && y.size(3) == size.width;
  STD_TORCH_CHECK(fits, "y: got shape ", shape_string(y), ", expected [", x.size(0), ", ", size.channels, ", ", size.height,
                  ", ", size.width, "] of x's dtype");
}

// Memory of torch's allocator that goes back to a pool: fresh pages from the system take longer than a small convolution.
// The pool keeps at most kKeptBytes; calls at the same time have a piece each.
class Scratch {
 public:
  Scratch(int64_t floats, const Tensor& like) {
    if (floats == 0) return;
    {
      const std::lock_guard<std::mutex> lock(pool().mutex);
      auto& free = pool().free;
      const auto fits = [&](const Tensor& t) { return t.numel() >= floats; };
      const auto found = std::find_if(free.begin(), free.end(), fits);
      if (found != free.end()) {
        memory_ = std::move(*found);
        free.erase(found);
        return;
      }
    }
    const int64_t one = 1;
    memory_ = empty_strided({&floats, 1}, {&one, 1}, aoti_torch_dtype_float32(), like);
  }
  ~Scratch() {
    if (!memory_) return;
    const std::lock_guard<std::mutex> lock(pool().mutex);
    auto& free = pool().free;
    const auto larger = [](const Tensor& a, const Tensor& b) { return a.numel() < b.numel(); };
    free.insert(std::upper_bound(free.begin(), free.end(), *memory_, larger), *memory_);
    int64_t kept = 0;
    for (const Tensor& t : free) kept += t.numel() * 4;
    for (; kept > kKeptBytes; free.erase(free.begin())) kept -= free.front().numel() * 4;  // small ones are made soon
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return memory_ ? output<float>(*memory_) : nullptr; }

 private:
  static constexpr int64_t kKeptBytes = 32 << 20;
  struct Pool {
    std::mutex mutex;
    std::vector<Tensor> free;  // the smallest first
  };
  static Pool& pool() {
    static Pool* const pool = new Pool;  // outlives threads that end after main
    return *pool;
  }
  OptionalTensor memory_;
};

// What follows a convolution, checked against its output and widened.
class After {
 public:
  After(const Tensor& y, const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& scale,
        const std::string& act)
      : bias_(bias), residual_(residual), scale_(scale), act_(act_index(act)) {
    const int64_t outputs = y.size(1);
    STD_TORCH_CHECK(is_per_channel(bias, outputs, y, true) && is_per_channel(scale, outputs, y, true),
                    "bias, scale: expected ", outputs, " contiguous numbers");
    STD_TORCH_CHECK(act_ >= 0, "act: got ", act, ", expected none, relu, relu6 or hardswish");
    if (residual) {
      const auto got = residual->sizes(), wanted = y.sizes();
      const bool fits = residual->is_cpu() && residual->dim() == 4 && std::equal(got.begin(), got.end(), wanted.begin()) &&
                        residual->scalar_type() == y.scalar_type() && is_nhwc(*residual);
      STD_TORCH_CHECK(fits, "residual: got shape ", shape_string(*residual), ", expected ", shape_string(y),
                      " of x's dtype, in channels_last");
    }
    wide_bias_ = widened(bias);
    wide_scale_ = widened(scale);
  }

  template <class T>
  Epilogue<T> epilogue(const Tensor& y) const {
    return {scale_ ? wide_scale_.data() : nullptr, bias_ ? wide_bias_.data() : nullptr,
            residual_ ? input<T>(*residual_) : nullptr, output<T>(y), static_cast<Act>(act_)};
  }

 private:
  OptionalTensor bias_, residual_, scale_;
  int act_;
  std::vector<float> wide_bias_, wide_scale_;
};

namespace {  // what it instantiates is emitted for the instruction sets that call it alone: else gcc takes minutes

// Takes the sums of a panel of channels from k on to y.
template <class T>
struct ToImage {
  static constexpr bool kBlocks = false;
  Epilogue<T> epilogue;
  int64_t first, outputs, k;

  template <int W>
  FASTRES_HD void put(Float<W> sum, int64_t row, int64_t column) const {
    const int64_t channel = k + column, at = (first + row) * outputs + channel;
    if (channel + W <= outputs) return epilogue.template put<W>(sum, at, channel);
    float lanes[W];
    store<W>(lanes, sum);
    for (int64_t j = 0; channel + j < outputs; ++j) epilogue.template put<1>(lanes[j], at + j, channel + j);
  }
};

}  // namespace
}  // namespace fastres
