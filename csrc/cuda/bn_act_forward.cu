// bn_act's forward kernels: statistics (a part per block), their merge, and y = act((x - mean) * scale + bias [+ r]).
//
// Bytes in training: x twice, y once, the residual once; in eval mode x, y, the residual. The statistics' scratch is 8
// bytes for each channel of a block's tile: 0.4 MB in all where 396 blocks have 128 channels each.
//
// Statistics run one Welford recurrence a lane, four rows at a time: no barrier and no shuffle in the loop. Counted in
// sm_90a's code, 9 instructions an element in fp16 (14 with a row at a time): two thirds of what 132 multiprocessors at 1.7
// GHz issue while they read 4.3 TB/s. A plain sum of squares would lose the variance where a channel's first value lies
// far from the others.
//
// It stops being good where a tensor is so small that three launches show, and where lines do not divide into vectors
// (channels_last with an odd C; NCHW with planes of fewer elements than a vector, or of more than a block's and odd).
#include <limits>

#include "cuda/bn_act.h"
#include "cuda/bn_act_tile.cuh"

namespace fastres {
namespace {

// Vectors, or single elements, under way a thread: 64 bytes, with a residual 128.
FASTRES_HD constexpr int unroll(int lanes) { return lanes == 1 ? 8 : 4; }
constexpr int kStatisticsBlocks = 3;  // a multiprocessor: 80 registers
constexpr int kApplyBlocks = 2;       // 128 registers
constexpr int kApplyWaves = 4;        // blocks more than fit at once: the hardware balances them, and each still has
                                      // rows enough to pay for reading its parameters

// fp32 values are taken as differences from their channel's first: where |mean| >> std, an fp32 mean is too coarse. Beside
// the spacing of 16-bit values it is not.
template <class T>
constexpr bool kShift = std::is_same_v<T, float>;

template <class T, int V, bool kPlanes>
__global__ void __launch_bounds__(kThreads, kStatisticsBlocks)
    statistics_kernel(Tiling t, const T* x, float* scratch) {
  constexpr int U = unroll(V);
  __shared__ float shared[shared_floats<V>(kThreads)];
  const Place p = t.place(blockIdx.x, threadIdx.x);
  const Channels channels = t.channels_of(p);
  const bool has_work = t.has_work(p);
  float shift[V], mean[V], m2[V], count = 0;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    shift[k] = kShift<T> && has_work ? widen(x[channels.of(k) * t.plane]) : 0.f;
    mean[k] = m2[k] = 0;
  }
  walk<U, false>(t, p, [&](const int64_t (&offset)[U]) {
    Pack<T, V> pack[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (offset[u] >= 0) pack[u] = load_pack<T, V>(x + offset[u]);
    }
    bool whole = true;
#pragma unroll
    for (int u = 0; u < U; ++u) whole = whole && offset[u] >= 0;
    if (whole) {
      const bool first = count == 0;
      count += U;
      const float inverse_count = __frcp_rn(count);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        float column[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          column[u] = widen_lane(pack[u], k);
          if (kShift<T>) column[u] -= shift[k];
        }
        if (first) mean[k] = column[0];
        Welford::add(column, inverse_count, mean[k], m2[k]);
      }
      return;
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (offset[u] < 0) continue;
      float value[V];
      widen<T, V>(pack[u], value);
      count += 1;
      const float inverse_count = __frcp_rn(count);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        Welford::add(kShift<T> ? value[k] - shift[k] : value[k], inverse_count, mean[k], m2[k]);
      }
    }
  });
  write_part<Welford, V, kPlanes>(t, p, count, mean, m2, shared, scratch);
}

// running = (1 - momentum) * running + momentum * value
__device__ __forceinline__ void move(float* running, float value, float momentum) {
  if (running) *running = (1 - momentum) * *running + momentum * value;
}

template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    statistics_merge_kernel(const T* x, const float* scratch, int64_t parts, View view, Statistics out) {
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x % kMergeChannels;
  float count, mean, m2;
  merge_parts<Welford>(scratch, parts, view.channels, channel, count, mean, m2);
  if (blockIdx.x == 0 && threadIdx.x == 0 && out.num_batches_tracked) ++*out.num_batches_tracked;
  if (threadIdx.x >= kMergeChannels || channel >= view.channels) return;
  const float n = static_cast<float>(view.per_channel());
  if (kShift<T>) mean += widen(x[channel * view.plane]);
  m2 = settled_m2(mean, m2);
  out.mean[channel] = mean;
  out.var[channel] = m2 / n;
  move(out.running_mean ? out.running_mean + channel : nullptr, mean, out.momentum);
  move(out.running_var ? out.running_var + channel : nullptr, m2 / (n - 1), out.momentum);
}

template <class T, int V, bool kResidual>
__global__ void __launch_bounds__(kThreads, kApplyBlocks) forward_kernel(Tiling t, Forward f, float floor) {
  constexpr int U = unroll(V);
  const T* x = static_cast<const T*>(f.x);
  const T* residual = static_cast<const T*>(f.residual);
  T* y = static_cast<T*>(f.y);
  const Place p = t.place(blockIdx.x, threadIdx.x);
  const Channels channels = t.channels_of(p);
  const bool has_work = t.has_work(p);
  float mean[V], scale[V], bias[V];
  load_lanes<V>(f.mean, channels, has_work, 0.f, mean);
  load_scale<V>(f.weight, f.var, f.eps, channels, has_work, scale);
  load_lanes<V>(f.bias, channels, has_work, 0.f, bias);
  if (f.mean_copy && p.split == 0 && p.y == 0 && has_work) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      f.mean_copy[channels.of(k)] = mean[k];
      f.var_copy[channels.of(k)] = f.var[channels.of(k)];
    }
  }
  walk<U, true>(t, p, [&](const int64_t (&offset)[U]) {
    Pack<T, V> pack[U], other[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (offset[u] < 0) continue;
      pack[u] = load_pack<T, V>(x + offset[u]);
      if constexpr (kResidual) other[u] = load_pack<T, V>(residual + offset[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (offset[u] < 0) continue;
      float z[V], r[V];
      widen<T, V>(pack[u], z);
      if constexpr (kResidual) widen<T, V>(other[u], r);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        z[k] = affine(z[k], mean[k], scale[k], bias[k]);
        if constexpr (kResidual) z[k] += r[k];
        z[k] = activate(z[k], floor);
      }
      store_pack<T, V>(y + offset[u], narrow<T, V>(z));
    }
  });
}

// Tiles of 128 channels in a reduction of channels_last: wider ones would write more parts, narrower ones read less
// than two 128-byte lines a row in fp32.
Tiling statistics_tiling(const Forward& f, const Stream& on) {
  const int lanes = f.view.lanes(size_of(f.type), is_aligned16(address_of(f.x)));
  return Tiling::of(f.view, lanes, unroll(lanes), 128 / lanes, kStatisticsBlocks * multiprocessors(on.device));
}

}  // namespace

int64_t statistics_scratch(const Forward& f, const Stream& on) {
  return statistics_tiling(f, on).splits * (2 * f.view.channels + 1);
}

void bn_statistics(const Forward& f, const Statistics& s, float* scratch, const Stream& on) {
  const Tiling t = statistics_tiling(f, on);
  with_type(f.type, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(f.x);
    with_lanes<T>(t.lanes, [&](auto lanes) {
      with_flag(f.view.plane > 1, [&](auto planes) {
        launch("bn_statistics", on, t.blocks(), t.threads(), &statistics_kernel<T, lanes.value, planes.value>, t, x,
               scratch);
      });
    });
    launch("bn_statistics_merge", on, ceil_div(f.view.channels, kMergeChannels), merge_threads(t.splits),
           &statistics_merge_kernel<T>, x, static_cast<const float*>(scratch), t.splits, f.view, s);
  });
}

void bn_act_apply(const Forward& f, const Stream& on) {
  const bool aligned = is_aligned16(address_of(f.x) | address_of(f.residual) | address_of(f.y));
  const int lanes = f.view.lanes(size_of(f.type), aligned);
  const Tiling t = Tiling::of(f.view, lanes, unroll(lanes), lanes == 1 ? kThreads : 32,
                              kApplyWaves * kApplyBlocks * multiprocessors(on.device));
  const float floor = f.relu ? 0.f : -std::numeric_limits<float>::infinity();
  with_type(f.type, [&](auto type) {
    using T = decltype(type);
    with_lanes<T>(lanes, [&](auto v) {
      with_flag(f.residual != nullptr, [&](auto residual) {
        launch("bn_act", on, t.blocks(), t.threads(), &forward_kernel<T, v.value, residual.value>, t, f, floor);
      });
    });
  });
}

void list_bn_act_forward(std::vector<Kernel>& kernels) {
  for_each_variant([&](auto type, auto lanes) {
    using T = decltype(type);
    constexpr int V = lanes.value;
    const auto add = [&](const char* name, auto* function, const char* variant = "") {
      kernels.push_back(kernel(kernel_name<T>(name, V, variant), function, kThreads));
    };
    add("bn_statistics", &statistics_kernel<T, V, false>);
    add("bn_statistics", &statistics_kernel<T, V, true>, ", planes");
    add("bn_act", &forward_kernel<T, V, false>);
    add("bn_act", &forward_kernel<T, V, true>, ", residual");
    if (V == 1) add("bn_statistics_merge", &statistics_merge_kernel<T>);
  });
}

}  // namespace fastres
