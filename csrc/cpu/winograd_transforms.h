// The transforms of F(2x2, 3x3) and F(4x4, 3x3) along one side: B' of a tile's inputs, G of a weight, A' of its outputs;
// for the gradient of the weight A of the outputs' gradients and G' of the sum.
// docs/winograd.md has the points and what they are chosen for.
#pragma once

#include "element.h"

namespace fastres {

template <int M>
struct Transform;

template <>
struct Transform<2> {
  template <class V>
  static FASTRES_HD void input(const V* d, V* o) {
    o[0] = d[0] - d[2];
    o[1] = d[1] + d[2];
    o[2] = d[2] - d[1];
    o[3] = d[3] - d[1];
  }
  template <class V>
  static FASTRES_HD void output(const V* q, V* y) {
    y[0] = q[0] + (q[1] + q[2]);
    y[1] = (q[1] - q[2]) + q[3];
  }
  template <class V>
  static FASTRES_HD void weight(const V* g, V* o) {
    const V even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
    o[0] = g[0];
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = g[2];
  }
  template <class V>
  static FASTRES_HD void output_gradient(const V* z, V* o) {
    o[0] = z[0];
    o[1] = z[0] + z[1];
    o[2] = z[0] - z[1];
    o[3] = z[1];
  }
  template <class V>
  static FASTRES_HD void weight_gradient(const V* o, V* g) {
    const V even = (o[1] + o[2]) * 0.5f;
    g[0] = o[0] + even;
    g[1] = (o[1] - o[2]) * 0.5f;
    g[2] = even + o[3];
  }
};

template <>
struct Transform<4> {  // a^2 = 1/2, b^2 = 2
  static constexpr double kA = 0.70710678118654752440, kB = 1.41421356237309504880;
  template <class V>
  static FASTRES_HD void input(const V* d, V* o) {
    constexpr float a = kA, b = kB;
    const V even_a = d[4] - d[2] * 2.0f, odd_a = (d[3] - d[1] * 2.0f) * a;
    const V even_b = d[4] - d[2] * 0.5f, odd_b = (d[3] - d[1] * 0.5f) * b;
    o[0] = (d[4] - d[2] * 2.5f) + d[0];
    o[1] = even_a + odd_a;
    o[2] = even_a - odd_a;
    o[3] = even_b + odd_b;
    o[4] = even_b - odd_b;
    o[5] = (d[5] - d[3] * 2.5f) + d[1];
  }
  template <class V>
  static FASTRES_HD void output(const V* q, V* y) {
    constexpr float a = kA, b = kB, a3 = kA / 2, b3 = kB * 2;
    const V even_a = q[1] + q[2], odd_a = q[1] - q[2], even_b = q[3] + q[4], odd_b = q[3] - q[4];
    y[0] = (q[0] + even_a) + even_b;
    y[1] = odd_a * a + odd_b * b;
    y[2] = even_a * 0.5f + even_b * 2.0f;
    y[3] = odd_a * a3 + (odd_b * b3 + q[5]);
  }
  // Row p of G is (1, p, p^2) over the product of p - q for the other points q: 1, -3/2, -3/2, 6, 6.
  template <class V>
  static FASTRES_HD void weight(const V* g, V* o) {
    constexpr float third = -2.0 / 3, sixth = 1.0 / 6, a = kA * third, b = kB * sixth;
    const V even_a = (g[0] + g[2] * 0.5f) * third, odd_a = g[1] * a;
    const V even_b = (g[0] + g[2] * 2.0f) * sixth, odd_b = g[1] * b;
    o[0] = g[0];
    o[1] = even_a + odd_a;
    o[2] = even_a - odd_a;
    o[3] = even_b + odd_b;
    o[4] = even_b - odd_b;
    o[5] = g[2];
  }
};

template <int M>
constexpr int kEdge = M + 2;
template <int M>
constexpr int kTaps = kEdge<M> * kEdge<M>;

}  // namespace fastres
