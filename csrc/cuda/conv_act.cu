// conv_act on a GPU: y = act(conv2d(x, weight) + bias [+ residual]) by the kernel that the caller names, all tensors
// channels_last. The kernels are in conv_sm90*.cu and conv_sm80*.cu.
#include "cuda/conv_act.h"

#include <array>

#include "cuda/tensors.h"

namespace fastres {
namespace {

using Pair = std::array<int64_t, 2>;

ConvShape shape_of(const Tensor& x, const Tensor& weight, const Pair& stride, const Pair& padding,
                   const Pair& dilation) {
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0,
                    "stride, padding, dilation: expected positive numbers, padding at least 0");
  }
  const auto out = [&](int64_t size, int64_t kernel, int i) {
    return (size + 2 * padding[i] - dilation[i] * (kernel - 1) - 1) / stride[i] + 1;
  };
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t k = weight.size(0), r = weight.size(2), s = weight.size(3), p = out(h, r, 0), q = out(w, s, 1);
  STD_TORCH_CHECK(weight.size(1) == c, "weight: expected ", c, " channels as x, got ", shape_string(weight));
  STD_TORCH_CHECK(p > 0 && q > 0, "x: images of ", h, "x", w, " are too small for a ", r, "x", s, " kernel");
  return {n, h, w, c, k, r, s, p, q, {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}};
}

// The copy engine and cp.async read 16 bytes at a time. Allocations are aligned; a view into one may not be.
void check_aligned(const OptionalTensor& t, const char* name) {
  STD_TORCH_CHECK(!t || is_aligned16(address_of(data(*t))), name, ": expected an address that is a multiple of 16");
}

Tensor conv_act(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, int64_t stride_h,
                int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                std::string act, int64_t tile) {
  check_cuda_tensor(x, "x");
  const std::vector<ConvTile>& tiles = conv_tiles();
  STD_TORCH_CHECK(tile >= 0 && tile < static_cast<int64_t>(tiles.size()), "tile: got ", tile, ", this build has ",
                  tiles.size());
  const ConvTile& chosen = tiles[static_cast<size_t>(tile)];
  STD_TORCH_CHECK(type_of(x, "x") == chosen.type, "tile: ", chosen.name, " is not of x's dtype ",
                  toString(x.scalar_type()));
  const auto check = [&](const Tensor& t, const char* name) {
    check_device(t, name, x, "x");
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": expected dtype ", toString(x.scalar_type()),
                    " as x, got ", toString(t.scalar_type()));
    check_channels_last(t, name);
    check_aligned(t, name);
  };
  check(x, "x");
  check(weight, "weight");
  const ConvShape shape = shape_of(x, weight, {stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w});
  const int64_t size[] = {shape.n, shape.k, shape.p, shape.q};
  const int64_t strides[] = {shape.k * shape.p * shape.q, 1, shape.k * shape.q, shape.k};
  const Tensor y = empty_strided({size, 4}, {strides, 4}, dtype_of(x), x);
  if (residual) {
    check_same(*residual, "residual", y, "y");
    check(*residual, "residual");
  }
  if (bias) {
    check_device(*bias, "bias", x, "x");
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->dim() == 1 && bias->size(0) == shape.k &&
                        bias->is_contiguous(),
                    "bias: expected a contiguous [", shape.k, "] of x's dtype, got ", shape_string(*bias));
    check_aligned(bias, "bias");
  }
  ConvTensors tensors{data(x), data(weight), data(bias), data(residual), data(y), 0, 0};
  STD_TORCH_CHECK(activation_bounds(act, tensors.lower, tensors.upper), "act: expected relu, relu6 or none, got ", act);
  if (y.numel() == 0) return y;
  const std::string reason = chosen.refusal(shape);
  STD_TORCH_CHECK(reason.empty(), "conv_act: ", chosen.name, " refuses: ", reason);
  const OnDevice on(x);
  const int64_t bytes = chosen.workspace(shape, static_cast<int>(multiprocessors(on.stream().device)));
  OptionalTensor workspace;  // from torch's allocator, given back when the launch is queued: the stream keeps the order
  if (bytes > 0) {
    const int64_t one = 1;
    workspace = empty_strided({&bytes, 1}, {&one, 1}, aoti_torch_dtype_uint8(), x);
  }
  chosen.run(shape, tensors, data(workspace), on.stream());
  return y;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) { m.impl("_conv_act_native", TORCH_BOX(&fastres::conv_act)); }
