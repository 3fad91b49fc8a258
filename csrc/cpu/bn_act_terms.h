// bn_act on one element and on one channel: what the passes over rows and over planes (bn_act_rows.h, bn_act_planes.h)
// are made of. Formulas in element.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/isa.h"

namespace fastres {

constexpr int64_t kShiftElements = 8;  // elements whose mean is a first shift; a power of two keeps integers exact

template <int W, bool kBroadcast>
FASTRES_HD Float<W> parameter(const float* p, int64_t c) {
  if constexpr (kBroadcast) return broadcast<W>(p[c]);
  return load<W>(p + c);
}

// Where the gradient through ReLU finds the sign of the output: nowhere (no ReLU), in y, or in x again, by the formula
// of the forward. From x it is a stream less, and y need not be kept; with a residual that would be one more.
enum class Mask { kNone, kOutput, kInput };

// ---- Terms: what an element adds to the two sums of its channel. Its parameters are those of a vector of channels in
// NHWC, of one channel broadcast in NCHW; `centre` is the shift, or the mean.

template <class T>
struct StatisticsTerm {
  static constexpr bool kStatistics = true, kNeedsParameters = false;
  const T* x;

  template <int W>
  struct Parameters {
    Float<W> centre;
  };
  template <int W, bool kBroadcast>
  FASTRES_HD Parameters<W> parameters(const float* centre, int64_t) const {
    return {parameter<W, kBroadcast>(centre, 0)};
  }
  template <int W>
  FASTRES_HD void add(int64_t i, const Parameters<W>& p, Float<W>& a, Float<W>& b) const {
    const Float<W> d = load<W>(x + i) - p.centre;
    a += d;
    b += d * d;
  }
  // A shift of T's own precision makes x - shift exact for 16-bit T. Any other rounds equal values the same way, so
  // that the errors add up instead of cancelling.
  template <int W>
  static FASTRES_HD Float<W> shift(Float<W> mean) {
    return rounded_to<W, T>(mean);
  }
};

// With kStore, g goes to dresidual on the way, and the second pass reads it in place of dy and y: one stream less.
template <class T, Mask kMask, bool kStore>
struct GradientTerm {
  static constexpr bool kStatistics = false, kNeedsParameters = kMask == Mask::kInput;  // before the sums
  const T* dy;
  const T* y;
  const T* x;
  T* dresidual;
  const float* scale;  // [C], read by Mask::kInput alone, as bias
  const float* bias;   // [C]

  template <int W>
  struct Parameters {
    Float<W> centre, scale, bias;
  };
  template <int W, bool kBroadcast>
  FASTRES_HD Parameters<W> parameters(const float* centre, int64_t c) const {
    const Float<W> m = parameter<W, kBroadcast>(centre, 0);
    if constexpr (kMask != Mask::kInput) return {m, m, m};
    return {m, parameter<W, kBroadcast>(scale, c), parameter<W, kBroadcast>(bias, c)};
  }
  template <int W>
  FASTRES_HD void add(int64_t i, const Parameters<W>& p, Float<W>& a, Float<W>& b) const {
    const Float<W> value = load<W>(x + i);
    Float<W> g = load<W>(dy + i);
    if constexpr (kMask == Mask::kOutput) g = relu_gradient(g, load<W>(y + i));
    if constexpr (kMask == Mask::kInput) g = relu_gradient(g, affine(value, p.centre, p.scale, p.bias));
    if constexpr (kStore) store<W>(dresidual + i, g);
    a += g;
    b += g * (value - p.centre);
  }
};

// ---- Maps: an element's outputs from its inputs and its channel's parameters.

template <class T, bool kResidual>
struct ForwardMap {
  const T* x;
  const T* residual;
  T* y;
  const float* mean;   // [C]
  const float* scale;  // [C]
  const float* bias;   // [C]
  float floor;

  template <int W>
  struct Parameters {
    Float<W> mean, scale, bias;
  };
  template <int W, bool kBroadcast>
  FASTRES_HD Parameters<W> parameters(int64_t c) const {
    return {parameter<W, kBroadcast>(mean, c), parameter<W, kBroadcast>(scale, c), parameter<W, kBroadcast>(bias, c)};
  }
  template <int W, bool kStream = false>
  FASTRES_HD void at(int64_t i, const Parameters<W>& p) const {
    Float<W> z = affine(load<W>(x + i), p.mean, p.scale, p.bias);
    if constexpr (kResidual) z += load<W>(residual + i);
    put<W, kStream>(y + i, activate(z, broadcast<W>(floor)));
  }
  template <int W>
  FASTRES_HD bool is_aligned() const {
    return fastres::is_aligned<W>(y);
  }
  FASTRES_HD bool in_place() const { return x == y; }
};

// dx or dresidual may be dy.
template <class T, Mask kMask, bool kBatch, bool kStore>
struct BackwardMap {
  const T* dy;
  const T* y;
  const T* x;
  T* dx;
  T* dresidual;
  const float* mean;    // [C]
  const float* scale;   // [C]
  const float* mean_g;  // [C]
  const float* slope;   // [C]
  const float* bias;    // [C], read by Mask::kInput alone

  template <int W>
  struct Parameters {
    Float<W> mean, scale, mean_g, slope, bias;
  };
  template <int W, bool kBroadcast>
  FASTRES_HD Parameters<W> parameters(int64_t c) const {
    const Float<W> s = parameter<W, kBroadcast>(scale, c);
    Parameters<W> p{s, s, s, s, s};
    if constexpr (kBatch || kMask == Mask::kInput) p.mean = parameter<W, kBroadcast>(mean, c);
    if constexpr (kMask == Mask::kInput) p.bias = parameter<W, kBroadcast>(bias, c);
    if constexpr (kBatch) {
      p.mean_g = parameter<W, kBroadcast>(mean_g, c);
      p.slope = parameter<W, kBroadcast>(slope, c);
    }
    return p;
  }
  template <int W, bool kStream = false>
  FASTRES_HD void at(int64_t i, const Parameters<W>& p) const {
    Float<W> g = load<W>(dy + i), value = g;
    if constexpr (kBatch || kMask == Mask::kInput) value = load<W>(x + i);
    if constexpr (kMask == Mask::kOutput) g = relu_gradient(g, load<W>(y + i));
    if constexpr (kMask == Mask::kInput) g = relu_gradient(g, affine(value, p.mean, p.scale, p.bias));
    if constexpr (kStore) put<W, kStream>(dresidual + i, g);
    if constexpr (kBatch) {
      put<W, kStream>(dx + i, input_gradient(g, value, p.mean, p.scale, p.mean_g, p.slope));
    } else {
      put<W, kStream>(dx + i, g * p.scale);
    }
  }
  template <int W>
  FASTRES_HD bool is_aligned() const {
    return fastres::is_aligned<W>(dx) && (!kStore || fastres::is_aligned<W>(dresidual));
  }
  FASTRES_HD bool in_place() const { return dx == dy || (kStore && dresidual == dy); }
};

template <int W, bool kBroadcast, class Map>
FASTRES_HD void map_run(const Map& map, int64_t i, int64_t n, int64_t c) {
  int64_t k = 0;
  if constexpr (kBroadcast) {
    const auto p = map.template parameters<W, true>(c);
    for (; k + W <= n; k += W) map.template at<W>(i + k, p);
  } else {
    for (; k + W <= n; k += W) map.template at<W>(i + k, map.template parameters<W, false>(c + k));
  }
  if (k == n) return;
  // The last vector overlaps the one before it, and the same values are written twice: not where they were read.
  if (n < W || map.in_place()) {
    for (; k < n; ++k) map.template at<1>(i + k, map.template parameters<1, kBroadcast>(kBroadcast ? c : c + k));
  } else {
    map.template at<W>(i + n - W, map.template parameters<W, kBroadcast>(kBroadcast ? c : c + n - W));
  }
}

// ---- The step between the passes.

struct ForwardChannel {
  const float* weight;      // [C] or null
  const float* bias_input;  // [C] or null
  float *mean, *var;        // [C], written in training
  float *scale, *bias;      // [C]
  double eps;

  FASTRES_HD void statistics(int64_t c, const Moments& m) const {
    mean[c] = static_cast<float>(m.sum / m.count);
    var[c] = static_cast<float>(m.m2 / m.count);
  }
  FASTRES_HD void parameters(int64_t c) const {
    scale[c] = static_cast<float>((weight ? weight[c] : 1.f) / std::sqrt(var[c] + eps));
    bias[c] = bias_input ? bias_input[c] : 0.f;
  }
};

struct BackwardChannel {
  const float *weight, *var;      // [C], weight or null
  const float* bias_input;        // [C] or null
  float *dweight, *dbias;         // [C] or null
  float *scale, *bias, *mean_g, *slope;  // [C]
  double eps, count;

  // sum_g = sum g, sum_gx = sum g * (x - mean)
  FASTRES_HD void sums(int64_t c, double sum_g, double sum_gx) const {
    const double rstd = 1 / std::sqrt(var[c] + eps);
    if (dbias) dbias[c] = static_cast<float>(sum_g);
    if (dweight) dweight[c] = static_cast<float>(sum_gx * rstd);
    mean_g[c] = static_cast<float>(sum_g / count);
    slope[c] = static_cast<float>(sum_gx * rstd * rstd / count);
  }
  FASTRES_HD void parameters(int64_t c) const {  // the forward's
    scale[c] = static_cast<float>((weight ? weight[c] : 1.f) / std::sqrt(var[c] + eps));
    bias[c] = bias_input ? bias_input[c] : 0.f;
  }
};

}  // namespace fastres
