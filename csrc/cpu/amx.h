// Products by Intel's AMX: tiles of 16 rows of 64 bytes, 16x16 sums in one instruction. Inline assembly, since gcc's
// intrinsics do not say that they read and write memory.
//
// Eight tiles: 0 to 3 hold 32 rows by 32 columns of sums, 4 and 5 rows of V, 6 and 7 columns of U.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastres {

#if FASTRES_AMX
// The tiles of this thread, for as long as it lives: all of 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

#define FASTRES_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
#define FASTRES_TILE_LOAD(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(stride) : "memory")
#define FASTRES_TILE_STORE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory")
#define FASTRES_TILE_PRODUCT(name, sums, rows, columns) \
  asm volatile(name " %%tmm" #columns ", %%tmm" #rows ", %%tmm" #sums ::)

// 16 kTall rows by 32 columns of sums to m, [16 kTall, 32]. The arguments are a Panel's, in bytes. Of `next`, what is wanted
// afterwards, some lines a step are fetched to L2; ahead: so is what lies 64 rows on, which no pass has read before.
template <int kTall>
FASTRES_HD void multiply_tiles(const char* v, int64_t v_stride, const char* u, int64_t steps, const int64_t* taps,
                               int64_t tap_count, const char* next, int64_t next_lines, bool ahead, float* m) {
  constexpr int64_t kRow = 128;  // bytes of a row of U and of m
  FASTRES_TILE_ZERO(0);
  FASTRES_TILE_ZERO(1);
  if constexpr (kTall == 2) {
    FASTRES_TILE_ZERO(2);
    FASTRES_TILE_ZERO(3);
  }
  const char* after = v + 64 * v_stride;
  for (int64_t tap = 0; tap < tap_count; ++tap) {
    const char* at = v + taps[tap] * 4;
    for (int64_t step = 0; step < steps; ++step, at += 64, u += 16 * kRow) {
      FASTRES_TILE_LOAD(6, u, kRow);
      FASTRES_TILE_LOAD(4, at, v_stride);
      FASTRES_TILE_LOAD(7, u + 64, kRow);
      FASTRES_TILE_PRODUCT("tdpbf16ps", 0, 4, 6);
      if constexpr (kTall == 2) FASTRES_TILE_LOAD(5, at + 16 * v_stride, v_stride);
      FASTRES_TILE_PRODUCT("tdpbf16ps", 1, 4, 7);
      if constexpr (kTall == 2) {
        FASTRES_TILE_PRODUCT("tdpbf16ps", 2, 5, 6);
        FASTRES_TILE_PRODUCT("tdpbf16ps", 3, 5, 7);
      }
      if (ahead) {
#pragma GCC unroll 32
        for (int line = 0; line < 16 * kTall; ++line) __builtin_prefetch(after + line * 64, 0, 2);
        after += 16 * kTall * 64;
      }
      for (int64_t line = 0; line < next_lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    }
  }
  FASTRES_TILE_STORE(0, m, kRow);
  FASTRES_TILE_STORE(1, m + 16, kRow);
  if constexpr (kTall == 2) {
    FASTRES_TILE_STORE(2, m + 16 * 32, kRow);
    FASTRES_TILE_STORE(3, m + 16 * 32 + 16, kRow);
  }
}
#endif

}  // namespace fastres
