// The operators of direct products; see conv_bands.h. A weight is made ready once, as fp32 numbers or, in bf16 where the CPU
// multiplies pairs of these, as pairs.
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/conv_bands.h"

namespace fastres {
namespace {

// ---- operators -------------------------------------------------------------------------------------------------------

bool is_dense(int64_t channels, int64_t across) { return Convolution{0, channels, 0, 0, 0, {}, {across, 1, 0, 1}}.is_dense(); }

// [panels, taps, depth, 2 W] words: fp32 or, as int32, pairs.
template <class Operands>
Tensor pack(const Tensor& weight) {
  using Element = typename Operands::Element;
  const int64_t outputs = weight.size(0), channels = weight.size(1), down = weight.size(2), across = weight.size(3);
  const bool dense = is_dense(channels, across);
  const Depth<Operands> depth(channels, down, across, dense);
  const int64_t width = panel_width(), panels = (outputs + width - 1) / width, group = Operands::kGroup;
  const int64_t sizes[] = {panels, depth.taps, depth.tap, width};
  const int64_t strides[] = {depth.taps * depth.tap * width, depth.tap * width, width, 1};
  const bool pairs = !std::is_same_v<Operands, Floats>;
  const Tensor u = empty_strided({sizes, 4}, {strides, 4}, pairs ? aoti_torch_dtype_int32() : aoti_torch_dtype_float32(), weight);
  const auto stride = weight.strides();
  dispatch_dtype(weight, "weight", [&](auto t) {
    using T = decltype(t);
    const T* const w = input<T>(weight);
    auto* const to = static_cast<Element*>(u.mutable_data_ptr());
    parallel_tasks(panels * depth.taps, u.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t panel = at / depth.taps, tap = at % depth.taps;
        for (int64_t i = 0; i < depth.tap * group; ++i) {  // elements of the depth
          const int64_t pixel = depth.pixel * group, s = dense ? i / pixel : tap % across, c = dense ? i % pixel : i;
          const int64_t r = dense ? tap : tap / across;
          const bool there = c < channels && s < across;
          const T* const from = w + c * stride[1] + r * stride[2] + s * stride[3];
          Element* const row = to + ((at * depth.tap + i / group) * width) * group + i % group;
          for (int64_t j = 0; j < width; ++j) {
            const int64_t k = panel * width + j;
            const float value = there && k < outputs ? load<1>(from + k * stride[0]) : 0.0f;
            store<1>(row + j * group, value);
          }
        }
      }
    });
  });
  return u;
}

Tensor conv_direct_pack(Tensor weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && has_kernel_dtype(weight), "weight: got shape ",
                  shape_string(weight), ", expected [K, C, R, S] of a kernel's dtype on a CPU");
  return weight.scalar_type() == ScalarType::BFloat16 && has_pairs() ? pack<Pairs>(weight) : pack<Floats>(weight);
}

template <class Operands>
bool is_for(const Tensor& u, const Convolution& shape) {
  const Depth<Operands> depth(shape.channels, shape.down.size, shape.across.size,
                              is_dense(shape.channels, shape.across.size));
  return u.size(1) * u.size(2) == depth.taps * depth.tap;
}

bool has_type_of_pairs(const Tensor& u) { return u.scalar_type() == ScalarType::Int; }

// where: kernel, stride, padding, dilation, two numbers each; pool: kernel, stride, padding, or empty.
Convolution checked_shape(const Tensor& x, const Tensor& u, int64_t outputs, const std::vector<int64_t>& where,
                     const std::vector<int64_t>& pool) {
  check_images(x);
  STD_TORCH_CHECK(where.size() == 8 && (pool.empty() || pool.size() == 3), "where, pool: got ", where.size(), " and ",
                  pool.size(), " numbers, expected 8 and none or 3");
  const Window down{where[0], where[2], where[4], where[6]}, across{where[1], where[3], where[5], where[7]};
  for (const Window& w : {down, across}) {
    STD_TORCH_CHECK(w.size > 0 && w.stride > 0 && w.padding >= 0 && w.dilation > 0,
                    "where: expected positive kernel sizes, strides and dilations, and no negative padding");
  }
  Convolution shape{x.size(0), x.size(1), x.size(2), x.size(3), outputs, down, across};
  const bool pairs = has_type_of_pairs(u), packed = u.is_cpu() && u.dim() == 4 && u.is_contiguous() &&
      u.size(3) == panel_width() && outputs > (u.size(0) - 1) * u.size(3) && outputs <= u.size(0) * u.size(3);
  const bool typed = pairs ? has_pairs() && x.scalar_type() == ScalarType::BFloat16 : u.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(packed && typed && (pairs ? is_for<Pairs>(u, shape) : is_for<Floats>(u, shape)), "u: got shape ",
                  shape_string(u), ", expected a weight of x's dtype that _conv_direct_pack made, of ", down.size, "x",
                  across.size, " for ", x.size(1), " and ", outputs, " channels");
  STD_TORCH_CHECK(!pairs || across.dilation == 1 || !is_dense(x.size(1), across.size), "where: got dilation ",
                  across.dilation, " with ", x.size(1), " channels in bf16, expected 1 below 16");
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
  const Convolution shape = checked_shape(x, u, outputs, where, pool);
  check_output(y, x, {outputs, shape.out_rows, shape.out_columns});
  STD_TORCH_CHECK(!residual || pool.empty(), "residual: expected none before a pool");
  const After after(y, bias, residual, scale, act);
  if (y.numel() == 0) return y;
  dispatch_dtype(x, "x", [&](auto t) {
    using T = decltype(t);
    const auto epilogue = after.template epilogue<T>(y);
    const auto* const words = static_cast<const float*>(u.const_data_ptr());
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (has_type_of_pairs(u)) return Bands<Pairs, T>(shape, input<T>(x), words, epilogue)(x);
    }
    Bands<Floats, T>(shape, input<T>(x), words, epilogue)(x);
  });
  return y;
}

Tensor conv_direct(Tensor x, Tensor u, OptionalTensor bias, OptionalTensor residual, OptionalTensor scale, int64_t outputs,
                   std::vector<int64_t> where, std::vector<int64_t> pool, std::string act) {
  const Convolution shape = checked_shape(x, u, outputs, where, pool);
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
