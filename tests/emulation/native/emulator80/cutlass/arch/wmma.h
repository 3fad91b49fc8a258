// CUDA's warp matrices, which no kernel here has.
#pragma once

#include <cutlass/arch/mma.h>
