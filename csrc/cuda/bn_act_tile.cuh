// How bn_act's kernels walk a tile (launch.h), and how a block turns its threads' pairs of sums into one pair a channel.
//
// Every order is fixed: a thread adds its rows downwards, rows of threads are merged by halves, neighbors on the line
// in order. No atomics; the same tensor gives the same bits on the same kind of GPU.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace fastres {

// f(offset[U]) for the thread's rows, U at a time: where their elements begin, -1 for none. All the loads of a call
// should be under way before the first is used. Backwards: the second pass over a tensor meets first what the first
// pass read last, which is still in the L2 cache.
template <int U, bool kBackwards, class F>
__device__ __forceinline__ void walk(const Tiling& t, const Place& p, const F& f) {
  for (int64_t i = p.split; i < t.row_tiles; i += t.splits) {
    const int64_t row_tile = kBackwards ? t.row_tiles - 1 - i : i;
    int64_t offset[U];
    t.offsets<U>(p, row_tile, offset);
    f(offset);
  }
}

// Per-channel values of a thread's lanes.
template <int V>
__device__ __forceinline__ void load_lanes(const float* values, const Channels& c, bool has_work, float otherwise,
                                           float (&lane)[V]) {
#pragma unroll
  for (int k = 0; k < V; ++k) lane[k] = values && has_work ? values[c.of(k)] : otherwise;
}

// weight / sqrt(var + eps)
template <int V>
__device__ __forceinline__ void load_scale(const float* weight, const float* var, float eps, const Channels& c,
                                           bool has_work, float (&lane)[V]) {
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const float rstd = has_work ? reciprocal_std(var[c.of(k)], eps) : 0.f;
    lane[k] = weight && has_work ? weight[c.of(k)] * rstd : rstd;
  }
}

// ---- Reductions. A thread has two numbers a lane, a and b, and how many elements each lane has seen.

// What a block of `threads` needs: half its rows of threads at a time, or a count and two pairs of every thread of a row.
template <int V>
FASTRES_HD constexpr int shared_floats(int threads) {
  const int rows = threads / 2 * (2 * V + 1), line = threads * 6;
  return rows > line ? rows : line;
}

// Merges the rows of a block's threads into the first, by halves. Threads beyond `height` have nothing.
template <class Merge, int V>
__device__ __forceinline__ void merge_rows(int width, int height, int x, int y, float& count, float (&a)[V],
                                           float (&b)[V], float* shared) {
  constexpr int kStride = 2 * V + 1;  // odd: no bank conflicts
  for (int rows = height; rows > 1;) {
    const int half = (rows + 1) / 2;
    if (y >= half && y < rows) {
      float* slot = shared + ((y - half) * width + x) * kStride;
      slot[0] = count;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        slot[1 + k] = a[k];
        slot[1 + V + k] = b[k];
      }
    }
    __syncthreads();
    if (y < rows - half) {
      const float* slot = shared + (y * width + x) * kStride;
      const float mine = count;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        count = mine;  // the lanes of a thread have seen equally many
        Merge::merge(count, a[k], b[k], slot[0], slot[1 + k], slot[1 + V + k]);
      }
      count = mine + slot[0];
    }
    __syncthreads();
    rows = half;
  }
}

// What a block found of its channels, to `scratch`: a [parts, C], b [parts, C], counts [parts].
template <class Merge, int V, bool kPlanes>
__device__ __forceinline__ void write_part(const Tiling& t, const Place& p, float count, float (&a)[V], float (&b)[V],
                                           float* shared, float* scratch) {
  const int64_t size = t.splits * t.channels;
  float* out = scratch + p.split * t.channels;
  float* counts = scratch + 2 * size + p.split;
  merge_rows<Merge, V>(t.width, t.height, p.x, p.y, count, a, b, shared);
  const bool mine = p.y == 0 && t.has_work(p);
  const Channels channels = t.channels_of(p);
  if constexpr (!kPlanes) {
    if (!mine) return;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      out[channels.first + k] = a[k];
      out[size + channels.first + k] = b[k];
    }
    if (channels.first == 0) *counts = count;
  } else {
    // A thread's lanes belong to one channel or to two neighbors: a count and a pair of each go to shared memory.
    constexpr int kStride = 3;
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      float n = 0, sum_a = 0, sum_b = 0;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const bool in = (k >= channels.left) == (next == 1);
        Merge::merge(n, sum_a, sum_b, in ? count : 0.f, in ? a[k] : 0.f, in ? b[k] : 0.f);
      }
      if (mine) {
        float* slot = shared + (next * t.width + p.x) * kStride;
        slot[0] = n;
        slot[1] = sum_a;
        slot[2] = sum_b;
      }
    }
    __syncthreads();

    // A warp per channel of the tile.
    const int plane = static_cast<int>(smaller(t.plane, int64_t{t.width} * V));
    const int64_t first = p.tile * t.span / t.plane;
    const int channels_here = static_cast<int>(smaller(t.span / t.plane, t.channels - first));
    const int warps = static_cast<int>(blockDim.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    for (int channel = static_cast<int>(threadIdx.x / 32); channel < channels_here; channel += warps) {
      const int begin = channel * plane, end = begin + plane;
      float n = 0, sum_a = 0, sum_b = 0;
      for (int x = begin / V + lane; x * V < end; x += 32) {
        const float* slot = shared + ((x * V < begin ? t.width : 0) + x) * kStride;
        Merge::merge(n, sum_a, sum_b, slot[0], slot[1], slot[2]);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        const float other_n = __shfl_down_sync(~0u, n, step), other_a = __shfl_down_sync(~0u, sum_a, step),
                    other_b = __shfl_down_sync(~0u, sum_b, step);
        Merge::merge(n, sum_a, sum_b, other_n, other_a, other_b);
      }
      if (lane == 0) {
        out[first + channel] = sum_a;
        out[size + first + channel] = sum_b;
        if (first + channel == 0) *counts = n;
      }
    }
  }
}

// ---- The second stage: a block takes 8 channels, 32 bytes of each part, and as many threads as there are parts.

constexpr int kMergeChannels = 8;
constexpr int kMergeThreads = 512;

inline int merge_threads(int64_t parts) {
  int threads = 32;
  while (threads < kMergeThreads && threads < parts * kMergeChannels) threads *= 2;
  return threads;
}

// The merged pair of a channel, right in the first kMergeChannels threads of the block.
template <class Merge>
__device__ __forceinline__ void merge_parts(const float* scratch, int64_t parts, int64_t channels, int64_t channel,
                                            float& count, float& a, float& b) {
  __shared__ float shared[kMergeThreads / 2 * 3];
  const int x = static_cast<int>(threadIdx.x % kMergeChannels), y = static_cast<int>(threadIdx.x / kMergeChannels);
  const int height = static_cast<int>(blockDim.x) / kMergeChannels;
  const float* counts = scratch + 2 * parts * channels;
  float sum_a[1] = {0}, sum_b[1] = {0};
  count = 0;
  if (channel < channels) {
#pragma unroll 4
    for (int64_t part = y; part < parts; part += height) {
      const float* in = scratch + part * channels + channel;
      Merge::merge(count, sum_a[0], sum_b[0], counts[part], in[0], in[parts * channels]);
    }
  }
  merge_rows<Merge, 1>(kMergeChannels, height, x, y, count, sum_a, sum_b, shared);
  a = sum_a[0];
  b = sum_b[0];
}

}  // namespace fastres
