// add_relu: y = relu(x + residual), dx = (y > 0) * dy (one gradient serves both inputs).
//
// Flat arrays: the order of the dimensions plays no part. 3 streams a pass, nothing is kept: the bound is memory.
#include <cstdint>

#include "cpu/isa.h"
#include "tensor.h"

namespace fastres {
namespace {

constexpr int64_t kBlock = 8192;  // elements of a task: a multiple of every vector width, so only the last has a tail

template <class T>
struct AddReluForward {
  const T* x;         // [n]
  const T* residual;  // [n]
  T* y;               // [n]

  template <int W>
  FASTRES_HD void at(int64_t i) const {
    store<W>(y + i, activate(load<W>(x + i) + load<W>(residual + i), Float<W>{}));
  }
};

template <class T>
struct AddReluBackward {
  const T* dy;  // [n]
  const T* y;   // [n]
  T* dx;        // [n]

  template <int W>
  FASTRES_HD void at(int64_t i) const {
    store<W>(dx + i, relu_gradient(load<W>(dy + i), load<W>(y + i)));
  }
};

template <class Op>
struct Flat {
  Op op;
  int64_t n;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const int64_t last = end * kBlock < n ? end * kBlock : n;
    int64_t i = begin * kBlock;
    for (; i + W <= last; i += W) op.template at<W>(i);
    for (; i < last; ++i) op.template at<1>(i);
  }
};

template <class Op>
void launch(const Op& op, int64_t n) {
  const Flat<Op> kernel{op, n};
  parallel_tasks((n + kBlock - 1) / kBlock, n, [&](int64_t begin, int64_t end) { run_kernel(kernel, begin, end); });
}

// The gradient too: from dy and y.
bool takes(const Tensor& x, const Tensor& residual) {
  return x.is_cpu() && has_kernel_dtype(x) && x.numel() > 0 && looks_like(residual, x) && has_lasting_strides(x);
}

OptionalTensor add_relu(Tensor x, Tensor residual) {
  if (!takes(x, residual)) return std::nullopt;
  const Tensor y = empty_as(x);
  dispatch_dtype(x, "x", [&](auto t) {
    using T = decltype(t);
    launch(AddReluForward<T>{input<T>(x), input<T>(residual), output<T>(y)}, x.numel());
  });
  return y;
}

OptionalTensor add_relu_backward(Tensor dy, Tensor y) {
  if (!takes(dy, y)) return std::nullopt;
  const Tensor dx = empty_as(dy);
  dispatch_dtype(dy, "dy", [&](auto t) {
    using T = decltype(t);
    launch(AddReluBackward<T>{input<T>(dy), input<T>(y), output<T>(dx)}, dy.numel());
  });
  return dx;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("_add_relu_native", TORCH_BOX(&fastres::add_relu));
  m.impl("_add_relu_backward_native", TORCH_BOX(&fastres::add_relu_backward));
}
