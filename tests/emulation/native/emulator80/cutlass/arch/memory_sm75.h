// ldmatrix.
#pragma once

#include <cutlass/array.h>
#include <cutlass/layout/matrix.h>

#include <type_traits>

namespace cutlass {
namespace arch {

template <class Layout, int kMatrices>
void ldsm(Array<unsigned, kMatrices>& to, const void* row) {
  static_assert(std::is_same_v<Layout, layout::RowMajor>, "no kernel here transposes");
  emulator::load_matrices<kMatrices>(to.data(), row);
}

// Of kernels that are not compiled here.
unsigned cutlass_get_smem_pointer(const void*);
template <class Access>
void shared_load(Access&, const void*);

}  // namespace arch
}  // namespace cutlass
