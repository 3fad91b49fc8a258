// CUTLASS's basics; what it asks of a thread's place in its block, as on a device.
#pragma once

#include "../device.h"

#include <cuda/std/utility>
#include <cutlass/detail/helper_macros.hpp>

#define __CUDA_ARCH__ 800
#include_next <cutlass/cutlass.h>
#undef __CUDA_ARCH__

namespace cutlass {
namespace arch {
inline int LaneId() { return emulator::lane(); }
}  // namespace arch
}  // namespace cutlass
