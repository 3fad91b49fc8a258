// The maths of one element, in plain C++: shared by host and device code, includes nothing of torch.
//
//   forward    z = (x - mean) * scale + bias [+ residual],  scale = weight * rstd,  rstd = 1 / sqrt(var + eps)
//              y = act(z)
//   backward   g  = act'(y) * dy
//              dx = scale * ((g - mean_g) - (x - mean) * slope)           training: the batch statistics depend on x
//              dx = scale * g                                             eval: they do not
//              mean_g = sum g / n,  slope = rstd^2 * sum g * (x - mean) / n
//
// V is float, or on the host a vector of floats: every line reads the same for both.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTRES_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// always_inline, not only inline: a kernel is compiled once per instruction set through target attributes, which a
// function that is called instead of inlined would not inherit.
#define FASTRES_HD inline __attribute__((always_inline))
#else
#define FASTRES_HD inline
#endif

namespace fastres {

// The mean is subtracted first. Folding it into a shift (x * scale + shift) saves nothing here and loses every digit
// where |mean| >> std; this form also gives exactly `bias` for a constant channel.
template <class V>
FASTRES_HD V affine(V x, V mean, V scale, V bias) {
  return (x - mean) * scale + bias;
}

// ReLU is floor = 0, no activation is floor = -inf. The comparison is false for NaN and for -0.0, which pass, as in
// torch.relu.
template <class V>
FASTRES_HD V activate(V z, V floor) {
  return z < floor ? floor : z;
}

// The gradient through ReLU, from its output: y > 0 or y is NaN lets dy through, as threshold_backward does.
template <class V>
FASTRES_HD V relu_gradient(V dy, V y) {
  return y <= V{} ? V{} : dy;
}

// slope * (x - mean) comes before the product with scale: slope * scale alone can overflow where rstd is large.
template <class V>
FASTRES_HD V input_gradient(V g, V x, V mean, V scale, V mean_g, V slope) {
  return ((g - mean_g) - (x - mean) * slope) * scale;
}

// rstd, both operations correctly rounded: the approximate rsqrt is 2 units off and flushes subnormals. F is float on
// the device, double on the host.
template <class F>
FASTRES_HD F reciprocal_std(F var, F eps) {
  return F(1) / std::sqrt(var + eps);
}

// Mean and m2 = sum of squared deviations of a set of values, in fp32 (Welford 1962; merged as by Chan, Golub and LeVeque
// 1983). Equal values give an m2 of exactly 0. fp32 values should be differences from one value of their channel: where
// |mean| >> std, fp32 holds those closely enough. Values whose squares overflow give an m2 of inf or NaN (settled_m2).
struct Welford {
  static FASTRES_HD void add(float value, float inverse_count, float& mean, float& m2) {  // count: with this value
    const float delta = value - mean;
    mean += delta * inverse_count;
    m2 += delta * (value - mean);
  }
  // N values at once: a third of the instructions. The mean must be near them, as one of them is.
  template <int N>
  static FASTRES_HD void add(const float (&value)[N], float inverse_count, float& mean, float& m2) {
    float sum = 0, squares = 0;  // of the differences from the mean so far
    for (int i = 0; i < N; ++i) {
      const float delta = value[i] - mean;
      sum += delta;
      squares += delta * delta;
    }
    const float step = sum * inverse_count;
    mean += step;
    m2 += squares - sum * step;
  }
  static FASTRES_HD void merge(float& count, float& mean, float& m2, float other_count, float other_mean,
                               float other_m2) {
    if (other_count == 0) return;
    const float total = count + other_count, share = other_count / total, delta = other_mean - mean;
    mean += delta * share;
    m2 += other_m2 + delta * (delta * (count * share));  // count 0 stays 0, where delta * delta would be inf
    count = total;
  }
};

// NaN from an overflow is what it stands for, infinity: NaN or inf among the values themselves shows in the mean.
FASTRES_HD float settled_m2(float mean, float m2) {
  return m2 != m2 && mean - mean == 0 ? INFINITY : m2;
}

// Two plain sums: of g and of g * (x - mean).
struct Sums {
  static FASTRES_HD void merge(float& count, float& a, float& b, float other_count, float other_a, float other_b) {
    count += other_count;
    a += other_a;
    b += other_b;
  }
};

// Count, sum and sum of squared deviations of a set of values. Sums, not means, are merged: they stay exact for
// integer-valued inputs, and equal means give a delta of exactly 0.
struct Moments {
  double count, sum, m2;

  // Of the values x_i, from a = sum(x_i - shift) and b = sum((x_i - shift)^2).
  static FASTRES_HD Moments shifted(double count, double shift, double a, double b) {
    const double inverse_count = 1 / count;  // leaves a loop over channels
    const double m2 = b - a * a * inverse_count;
    return {count, count * shift + a, m2 < 0 ? 0 : m2};  // rounding may leave -1e-20; NaN passes
  }

  FASTRES_HD void merge(const Moments& other) {  // Chan, Golub, LeVeque 1983; neither may be empty
    const double delta = other.sum / other.count - sum / count;
    m2 += other.m2 + delta * delta * (count * other.count / (count + other.count));
    sum += other.sum;
    count += other.count;
  }
};

// The 16-bit types as storage. Arithmetic is done in fp32, and a result is rounded once, to nearest even.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// fp32 bits to bf16 bits, in the low half. I is a 32-bit signed integer or a vector of them.
template <class I>
FASTRES_HD I bfloat16_bits(I f) {
  const I rounded = f + 0x7fff + ((f >> 16) & 1);
  const I quiet_nan = f | 0x400000;  // rounding could carry a NaN's payload into infinity
  return (((f & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded) >> 16) & 0xffff;
}

}  // namespace fastres
