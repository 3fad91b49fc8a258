// bn_act's backward kernels: the two sums over each channel (a part per block), their merge, and dx.
//
// Bytes in training: dy, y and x for the sums; the same again for dx, which is written. With a residual's gradient the
// first pass writes g and the second reads it in place of dy and y: 7 either way. In eval mode dx needs no sum and is
// written by the pass that sums, or by the only one where no parameter has a gradient.
#include "cuda/add_relu.h"
#include "cuda/bn_act.h"
#include "cuda/bn_act_tile.cuh"

namespace fastres {
namespace {

// Vectors, or single elements, of up to three tensors under way a thread: 96 bytes.
FASTRES_HD constexpr int unroll(int lanes) { return lanes == 1 ? 4 : 2; }
constexpr int kSumsBlocks = 2;   // a multiprocessor: 128 registers
constexpr int kApplyBlocks = 2;  // likewise
constexpr int kApplyWaves = 4;   // as in the forward

// Which tensors a call has is asked once a row tile, not compiled: a branch that a whole grid takes costs nothing here.
template <class T, int V, bool kPlanes>
__global__ void __launch_bounds__(kThreads, kSumsBlocks) sums_kernel(Tiling t, Backward b, float* scratch) {
  constexpr int U = unroll(V);
  __shared__ float shared[shared_floats<V>(kThreads)];
  const T *dy = static_cast<const T*>(b.dy), *x = static_cast<const T*>(b.x), *y = static_cast<const T*>(b.y);
  T *dx = static_cast<T*>(b.dx), *dresidual = static_cast<T*>(b.dresidual);
  const Place p = t.place(blockIdx.x, threadIdx.x);
  const Channels channels = t.channels_of(p);
  const bool has_work = t.has_work(p);
  float mean[V], scale[V], sum_g[V], sum_gx[V], count = 0;
  load_lanes<V>(b.mean, channels, has_work, 0.f, mean);
  load_scale<V>(b.weight, b.var, b.eps, channels, has_work && dx, scale);
#pragma unroll
  for (int k = 0; k < V; ++k) sum_g[k] = sum_gx[k] = 0;
  walk<U, false>(t, p, [&](const int64_t (&offset)[U]) {
    Pack<T, V> g_pack[U], y_pack[U] = {}, x_pack[U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (offset[u] < 0) continue;
      g_pack[u] = load_pack<T, V>(dy + offset[u]);
      if (y) y_pack[u] = load_pack<T, V>(y + offset[u]);
      if (x) x_pack[u] = load_pack<T, V>(x + offset[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (offset[u] < 0) continue;
      float g[V], value[V];
      widen<T, V>(g_pack[u], g);
      if (y) {
        widen<T, V>(y_pack[u], value);
#pragma unroll
        for (int k = 0; k < V; ++k) g[k] = relu_gradient(g[k], value[k]);
      }
      widen<T, V>(x_pack[u], value);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        sum_g[k] += g[k];
        sum_gx[k] += g[k] * (value[k] - mean[k]);
      }
      if (dresidual) store_pack<T, V>(dresidual + offset[u], narrow<T, V>(g));
      if (dx) {
#pragma unroll
        for (int k = 0; k < V; ++k) g[k] *= scale[k];
        store_pack<T, V>(dx + offset[u], narrow<T, V>(g));
      }
    }
  });
  write_part<Sums, V, kPlanes>(t, p, count, sum_g, sum_gx, shared, scratch);
}

// dbias = sum g, dweight = rstd * sum g * (x - mean), and what dx takes from them: mean_g and slope, [2, C].
__global__ void __launch_bounds__(kMergeThreads)
    sums_merge_kernel(const float* scratch, int64_t parts, View view, Backward b, float* coefficients) {
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x % kMergeChannels;
  float count, sum_g, sum_gx;
  merge_parts<Sums>(scratch, parts, view.channels, channel, count, sum_g, sum_gx);
  if (threadIdx.x >= kMergeChannels || channel >= view.channels) return;
  const float n = static_cast<float>(view.per_channel());
  const float rstd = reciprocal_std(b.var[channel], b.eps), dweight = sum_gx * rstd;
  if (b.dbias) b.dbias[channel] = sum_g;
  if (b.dweight) b.dweight[channel] = dweight;
  if (coefficients) {
    coefficients[channel] = sum_g / n;
    coefficients[view.channels + channel] = dweight / n * rstd;
  }
}

template <class T, int V, bool kBatch>
__global__ void __launch_bounds__(kThreads, kApplyBlocks)
    backward_kernel(Tiling t, Backward b, const float* coefficients) {
  constexpr int U = unroll(V);
  const T *dy = static_cast<const T*>(b.dy), *x = static_cast<const T*>(b.x), *y = static_cast<const T*>(b.y);
  T *dx = static_cast<T*>(b.dx), *dresidual = static_cast<T*>(b.dresidual);
  const Place p = t.place(blockIdx.x, threadIdx.x);
  const Channels channels = t.channels_of(p);
  const bool has_work = t.has_work(p);
  float scale[V], mean[V], mean_g[V], slope[V];
  load_scale<V>(b.weight, b.var, b.eps, channels, has_work, scale);
  if constexpr (kBatch) {
    load_lanes<V>(b.mean, channels, has_work, 0.f, mean);
    load_lanes<V>(coefficients, channels, has_work, 0.f, mean_g);
    load_lanes<V>(coefficients + t.channels, channels, has_work, 0.f, slope);
  }
  walk<U, true>(t, p, [&](const int64_t (&offset)[U]) {
    Pack<T, V> g_pack[U], y_pack[U] = {}, x_pack[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (offset[u] < 0) continue;
      g_pack[u] = load_pack<T, V>(dy + offset[u]);
      if (y) y_pack[u] = load_pack<T, V>(y + offset[u]);
      if constexpr (kBatch) x_pack[u] = load_pack<T, V>(x + offset[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (offset[u] < 0) continue;
      float g[V], value[V];
      widen<T, V>(g_pack[u], g);
      if (y) {
        widen<T, V>(y_pack[u], value);
#pragma unroll
        for (int k = 0; k < V; ++k) g[k] = relu_gradient(g[k], value[k]);
      }
      if (dresidual) store_pack<T, V>(dresidual + offset[u], narrow<T, V>(g));
      if constexpr (kBatch) widen<T, V>(x_pack[u], value);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if constexpr (kBatch) {
          g[k] = input_gradient(g[k], value[k], mean[k], scale[k], mean_g[k], slope[k]);
        } else {
          g[k] *= scale[k];
        }
      }
      store_pack<T, V>(dx + offset[u], narrow<T, V>(g));
    }
  });
}

bool all_aligned(const Backward& b) {
  return is_aligned16(address_of(b.dy) | address_of(b.x) | address_of(b.y) | address_of(b.dx) |
                      address_of(b.dresidual));
}

Tiling sums_tiling(const Backward& b, const Stream& on) {
  const int lanes = b.view.lanes(size_of(b.type), all_aligned(b));
  return Tiling::of(b.view, lanes, unroll(lanes), 128 / lanes, kSumsBlocks * multiprocessors(on.device));
}

int64_t parts_floats(const Backward& b, const Tiling& t) { return t.splits * (2 * b.view.channels + 1); }

void apply(const Backward& b, const float* coefficients, const Stream& on) {
  const int lanes = b.view.lanes(size_of(b.type), all_aligned(b));
  const Tiling t = Tiling::of(b.view, lanes, unroll(lanes), lanes == 1 ? kThreads : 32,
                              kApplyWaves * kApplyBlocks * multiprocessors(on.device));
  with_type(b.type, [&](auto type) {
    using T = decltype(type);
    with_lanes<T>(lanes, [&](auto v) {
      with_flag(b.training, [&](auto batch) {
        launch("bn_act_backward", on, t.blocks(), t.threads(), &backward_kernel<T, v.value, batch.value>, t, b,
               coefficients);
      });
    });
  });
}

}  // namespace

int64_t sums_scratch(const Backward& b, const Stream& on) {
  return parts_floats(b, sums_tiling(b, on)) + 2 * b.view.channels;
}

void bn_act_gradients(const Backward& b, float* scratch, const Stream& on) {
  const int64_t n = b.view.images * b.view.line();
  if (!b.needs_sums()) {
    if (b.dx) return apply(b, nullptr, on);
    if (!b.dresidual) return;
    // the residual's gradient alone: nothing of the normalization is needed
    if (b.y) return add_relu_gradient(b.type, b.dy, b.y, b.dresidual, n, on);
    const size_t bytes = static_cast<size_t>(n * size_of(b.type));
    return check_cuda(cudaMemcpyAsync(b.dresidual, b.dy, bytes, cudaMemcpyDeviceToDevice, on.stream), "cudaMemcpyAsync",
                      on.device);
  }

  const bool couples = b.training && b.dx;  // dx of one element depends on the sums over its channel
  Backward first = b;
  if (!couples && !b.dweight) first.x = nullptr;
  if (b.training) first.dx = nullptr;
  const Tiling t = sums_tiling(b, on);
  float* coefficients = scratch + parts_floats(b, t);
  with_type(b.type, [&](auto type) {
    using T = decltype(type);
    with_lanes<T>(t.lanes, [&](auto lanes) {
      with_flag(b.view.plane > 1, [&](auto planes) {
        launch("bn_act_backward_sums", on, t.blocks(), t.threads(), &sums_kernel<T, lanes.value, planes.value>, t,
               first, scratch);
      });
    });
  });
  launch("bn_act_backward_merge", on, ceil_div(b.view.channels, kMergeChannels), merge_threads(t.splits),
         &sums_merge_kernel, static_cast<const float*>(scratch), t.splits, b.view, b, couples ? coefficients : nullptr);
  if (!couples) return;

  Backward second = b;
  second.dresidual = nullptr;
  if (b.dresidual) {  // g is there: one read in place of dy and y
    second.dy = b.dresidual;
    second.y = nullptr;
  }
  apply(second, coefficients, on);
}

void list_bn_act_backward(std::vector<Kernel>& kernels) {
  for_each_variant([&](auto type, auto lanes) {
    using T = decltype(type);
    constexpr int V = lanes.value;
    const auto add = [&](const char* name, auto* function, const char* variant = "") {
      kernels.push_back(kernel(kernel_name<T>(name, V, variant), function, kThreads));
    };
    add("bn_act_backward_sums", &sums_kernel<T, V, false>);
    add("bn_act_backward_sums", &sums_kernel<T, V, true>, ", planes");
    add("bn_act_backward", &backward_kernel<T, V, false>, ", eval");
    add("bn_act_backward", &backward_kernel<T, V, true>);
  });
  kernels.push_back(kernel("bn_act_backward_merge", &sums_merge_kernel, kMergeThreads));
}

}  // namespace fastres
