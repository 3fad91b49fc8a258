// The passes of bn_act over NHWC: x is [rows, C], rows = N * H * W. A task is a block of rows.
//
// SumRows leaves each task's sums in [chunks, C]; FinishRows merges them in order into the parameters of each channel;
// MapRows takes the tasks backwards, starting on what SumRows left in cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/bn_act_terms.h"

namespace fastres {

// Whole rows: a narrower tile breaks the streams that the prefetcher follows (twice as slow at 2048 channels).
constexpr int64_t kTile = 2048;            // channels of a task: its sums take 56 KiB of stack
constexpr int64_t kChunkElements = 65536;  // elements of a task, about
constexpr int64_t kMinRows = 48;           // rows of a task: fewer, and the work per channel shows
constexpr int64_t kMaxRows = 1024;         // more, and the first shift's cancellation shows
constexpr int64_t kFlush = 128;            // rows summed in fp32 before they go to fp64
constexpr int64_t kChannelBlock = 64;      // channels of a task of FinishRows

struct Partition {
  int64_t rows, channels, chunks, tiles, tile;

  Partition(int64_t rows, int64_t channels) : rows(rows), channels(channels) {
    tiles = (channels + kTile - 1) / kTile;
    tile = (channels + tiles - 1) / tiles;
    const int64_t chunk_rows = std::clamp<int64_t>(kChunkElements / tile, kMinRows, kMaxRows);
    chunks = std::max<int64_t>(1, rows / chunk_rows);
  }
  int64_t tasks() const { return chunks * tiles; }
  FASTRES_HD int64_t first_row(int64_t chunk) const {  // chunks differ by one row at most
    const int64_t base = rows / chunks, longer = rows % chunks;
    return chunk * base + (chunk < longer ? chunk : longer);
  }
};

template <class Term>
struct SumRows {
  Term term;
  Partition part;
  const float* centre;  // [C]: the mean; unused for statistics, which choose a shift per task
  double *a, *b;        // [chunks, C]: sums; for statistics, sum and m2

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / part.tiles, c = task % part.tiles * part.tile;
      const int64_t width = part.tile < part.channels - c ? part.tile : part.channels - c;
      sum_tile<W>(chunk, c, width);
    }
  }

  template <int W>
  FASTRES_HD void sum_tile(int64_t chunk, int64_t c, int64_t width) const {
    const int64_t first = part.first_row(chunk), last = part.first_row(chunk + 1);
    float shift[kTile], fa[kTile], fb[kTile];
    double sa[kTile], sb[kTile];
    const float* m = shift;
    if constexpr (Term::kStatistics) {
      if (last - first >= kShiftElements) {
        choose_shift<W, kShiftElements>(first * part.channels + c, width, shift);
      } else {
        choose_shift<W, 1>(first * part.channels + c, width, shift);
      }
    } else {
      m = centre + c;
    }
    for (int64_t j = 0; j < width; ++j) sa[j] = sb[j] = 0;

    for (int64_t row = first; row < last;) {
      const int64_t stop = row + kFlush < last ? row + kFlush : last;
      for (int64_t j = 0; j < width; ++j) fa[j] = fb[j] = 0;
      // Four rows at a time read and write the sums in L1 a quarter as often. Not with the gradients' four streams:
      // sixteen at once are more than the prefetcher follows (60 % slower at 256 channels of 56x56).
      if constexpr (Term::kStatistics) {
        for (; row + 4 <= stop; row += 4) add_rows<W, 4>(row * part.channels + c, width, c, m, fa, fb);
      }
      for (; row < stop; ++row) add_rows<W, 1>(row * part.channels + c, width, c, m, fa, fb);
      for (int64_t j = 0; j < width; ++j) {
        sa[j] += fa[j];
        sb[j] += fb[j];
      }
    }

    double* out_a = a + chunk * part.channels + c;
    double* out_b = b + chunk * part.channels + c;
    const double count = static_cast<double>(last - first);
    for (int64_t j = 0; j < width; ++j) {
      if constexpr (Term::kStatistics) {
        const Moments moments = Moments::shifted(count, shift[j], sa[j], sb[j]);
        out_a[j] = moments.sum;
        out_b[j] = moments.m2;
      } else {
        out_a[j] = sa[j];
        out_b[j] = sb[j];
      }
    }
  }

  template <int W, int R>
  FASTRES_HD void choose_shift(int64_t i, int64_t width, float* shift) const {
    int64_t j = 0;
    for (; j + W <= width; j += W) store<W>(shift + j, Term::template shift<W>(mean_of_rows<W, R>(i + j)));
    for (; j < width; ++j) shift[j] = Term::template shift<1>(mean_of_rows<1, R>(i + j));
  }

  // By halves: exact for a constant, and for integers.
  template <int W, int R>
  FASTRES_HD Float<W> mean_of_rows(int64_t i) const {
    if constexpr (R == 1) {
      return load<W>(term.x + i);
    } else {
      return mean_of_rows<W, R / 2>(i) * 0.5f + mean_of_rows<W, R / 2>(i + R / 2 * part.channels) * 0.5f;
    }
  }

  template <int W, int R>
  FASTRES_HD void add_rows(int64_t i, int64_t width, int64_t c, const float* m, float* fa, float* fb) const {
    int64_t j = 0;
    for (; j + W <= width; j += W) add_column<W, R>(i + j, c + j, m + j, fa + j, fb + j);
    for (; j < width; ++j) add_column<1, R>(i + j, c + j, m + j, fa + j, fb + j);
  }

  template <int W, int R>
  FASTRES_HD void add_column(int64_t i, int64_t c, const float* m, float* fa, float* fb) const {
    const auto p = term.template parameters<W, false>(m, c);
    Float<W> va{}, vb{};
    for (int r = 0; r < R; ++r) term.template add<W>(i + r * part.channels, p, va, vb);
    store<W>(fa, load<W>(fa) + va);
    store<W>(fb, load<W>(fb) + vb);
  }
};

template <class Map>
struct MapRows {
  Map map;
  Partition part;
  bool cached;  // what the pass reads and writes stays in the last-level cache

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const MapRows own = *this;  // in registers: what is stored might be a part of *this, for all that a compiler knows
    const bool vectors = part.channels % W == 0 && part.tile % W == 0;
    if (vectors && map.in_place()) {
      own.template run_tiles<W, 1, false>(begin, end);
    } else if (vectors && cached) {
      // Two rows at a time read the parameters half as often. Not from memory: twice the streams are more than the
      // prefetcher follows.
      own.template run_tiles<W, 2, false>(begin, end);
    } else if (vectors && map.template is_aligned<W>()) {
      own.template run_tiles<W, 1, true>(begin, end);
      end_stream();
    } else {
      own.template run_tiles<W, 0, false>(begin, end);
    }
  }

  // R rows at a time; 0: rows of any width.
  template <int W, int R, bool kStream>
  FASTRES_HD void run_tiles(int64_t begin, int64_t end) const {
    for (int64_t task = end - 1; task >= begin; --task) {
      const int64_t chunk = task / part.tiles, c = task % part.tiles * part.tile;
      const int64_t width = part.tile < part.channels - c ? part.tile : part.channels - c;
      const int64_t last = part.first_row(chunk + 1);
      int64_t row = part.first_row(chunk);
      if constexpr (R == 0) {
        for (; row < last; ++row) map_run<W, false>(map, row * part.channels + c, width, c);
      } else {
        for (; row + R <= last; row += R) map_rows<W, R, kStream>(row * part.channels + c, width, c);
        for (; row < last; ++row) map_rows<W, 1, kStream>(row * part.channels + c, width, c);
      }
    }
  }

  template <int W, int R, bool kStream>
  FASTRES_HD void map_rows(int64_t i, int64_t width, int64_t c) const {
    for (int64_t k = 0; k < width; k += W) {
      const auto p = map.template parameters<W, false>(c + k);
      for (int r = 0; r < R; ++r) map.template at<W, kStream>(i + r * part.channels + k, p);
    }
  }
};

// Partial sums to parameters, a block of channels a task.
template <class Channel>
struct FinishRows {
  Channel channel;
  Partition part;
  const double *a, *b;  // [chunks, C]; null: there are no sums, the statistics are given
  bool wants_parameters;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t c = block * kChannelBlock;
      const int64_t width = kChannelBlock < part.channels - c ? kChannelBlock : part.channels - c;
      if (a) merge(c, width);
      if (!wants_parameters) continue;
      for (int64_t j = 0; j < width; ++j) channel.parameters(c + j);
    }
  }

  FASTRES_HD void merge(int64_t c, int64_t width) const {
    double sa[kChannelBlock] = {}, sb[kChannelBlock] = {}, mean[kChannelBlock];
    for (int64_t chunk = 0; chunk < part.chunks; ++chunk) {
      const int64_t i = chunk * part.channels + c;
      for (int64_t j = 0; j < width; ++j) {
        sa[j] += a[i + j];
        sb[j] += b[i + j];
      }
    }
    if constexpr (std::is_same_v<Channel, ForwardChannel>) {
      // The squared deviations inside the chunks, sb, lack those of the chunks' means.
      const double count = static_cast<double>(part.rows);
      for (int64_t j = 0; j < width; ++j) mean[j] = sa[j] / count;
      for (int64_t chunk = 0; chunk < part.chunks; ++chunk) {
        const int64_t i = chunk * part.channels + c;
        const double n = static_cast<double>(part.first_row(chunk + 1) - part.first_row(chunk)), inverse_n = 1 / n;
        for (int64_t j = 0; j < width; ++j) {
          const double delta = a[i + j] - n * mean[j];  // exactly 0 for a constant channel
          sb[j] += delta * delta * inverse_n;
        }
      }
      for (int64_t j = 0; j < width; ++j) channel.statistics(c + j, {count, sa[j], sb[j]});
    } else {
      for (int64_t j = 0; j < width; ++j) channel.sums(c + j, sa[j], sb[j]);
    }
  }
};

}  // namespace fastres
