// What every launcher needs on the host: element types without torch, the launch itself and its check, the number of
// multiprocessors, and the list of kernels that kernel_attributes() reports. CUDA's runtime alone, no torch: files of
// kernels compile in a fraction of the time.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/launch.h"
#include "element.h"

namespace fastres {

enum class Type { kFloat, kBFloat16, kHalf };

inline int64_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

// Calls f with a value of the element type.
template <class F>
void with_type(Type type, const F& f) {
  switch (type) {
    case Type::kFloat:
      return f(float{});
    case Type::kBFloat16:
      return f(BFloat16{});
    case Type::kHalf:
      return f(Half{});
  }
}

template <class T>
constexpr const char* type_name() {
  return std::is_same_v<T, float> ? "float" : std::is_same_v<T, Half> ? "half" : "bfloat16";
}

// Calls f with the lanes of a vector as a constant: 16 bytes of T, or 1.
template <class T, class F>
void with_lanes(int lanes, const F& f) {
  if (lanes == 1) return f(std::integral_constant<int, 1>{});
  f(std::integral_constant<int, kVectorBytes / static_cast<int>(sizeof(T))>{});
}

template <class F>
void with_flag(bool value, const F& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

inline uintptr_t address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// The device is current (a guard holds it), the stream is torch's current one.
struct Stream {
  int device;
  cudaStream_t stream;
};

inline void check_cuda(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what is returned here must not come up again in somebody else's check
  throw std::runtime_error(std::string(what) + " failed on cuda:" + std::to_string(device) + ": " +
                           cudaGetErrorString(error));
}

// Queues a kernel. Nothing here waits, allocates or asks the device: launches can be captured in a graph.
template <class... Parameters, class... Arguments>
void launch(const char* name, const Stream& on, int64_t blocks, int threads, void (*kernel)(Parameters...),
            Arguments... arguments) {
  if (blocks > kMaxBlocks) {
    throw std::runtime_error(std::string(name) + ": the tensor needs " + std::to_string(blocks) +
                             " blocks, a grid has at most " + std::to_string(kMaxBlocks));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = on.stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name, on.device);
}

// The blocks of a kernel that takes more shared memory than every block may have unasked, in clusters along x.
struct Dynamic {
  int threads;
  int64_t shared_bytes;
  int cluster;
};

inline cudaLaunchConfig_t dynamic_config(const Dynamic& how, dim3 grid, cudaLaunchAttribute& attribute) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(how.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = how.cluster > 1 ? 1 : 0;
  return config;
}

// Before the first launch on a device: lets the kernel have its shared memory. Returns how many clusters the device
// holds at once (parts of it may be odd), 0 where blocks stand alone.
template <class Parameters>
int allow_dynamic(const char* name, const Stream& on, const Dynamic& how, void (*kernel)(Parameters)) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // and one; of one kernel: no two have parameters of one type
  if (on.device < kDevices && known[on.device] > 0) return known[on.device] - 1;
  const int bytes = static_cast<int>(how.shared_bytes);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name, on.device);
  int clusters = 0;
  if (how.cluster > 1) {
    cudaLaunchAttribute attribute{};
    const cudaLaunchConfig_t config = dynamic_config(how, dim3(static_cast<unsigned>(how.cluster)), attribute);
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), name, on.device);
  }
  if (on.device < kDevices) known[on.device] = clusters + 1;
  return clusters;
}

// Queues it, as launch() does.
template <class Parameters>
void launch_dynamic(const char* name, const Stream& on, const Dynamic& how, dim3 grid, void (*kernel)(Parameters),
                    const Parameters& parameters) {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config = dynamic_config(how, grid, attribute);
  config.stream = on.stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, parameters), name, on.device);
}

// Read once per device.
inline int64_t multiprocessors(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  if (device < kDevices && known[device] > 0) return known[device];
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute", device);
  if (device < kDevices) known[device] = count;
  return count;
}

// ---- kernel_attributes()

struct Kernel {
  std::string name;  // statistics<half, 8>
  const void* function;
  int threads;                // of a full block
  int64_t dynamic_bytes = 0;  // of shared memory, asked for at launch
};

template <class... Parameters>
Kernel kernel(std::string name, void (*function)(Parameters...), int threads) {
  return {std::move(name), reinterpret_cast<const void*>(function), threads};
}

template <class T>
std::string kernel_name(const char* name, int lanes, const char* variant = "") {
  return std::string(name) + "<" + type_name<T>() + ", " + std::to_string(lanes) + variant + ">";
}

// Calls f(T, lanes) with every element type, in vectors and by single elements.
template <class F>
void for_each_variant(const F& f) {
  for (const Type type : {Type::kFloat, Type::kBFloat16, Type::kHalf}) {
    with_type(type, [&](auto t) {
      f(t, std::integral_constant<int, kVectorBytes / static_cast<int>(sizeof t)>{});
      f(t, std::integral_constant<int, 1>{});
    });
  }
}

// Each file of kernels lists its own.
void list_add_relu(std::vector<Kernel>& kernels);
void list_bn_act_forward(std::vector<Kernel>& kernels);
void list_bn_act_backward(std::vector<Kernel>& kernels);

}  // namespace fastres
