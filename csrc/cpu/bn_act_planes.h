// The passes of bn_act over NCHW: x is [N, C, HW]. A task is a group of neighboring channels and does both passes:
// what it reads stays in L2 between them. One channel where planes are large, more where they are small, so that what
// is contiguous in an image is worth prefetching (twice as fast at 7x7). At most C threads have work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/bn_act_terms.h"

namespace fastres {

constexpr int64_t kGroup = 64;             // channels of a task at most
constexpr int64_t kGroupElements = 16384;  // elements of a task of small planes, about: five streams of fp32 fit in L2
constexpr int64_t kGroupRun = 512;         // elements of such a task in one image at least
constexpr int64_t kRun = 4096;             // elements summed in fp32 lanes before they go to fp64

struct Planes {
  int64_t batch, channels, size, group;

  Planes(int64_t batch, int64_t channels, int64_t size) : batch(batch), channels(channels), size(size) {
    group = std::clamp<int64_t>(std::max(kGroupElements / (batch * size), kGroupRun / size), 1, kGroup);
  }
  int64_t tasks() const { return (channels + group - 1) / group; }
  FASTRES_HD int64_t offset(int64_t n, int64_t c) const { return (n * channels + c) * size; }
};

// The two sums of one channel, as lanes.
template <int W>
struct LaneSums {
  Float<W> a, b;
  float tail_a, tail_b;

  template <class Term>
  FASTRES_HD void add(const Term& term, int64_t i, int64_t n, int64_t c, const float* centre) {
    const auto wide = term.template parameters<W, true>(centre, c);
    const auto narrow = term.template parameters<1, true>(centre, c);
    Float<W> a0 = a, b0 = b, a1{}, b1{}, a2{}, b2{}, a3{}, b3{};  // independent sums hide the latency of an addition
    int64_t k = 0;
    for (; k + 4 * W <= n; k += 4 * W) {
      term.template add<W>(i + k, wide, a0, b0);
      term.template add<W>(i + k + W, wide, a1, b1);
      term.template add<W>(i + k + 2 * W, wide, a2, b2);
      term.template add<W>(i + k + 3 * W, wide, a3, b3);
    }
    for (; k + W <= n; k += W) term.template add<W>(i + k, wide, a0, b0);
    a = (a0 + a1) + (a2 + a3);
    b = (b0 + b1) + (b2 + b3);
    for (; k < n; ++k) term.template add<1>(i + k, narrow, tail_a, tail_b);
  }
  FASTRES_HD double total_a() const { return static_cast<double>(sum_lanes<W>(a)) + tail_a; }
  FASTRES_HD double total_b() const { return static_cast<double>(sum_lanes<W>(b)) + tail_b; }
};

template <class Term, class Map, class Channel>
struct GroupPasses {
  Term term;
  Map map;
  Channel channel;
  Planes planes;
  const float* mean;  // [C], the centre of the gradients' sums
  bool wants_sums, wants_map;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    const Map own = map;  // in registers, as in MapRows
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task * planes.group;
      const int64_t width = planes.group < planes.channels - c ? planes.group : planes.channels - c;
      if (Term::kNeedsParameters) set_parameters(c, width);
      if (wants_sums) sum_group<W>(c, width);
      if (!Term::kNeedsParameters) set_parameters(c, width);
      if (!wants_map) continue;
      for (int64_t n = planes.batch - 1; n >= 0; --n) {
        for (int64_t j = 0; j < width; ++j) map_run<W, true>(own, planes.offset(n, c + j), planes.size, c + j);
      }
    }
  }

  FASTRES_HD void set_parameters(int64_t c, int64_t width) const {
    for (int64_t j = 0; j < width; ++j) channel.parameters(c + j);
  }

  template <int W>
  FASTRES_HD void sum_group(int64_t c, int64_t width) const {
    LaneSums<W> lanes[kGroup];
    Moments total[kGroup];  // of the gradients: sum and m2 are the two sums
    float centre[kGroup];
    for (int64_t j = 0; j < width; ++j) {
      lanes[j] = LaneSums<W>{};
      total[j] = {0, 0, 0};
      centre[j] = first_centre(c + j);
    }
    int64_t pending = 0, limit = Term::kStatistics ? kRun / 8 : kRun;  // the first shift is a guess: leave it early
    for (int64_t n = 0; n < planes.batch; ++n) {
      for (int64_t k = 0; k < planes.size;) {
        const int64_t run = limit < planes.size - k ? limit : planes.size - k;
        for (int64_t j = 0; j < width; ++j) lanes[j].add(term, planes.offset(n, c + j) + k, run, c + j, centre + j);
        k += run;
        pending += run;
        if (pending < limit && !(n == planes.batch - 1 && k == planes.size)) continue;
        for (int64_t j = 0; j < width; ++j) {
          flush(static_cast<double>(pending), lanes[j].total_a(), lanes[j].total_b(), total[j], centre[j]);
          lanes[j] = LaneSums<W>{};
        }
        pending = 0;
        limit = kRun;
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      if constexpr (Term::kStatistics) {
        channel.statistics(c + j, total[j]);
      } else {
        channel.sums(c + j, total[j].sum, total[j].m2);
      }
    }
  }

  static FASTRES_HD void flush(double count, double a, double b, Moments& total, float& centre) {
    if constexpr (Term::kStatistics) {
      const Moments block = Moments::shifted(count, centre, a, b);
      if (total.count == 0) {
        total = block;
      } else {
        total.merge(block);
      }
      centre = Term::template shift<1>(static_cast<float>(total.sum / total.count));
    } else {
      total.sum += a;
      total.m2 += b;
    }
  }

  FASTRES_HD float first_centre(int64_t c) const {
    if constexpr (Term::kStatistics) {
      int64_t n = kShiftElements;
      while (n > planes.size) n /= 2;
      double sum = 0;
      for (int64_t k = 0; k < n; ++k) sum += load<1>(term.x + planes.offset(0, c) + k);
      return Term::template shift<1>(static_cast<float>(sum / static_cast<double>(n)));
    } else {
      return mean[c];
    }
  }
};

}  // namespace fastres
