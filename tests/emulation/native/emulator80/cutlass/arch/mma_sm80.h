// mma.sync, as the kernels use it: 16 rows by 8 columns by 32 bytes of depth, fp32 sums.
#pragma once

#include <cutlass/arch/mma.h>
#include <cutlass/cutlass.h>
#include <cutlass/layout/matrix.h>
#include <cutlass/numeric_types.h>

namespace emulator {

template <class T, class Element, int kDepth>
struct Mma {
  using Shape = cutlass::gemm::GemmShape<16, 8, kDepth>;
  using ElementA = T;
  using ElementB = T;
  using ElementC = float;
  using LayoutA = cutlass::layout::RowMajor;
  using LayoutB = cutlass::layout::ColumnMajor;
  using LayoutC = cutlass::layout::RowMajor;
  using FragmentA = cutlass::Array<T, kDepth / 2>;
  using FragmentB = cutlass::Array<T, kDepth / 4>;
  using FragmentC = cutlass::Array<float, 4>;
  using Operator = cutlass::arch::OpMultiplyAdd;
  using ArchTag = cutlass::arch::Sm80;

  void operator()(FragmentC& d, const FragmentA& a, const FragmentB& b, const FragmentC& c) const {
    static_assert(sizeof a == 4 * sizeof(uint32_t) && sizeof b == 2 * sizeof(uint32_t));
    uint32_t a_words[4], b_words[2];
    std::memcpy(a_words, &a, sizeof a);
    std::memcpy(b_words, &b, sizeof b);
    multiply<Element>(d.data(), a_words, b_words, c.data());
  }
};

}  // namespace emulator

namespace cutlass {
namespace arch {

template <>
struct Mma<gemm::GemmShape<16, 8, 16>, 32, half_t, layout::RowMajor, half_t, layout::ColumnMajor, float,
           layout::RowMajor, OpMultiplyAdd> : emulator::Mma<half_t, emulator::Half, 16> {};
template <>
struct Mma<gemm::GemmShape<16, 8, 16>, 32, bfloat16_t, layout::RowMajor, bfloat16_t, layout::ColumnMajor, float,
           layout::RowMajor, OpMultiplyAdd> : emulator::Mma<bfloat16_t, emulator::BFloat16, 16> {};
template <>
struct Mma<gemm::GemmShape<16, 8, 8>, 32, tfloat32_t, layout::RowMajor, tfloat32_t, layout::ColumnMajor, float,
           layout::RowMajor, OpMultiplyAdd> : emulator::Mma<tfloat32_t, emulator::TFloat32, 8> {};

}  // namespace arch
}  // namespace cutlass
