// add_relu on a GPU: y = relu(x + residual), dx = (y > 0) * dy (one gradient serves both inputs). Flat arrays: the order of
// the dimensions plays no part. The kernel is in add_relu_flat.cu.
#include "cuda/add_relu.h"

#include "cuda/tensors.h"

namespace fastres {
namespace {

// The gradient too: from dy and y.
bool takes(const Tensor& x, const Tensor& residual) {
  return x.is_cuda() && has_kernel_dtype(x) && x.numel() > 0 && looks_like(residual, x) && has_lasting_strides(x);
}

OptionalTensor add_relu(Tensor x, Tensor residual) {
  if (!takes(x, residual)) return std::nullopt;
  const OnDevice on(x);
  const Tensor y = empty_as(x);
  add_relu_forward(type_of(x, "x"), data(x), data(residual), data(y), x.numel(), on.stream());
  return y;
}

OptionalTensor add_relu_backward(Tensor dy, Tensor y) {
  if (!takes(dy, y)) return std::nullopt;
  const OnDevice on(dy);
  const Tensor dx = empty_as(dy);
  add_relu_gradient(type_of(dy, "dy"), data(dy), data(y), data(dx), dy.numel(), on.stream());
  return dx;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
  m.impl("_add_relu_native", TORCH_BOX(&fastres::add_relu));
  m.impl("_add_relu_backward_native", TORCH_BOX(&fastres::add_relu_backward));
}
