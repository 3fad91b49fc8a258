// add_relu's kernel: out = f(a, b) over flat arrays, forward and backward alike.
//
// 2 reads and 1 write an element in each direction, the least there is for a kernel of its own. A thread has four vectors
// of both inputs under way before it needs the first (128 bytes), and four blocks or more fit a multiprocessor: 128 KB in
// flight, several times what a Hopper's memory needs at its latency. There is one block per tile, in order: the hardware
// hands them out as multiprocessors become free, which should balance better than a loop inside. Where that is less
// than two blocks a multiprocessor, one vector a thread.
//
// Arrays whose addresses differ modulo 16 go element by element: views that start in odd places, beside others that
// do not.
#include "cuda/add_relu.h"

#include "cuda/device.cuh"

namespace fastres {
namespace {

struct AddRelu {
  static __device__ __forceinline__ float at(float x, float residual) { return activate(x + residual, 0.f); }
};
struct AddReluGradient {
  static __device__ __forceinline__ float at(float dy, float y) { return relu_gradient(dy, y); }
};

constexpr int kUnroll = 4;
constexpr int kBlocksPerMultiprocessor = 4;  // 64 registers

template <class F, class T, int V, int U>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    flat_kernel(const T* a, const T* b, T* out, Flat flat) {
  Pack<T, V> left[U], right[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t vector = flat.vector(blockIdx.x, threadIdx.x, u, U);
    if (vector < flat.vectors) {
      left[u] = load_pack<T, V>(a + flat.offset(vector, V));
      right[u] = load_pack<T, V>(b + flat.offset(vector, V));
    }
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t vector = flat.vector(blockIdx.x, threadIdx.x, u, U);
    if (vector < flat.vectors) {
      float p[V], q[V];
      widen<T, V>(left[u], p);
      widen<T, V>(right[u], q);
#pragma unroll
      for (int k = 0; k < V; ++k) p[k] = F::at(p[k], q[k]);
      store_pack<T, V>(out + flat.offset(vector, V), narrow<T, V>(p));
    }
  }
  if (V > 1 && blockIdx.x == 0) {
    const int64_t i = flat.single(threadIdx.x, V);
    if (i >= 0) out[i] = narrow<T>(F::at(widen(a[i]), widen(b[i])));
  }
}

template <class F>
void run(const char* name, Type type, const void* a, const void* b, void* out, int64_t n, const Stream& on) {
  const uintptr_t address = address_of(out);
  const bool together = is_aligned16(address_of(a) - address) && is_aligned16(address_of(b) - address);
  with_type(type, [&](auto t) {
    using T = decltype(t);
    with_lanes<T>(together ? kVectorBytes / static_cast<int>(sizeof(T)) : 1, [&](auto lanes) {
      constexpr int V = lanes.value;
      const Flat flat = Flat::of(n, address, sizeof(T), V);
      const bool many = flat.blocks(kUnroll) >= 2 * multiprocessors(on.device);
      with_flag(many, [&](auto several) {
        constexpr int U = several.value ? kUnroll : 1;
        launch(name, on, flat.blocks(U), kThreads, &flat_kernel<F, T, V, U>, static_cast<const T*>(a),
               static_cast<const T*>(b), static_cast<T*>(out), flat);
      });
    });
  });
}

template <class F>
void list(const char* name, std::vector<Kernel>& kernels) {
  for_each_variant([&](auto t, auto lanes) {
    using T = decltype(t);
    constexpr int V = lanes.value;
    kernels.push_back(kernel(kernel_name<T>(name, V), &flat_kernel<F, T, V, kUnroll>, kThreads));
    kernels.push_back(kernel(kernel_name<T>(name, V, ", small"), &flat_kernel<F, T, V, 1>, kThreads));
  });
}

}  // namespace

void add_relu_forward(Type type, const void* x, const void* residual, void* y, int64_t n, const Stream& on) {
  run<AddRelu>("add_relu", type, x, residual, y, n, on);
}

void add_relu_gradient(Type type, const void* dy, const void* y, void* dx, int64_t n, const Stream& on) {
  run<AddReluGradient>("add_relu_backward", type, dy, y, dx, n, on);
}

void list_add_relu(std::vector<Kernel>& kernels) {
  list<AddRelu>("add_relu", kernels);
  list<AddReluGradient>("add_relu_backward", kernels);
}

}  // namespace fastres
