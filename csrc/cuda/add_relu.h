// What bn_act takes from add_relu: the gradient through ReLU, of n elements.
#pragma once

#include <cstdint>

#include "cuda/runtime.h"

namespace fastres {

// dx = dy where y > 0 or y is NaN, else 0.
void add_relu_gradient(Type type, const void* dy, const void* y, void* dx, int64_t n, const Stream& on);

}  // namespace fastres
