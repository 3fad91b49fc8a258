// The kernels of direct products: pixels to where products read them, a panel of output channels times rows of these, and
// their sums' way to y. conv_bands.h says what is multiplied with what.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv.h"

namespace fastres {

struct Window {  // along one dimension
  int64_t size, stride, padding, dilation;

  int64_t span() const { return (size - 1) * dilation + 1; }
  int64_t outputs(int64_t inputs) const { return (inputs + 2 * padding - span()) / stride + 1; }
};

struct Pool {
  int64_t size, stride, padding;  // size 0: none
};

struct Convolution {
  int64_t batch, channels, height, width, outputs;
  Window down, across;
  int64_t rows, columns;  // of the convolution
  Pool pool;
  int64_t out_rows, out_columns;  // of the output: pooled, perhaps

  FASTRES_HD bool is_dense() const { return across.dilation == 1 && channels < 16 && across.size > 1; }
};

// The words of a tap of the weight, a multiple of a step, and how many taps there are.
template <class Operands>
struct Depth {
  int64_t pixel, tap, taps;  // pixel: words from one pixel to the next, where they are dense

  Depth(int64_t channels, int64_t down, int64_t across, bool dense)
      : pixel((channels + Operands::kGroup - 1) / Operands::kGroup),
        tap(((dense ? across : 1) * pixel + Operands::kStep - 1) / Operands::kStep * Operands::kStep),
        taps(dense ? down : down * across) {}
};

// Whether such products are by AMX's tiles.
template <class Operands>
bool has_tiles() {
  return !std::is_same_v<Operands, Floats> && runtime_isa() == Isa::kAmx;
}

namespace {  // what it instantiates is emitted for the instruction sets that call it alone: else gcc takes minutes

// Copies pixels, each to words of its own; what is left of those is zeros.
template <class Operands, class T>
struct CopyPixels {
  const T* from;
  float* to;
  int64_t from_stride, to_stride, channels, depth;  // strides and channels: of elements; to_stride and depth: of words

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    using Element = typename Operands::Element;
    for (int64_t i = begin; i < end; ++i) {
      const T* const pixel = from + i * from_stride;
      float* const out = to + i * to_stride;
      int64_t c = 0;
      if constexpr (std::is_same_v<T, Element>) {  // words as they are
        constexpr int64_t kGroup = Operands::kGroup;
        for (; c + W * kGroup <= channels; c += W * kGroup) store<W>(out + c / kGroup, load_bytes<Float<W>>(pixel + c));
        Element* const elements = reinterpret_cast<Element*>(out);
        if (channels == 3 && depth == 2 && i + 1 < end) {  // and a zero; the next pixel's first is read, and cut off
          const uint64_t bits = load_bytes<uint64_t>(pixel) & 0xffffffffffffull;
          std::memcpy(out, &bits, sizeof bits);
          continue;
        }
        for (; c < channels; ++c) elements[c] = pixel[c];
        for (; c < depth * kGroup; ++c) elements[c] = Element{};
      } else {
        for (; c + W <= channels; c += W) store<W>(out + c, load<W>(pixel + c));
        for (; c < channels; ++c) out[c] = load<1>(pixel + c);
        for (; c < depth; ++c) out[c] = 0.0f;
      }
    }
  }
};

// Takes rows of sums, of a panel of channels from k on, to y; rows past `columns` of every `pitch` are left out.
template <class Operands, class T>
struct ToRows {
  static constexpr bool kBlocks = true;
  Epilogue<T> epilogue;
  int64_t at, pitch, columns, outputs, k;  // at: the first pixel of y

  template <int W>
  FASTRES_HD void put_rows(const float* m, int64_t row, int64_t rows) const {
    if (k + kPanel<W> > outputs || epilogue.scale != nullptr || epilogue.act > Act::kRelu) return each<W, kAny>(m, row, rows);
    epilogue.residual == nullptr ? each<W, kPlain>(m, row, rows) : each<W, kResidual>(m, row, rows);
  }

 private:
  enum Case { kAny, kPlain, kResidual };  // the last two: of a whole panel, with bias and ReLU at most

  template <int W, Case kCase>
  FASTRES_HD void each(const float* m, int64_t row, int64_t rows) const {
    const int64_t p = row / pitch;
    int64_t q = row - p * pitch, to = (at + p * columns + (q < columns ? q : columns)) * outputs + k;
    const Float<W> zero{}, low = epilogue.act == Act::kRelu ? zero : zero - __builtin_inff();
    const bool biased = kCase != kAny && epilogue.bias != nullptr;
    const Float<W> b0 = biased ? load<W>(epilogue.bias + k) : zero, b1 = biased ? load<W>(epilogue.bias + k + W) : zero;
    for (int64_t r = 0; r < rows; ++r, m += kPanel<W>) {
      if (q < columns) {
        if constexpr (kCase == kAny) {
          any<W>(m, to);
        } else {
          Float<W> left = load<W>(m) + b0, right = load<W>(m + W) + b1;
          if constexpr (kCase == kResidual) left += load<W>(epilogue.residual + to);
          if constexpr (kCase == kResidual) right += load<W>(epilogue.residual + to + W);
          put<W>(epilogue.y + to, activate(left, low));
          put<W>(epilogue.y + to + W, activate(right, low));
        }
        to += outputs;
      }
      if (++q == pitch) q = 0;
    }
  }

  template <int W>
  FASTRES_HD void any(const float* m, int64_t to) const {
    int64_t j = 0;
    for (; j < kPanel<W> && k + j + W <= outputs; j += W) epilogue.template put<W>(load<W>(m + j), to + j, k + j);
    for (; j < kPanel<W> && k + j < outputs; ++j) epilogue.template put<1>(m[j], to + j, k + j);
  }

  template <int W>
  FASTRES_HD static void put(T* y, Float<W> value) {
#if FASTRES_X86_TARGETS
    if constexpr (std::is_same_v<Operands, Pairs> && std::is_same_v<T, BFloat16> && W == 16) {
      typedef char Bits __attribute__((vector_size(32)));
      Bits bits;
      asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(value));
      std::memcpy(y, &bits, sizeof bits);
      return;
    }
#endif
    store<W>(y, value);
  }
};

// Rows that a tap reads one after another, `lines` times; of y too, from the pixel `at` on.
struct Piece {
  const float* v;
  int64_t lines, line, count;      // line: words from one to the next
  int64_t at, pitch, columns;
  bool fresh = false;  // x itself, which may be far away
};

template <class Operands, class T>
struct Multiply {
  const std::vector<Piece>& pieces;
  const float* u;       // [panels, taps, depth, 2 W]
  const int64_t* taps;  // from v to each
  Epilogue<T> epilogue;
  int64_t tap_count, depth, step, outputs;  // step: words from one row to the next

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    if constexpr (std::is_same_v<Operands, Floats> || W == 16) {
      const int64_t size = tap_count * depth * kPanel<W>;
      const bool streamed = size * (end - begin) * 4 > kStreamedBytes;
#if FASTRES_AMX
      if constexpr (W == 16 && !std::is_same_v<Operands, Floats>) {
        if (has_tiles<Operands>()) return by_tiles(begin, end, size, streamed);
      }
#endif
      for (int64_t panel = begin; panel < end; ++panel) {
        const float* const own = u + panel * size;
        const char* next = streamed && panel + 1 < end ? reinterpret_cast<const char*>(own + size) : nullptr;
        for (const Piece& piece : pieces) {
          for (int64_t p = 0; p < piece.lines; ++p, next = nullptr) {
            const ToRows<Operands, T> to{epilogue, piece.at + p * piece.columns, piece.pitch, piece.columns, outputs,
                                         panel * kPanel<W>};
            const Panel rows{piece.v + p * piece.line, step, own, depth, next, kPanel<W> * 4, taps, tap_count};
            product<W, false, Operands>(rows, piece.count, to);
          }
        }
      }
    }
  }

#if FASTRES_AMX
  // Products by tiles, a block of rows and a panel at a time. Sums of one are on their way to y while the tiles of the next
  // are multiplied. Rows past a piece's last are read, up to a multiple of 16, and left.
  struct Blocks {
    const Multiply& of;
    int64_t size, steps;
    ToRows<Operands, T> to;
    const char* next = nullptr;
    int64_t row = 0, rows = 0, side = 0;  // row, rows: of the block before
    alignas(64) float m[2][32 * 32];

    FASTRES_HD void multiply(int64_t panel, const Piece& piece, int64_t p, int64_t at, int64_t lines, bool ahead) {
      const char* const u = reinterpret_cast<const char*>(of.u + panel * size);
      const char* const v = reinterpret_cast<const char*>(piece.v + p * piece.line + at * of.step);
      if (piece.count - at > 16) {
        multiply_tiles<2>(v, of.step * 4, u, steps, of.taps, of.tap_count, next, lines, ahead, m[side]);
      } else {
        multiply_tiles<1>(v, of.step * 4, u, steps, of.taps, of.tap_count, next, lines, ahead, m[side]);
      }
      next += of.tap_count * steps * lines * 64;
      side ^= 1;
      if (rows > 0) to.template put_rows<16>(m[side], row, rows);
      to = {of.epilogue, piece.at + p * piece.columns, piece.pitch, piece.columns, of.outputs, panel * kPanel<16>};
      row = at;
      rows = piece.count - at < 32 ? piece.count - at : 32;
    }
  };

  // A weight that stays in L2 is read for each block of rows, a larger one a panel at a time for all rows.
  FASTRES_HD void by_tiles(int64_t begin, int64_t end, int64_t size, bool streamed) const {
    const Tiles tiles;
    Blocks blocks{*this, size, depth / Operands::kStep, {epilogue, 0, 1, 1, outputs, 0}};
    int64_t count = 0;
    for (const Piece& piece : pieces) count += piece.lines * ((piece.count + 31) / 32);
    const int64_t together = streamed ? 1 : end - begin;  // panels
    for (int64_t first = begin; first < end; first += together) {
      const int64_t lines = streamed && first + 1 < end ? (32 + count - 1) / count : 0;  // of the next panel's, a step
      blocks.next = reinterpret_cast<const char*>(u + (first + 1) * size);
      for (const Piece& piece : pieces) {
        for (int64_t p = 0; p < piece.lines; ++p) {
          for (int64_t at = 0; at < piece.count; at += 32) {
            for (int64_t panel = first; panel < first + together; ++panel) {
              blocks.multiply(panel, piece, p, at, lines, piece.fresh && panel == begin);
            }
          }
        }
      }
    }
    if (blocks.rows > 0) blocks.to.template put_rows<16>(blocks.m[blocks.side ^ 1], blocks.row, blocks.rows);
  }
#endif
};

}  // namespace
}  // namespace fastres
