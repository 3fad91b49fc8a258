// add_relu on a GPU: y = relu(x + residual), dx = (y > 0) * dy (one gradient serves both inputs). Flat arrays: the order of
// the dimensions plays no part. The kernel is in add_relu_flat.cu.
#include "cuda/add_relu.h"

#include "cuda/tensors.h"

namespace fastres {
namespace {

// ---- Filling what the caller allocated: any call, checked.

void add_relu(Tensor x, Tensor residual, Tensor y) {
  check_cuda_tensor(x, "x");
  check_same(residual, "residual", x, "x");
  check_same(y, "y", x, "x");
  if (x.numel() == 0) return;
  const OnDevice on(x);
  add_relu_forward(type_of(x, "x"), data(x), data(residual), data(y), x.numel(), on.stream());
}

void add_relu_backward(Tensor dy, Tensor y, Tensor dx) {
  check_cuda_tensor(dy, "dy");
  check_same(y, "y", dy, "dy");
  check_same(dx, "dx", dy, "dy");
  if (dy.numel() == 0) return;
  const OnDevice on(dy);
  add_relu_gradient(type_of(dy, "dy"), data(dy), data(y), data(dx), dy.numel(), on.stream());
}

// ---- The whole call, as in csrc/cpu/add_relu.cpp: nothing is returned where it is left to the general way.

bool takes(const Tensor& a, const Tensor& b) {
  return a.is_cuda() && has_kernel_dtype(a) && a.numel() > 0 && looks_like(b, a) &&
         (is_canonically_contiguous(a) || plainly_channels_last(a).value_or(false));
}

OptionalTensor add_relu_direct(Tensor x, Tensor residual) {
  if (!takes(x, residual)) return std::nullopt;
  const OnDevice on(x);
  const Tensor y = empty_as(x);
  add_relu_forward(type_of(x, "x"), data(x), data(residual), data(y), x.numel(), on.stream());
  return y;
}

OptionalTensor add_relu_backward_direct(Tensor dy, Tensor y) {
  if (!takes(y, dy)) return std::nullopt;
  const OnDevice on(y);
  const Tensor dx = empty_as(y);
  add_relu_gradient(type_of(y, "y"), data(dy), data(y), data(dx), y.numel(), on.stream());
  return dx;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
  m.impl("_add_relu_native", TORCH_BOX(&fastres::add_relu));
  m.impl("_add_relu_backward_native", TORCH_BOX(&fastres::add_relu_backward));
  m.impl("_add_relu_direct_native", TORCH_BOX(&fastres::add_relu_direct));
  m.impl("_add_relu_backward_direct_native", TORCH_BOX(&fastres::add_relu_backward_direct));
}
