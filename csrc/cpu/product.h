// The inner product of the CPU convolutions: R rows of V times a panel of U, 2 W columns wide, kept in registers.
//
//   sum over c of v[r, c] * u[c, j]                     r < R, j < 2 W, c in order: one accumulator an element
//
// An element's sum does not depend on R, nor on where its row stands: results are the same for any blocking and any
// number of threads. R x 2 accumulators, 2 columns of U and a broadcast fill the registers: 14 rows on AVX-512
// (32 registers), 6 on AVX2 (16). NEON has 32; only an emulator has run it yet (tests/ops/test_arm.py).
#pragma once

#include <cstdint>

#include "cpu/amx.h"

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

// ---- What a word of V and of U holds, 32 bits: a number, or two bf16 numbers of neighboring channels, whose products are
// summed in fp32. Pairs need AVX512-BF16: vdpbf16ps takes subnormals for zeros, as AMX's tiles do.
struct Floats {
  using Element = float;
  static constexpr int64_t kGroup = 1;  // elements of a word
  static constexpr int64_t kStep = 1;   // words: the depth of a tap is a multiple
};
struct Pairs {
  using Element = BFloat16;
  static constexpr int64_t kGroup = 2;
  static constexpr int64_t kStep = 16;  // a tile's row
};

template <class Operands, int W>
FASTRES_HD Float<W> plus_product(Float<W> sum, Float<W> a, Float<W> b) {
#if FASTRES_X86_TARGETS
  if constexpr (std::is_same_v<Operands, Pairs> && W == 16) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
#endif
  return sum + a * b;
}

inline constexpr int64_t kOneTap = 0;

struct Panel {
  const float* v;  // [rows, depth], with a stride; words
  int64_t v_stride;
  const float* u;  // [depth, 2 W]
  int64_t depth;
  const char* next;  // what is wanted afterwards: fetched to L2 meanwhile, up to 128 bytes for each c; or null
  int64_t next_stride;
  const int64_t* taps = &kOneTap;  // for each, v[r, c] is at v + its offset and u has `depth` rows; all are summed
  int64_t tap_count = 1;
};

// Takes the sums of W columns of a row: writes them to m, or adds them to what is there.
struct ToMemory {
  static constexpr bool kBlocks = false;
  float* m;  // [rows, 2 W]
  bool add;

  template <int W>
  FASTRES_HD void put(Float<W> sum, int64_t row, int64_t column) const {
    float* const to = m + row * kPanel<W> + column;
    store<W>(to, add ? load<W>(to) + sum : sum);
  }
};

// kByDepth: v is [depth, rows], with a stride. A To with kBlocks takes all rows at once, from memory.
template <int R, bool kByDepth, class Operands, class To>
struct Product {
  Panel panel;
  To to;
  int64_t row;  // the first

  template <int W>
  FASTRES_HD void run(int64_t, int64_t) const {
    const float* u = panel.u;
    const char* next = panel.next;
    const int64_t stride = panel.v_stride, depth = panel.depth, next_stride = panel.next_stride;
    Float<W> left[R], right[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) left[r] = right[r] = Float<W>{};
    for (int64_t tap = 0; tap < panel.tap_count; ++tap) {
      const float* const v = panel.v + panel.taps[tap];
      for (int64_t c = 0; c < depth; ++c, u += kPanel<W>) {
        const auto u0 = load_bytes<Float<W>>(u), u1 = load_bytes<Float<W>>(u + W);
        if (next != nullptr) {
          __builtin_prefetch(next, 0, 2);
          if (next_stride > 64) __builtin_prefetch(next + 64, 0, 2);
          next += next_stride;
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const auto value = load_broadcast<W>(kByDepth ? v + c * stride + r : v + r * stride + c);
          left[r] = plus_product<Operands, W>(left[r], value, u0);
          right[r] = plus_product<Operands, W>(right[r], value, u1);
        }
      }
    }
    if constexpr (To::kBlocks) {
      alignas(64) float m[R * kPanel<W>];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        store<W>(m + r * kPanel<W>, left[r]);
        store<W>(m + r * kPanel<W> + W, right[r]);
      }
      to.template put_rows<W>(m, row, R);
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        to.template put<W>(left[r], row + r, 0);
        to.template put<W>(right[r], row + r, W);
      }
    }
  }
};

template <int W, int R, bool kByDepth, class Operands, class To>
FASTRES_HD void product_of(const Panel& panel, const To& to, int64_t row, int64_t rows) {
  if (rows == R) return call<W>(Product<R, kByDepth, Operands, To>{panel, to, row});
  if constexpr (R > 1) product_of<W, R - 1, kByDepth, Operands>(panel, to, row, rows);
}

// Any number of rows: blocks of nearly equal size, so that none is too small to hide the latency of an addition.
template <int W, bool kByDepth = false, class Operands = Floats, class To>
FASTRES_HD void product(Panel panel, int64_t rows, const To& to) {
  constexpr int64_t kMost = kByDepth ? kPanel<W> / 4 : kRows<W>;  // a row of a panel is whole blocks
  const int64_t blocks = (rows + kMost - 1) / kMost;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t count = rows / blocks + (block < rows % blocks ? 1 : 0);
    product_of<W, kMost, kByDepth, Operands>(panel, to, row, count);
    panel.v += kByDepth ? count : count * panel.v_stride;
    panel.next = nullptr;  // the first rows have fetched it
    row += count;
  }
}

}  // namespace fastres
