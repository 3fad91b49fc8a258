// add_relu's launches as functions of pointers, over n elements. Formulas in element.h.
#pragma once

#include <cstdint>

#include "cuda/runtime.h"

namespace fastres {

// y = relu(x + residual); x may be the residual.
void add_relu_forward(Type type, const void* x, const void* residual, void* y, int64_t n, const Stream& on);

// dx = dy where y > 0 or y is NaN, else 0.
void add_relu_gradient(Type type, const void* dy, const void* y, void* dx, int64_t n, const Stream& on);

}  // namespace fastres
