// The inner product of the CPU convolutions: R rows of V times a panel of U, 2 W columns wide, kept in registers.
//
//   sum over c of v[r, c] * u[c, j]                     r < R, j < 2 W, c in order: one accumulator an element
//
// An element's sum does not depend on R, nor on where its row stands: results are the same for any blocking and any
// number of threads. R x 2 accumulators, 2 columns of U and a broadcast fill the registers: 14 rows on AVX-512
// (32 registers), 6 on AVX2 (16). NEON has 32; it was not compiled yet.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastres {

#if defined(__aarch64__)
constexpr int kNarrowRows = 14;
#else
constexpr int kNarrowRows = 6;
#endif
template <int W>
constexpr int kRows = W == 16 ? 14 : kNarrowRows;
template <int W>
constexpr int kPanel = 2 * W;  // columns

// Calls a kernel as a function of its own, compiled for the instruction set of the caller: the register allocator sees
// one kernel at a time.
template <int W, class Kernel>
FASTRES_HD void call(const Kernel& kernel, int64_t begin = 0, int64_t end = 0) {
#if FASTRES_X86_TARGETS
  if constexpr (W == 16) return run_avx512(kernel, begin, end);
  if constexpr (W == 8) return run_avx2(kernel, begin, end);
#endif
  kernel.template run<W>(begin, end);
}

struct Panel {
  const float* v;  // [rows, stride of v]
  int64_t v_stride;
  const float* u;  // [depth, 2 W]
  int64_t depth;
  int64_t next;  // from u to the columns that are wanted next, to be fetched to L2 meanwhile; 0: they are there
};

// Takes the sums of W columns of a row: writes m.
struct ToMemory {
  float* m;  // [rows, 2 W]

  template <int W>
  FASTRES_HD void put(Float<W> sum, int64_t row, int64_t column) const {
    store<W>(m + row * kPanel<W> + column, sum);
  }
};

template <int R, class To>
struct Product {
  Panel panel;
  To to;
  int64_t row;  // the first

  template <int W>
  FASTRES_HD void run(int64_t, int64_t) const {
    const float* v = panel.v;
    const float* u = panel.u;
    const int64_t stride = panel.v_stride, depth = panel.depth, next = panel.next;
    Float<W> left[R], right[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) left[r] = right[r] = Float<W>{};
    for (int64_t c = 0; c < depth; ++c, u += kPanel<W>) {
      const auto u0 = load_bytes<Float<W>>(u), u1 = load_bytes<Float<W>>(u + W);
      if (next != 0) {
        __builtin_prefetch(u + next, 0, 2);
        if constexpr (W == 16) __builtin_prefetch(u + next + W, 0, 2);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto value = load_broadcast<W>(v + r * stride + c);
        left[r] += value * u0;
        right[r] += value * u1;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      to.template put<W>(left[r], row + r, 0);
      to.template put<W>(right[r], row + r, W);
    }
  }
};

template <int W, int R, class To>
FASTRES_HD void product_of(const Panel& panel, const To& to, int64_t row, int64_t rows) {
  if (rows == R) return call<W>(Product<R, To>{panel, to, row});
  if constexpr (R > 1) product_of<W, R - 1>(panel, to, row, rows);
}

// Any number of rows: blocks of nearly equal size, so that none is too small to hide the latency of an addition.
template <int W, class To>
FASTRES_HD void product(Panel panel, int64_t rows, const To& to) {
  const int64_t blocks = (rows + kRows<W> - 1) / kRows<W>;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t count = rows / blocks + (block < rows % blocks ? 1 : 0);
    product_of<W, kRows<W>>(panel, to, row, count);
    panel.v += count * panel.v_stride;
    panel.next = 0;  // the first rows have fetched it
    row += count;
  }
}

}  // namespace fastres
