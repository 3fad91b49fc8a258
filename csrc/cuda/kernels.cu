// What kernel_attributes() reports of each kernel on the current device, and the CUDA release that compiled them.
#include "cuda/kernels.h"

#include "cuda/conv_act.h"
#include "cuda/runtime.h"

namespace fastres {

std::vector<KernelAttributes> kernel_attributes() {
  int devices = 0, device = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0 || cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  std::vector<Kernel> kernels;
  list_add_relu(kernels);
  list_bn_act_forward(kernels);
  list_bn_act_backward(kernels);
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute",
             device);
  for (const ConvTile& tile : conv_tiles()) {
    if (tile.architecture == 90 && major != 9) continue;
    kernels.push_back({tile.label(), tile.function, tile.threads, tile.shared_bytes});
  }
  std::vector<KernelAttributes> found;
  for (const Kernel& kernel : kernels) {
    cudaFuncAttributes a{};
    check_cuda(cudaFuncGetAttributes(&a, kernel.function), kernel.name.c_str(), device);
    int blocks = 0;
    if (kernel.dynamic_bytes > 0) {
      check_cuda(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(kernel.dynamic_bytes)),
                 kernel.name.c_str(), device);
    }
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads,
                                                             static_cast<size_t>(kernel.dynamic_bytes)),
               kernel.name.c_str(), device);
    found.push_back({kernel.name, a.numRegs, static_cast<int64_t>(a.sharedSizeBytes) + kernel.dynamic_bytes,
                     static_cast<int64_t>(a.localSizeBytes), kernel.threads, blocks, a.binaryVersion});
  }
  return found;
}

std::vector<ConvKernel> conv_kernels() {
  std::vector<ConvKernel> found;
  for (const ConvTile& t : conv_tiles()) {
    const char* element = t.type == Type::kFloat ? "float32" : t.type == Type::kHalf ? "float16" : "bfloat16";
    found.push_back({t.name, element, t.architecture, t.pixels, t.channels, t.depth, t.cluster, t.splits_depth,
                     t.threads, t.shared_bytes});
  }
  return found;
}

std::string why_not_conv(int tile, const std::array<int64_t, 15>& s) {
  return conv_tiles().at(static_cast<size_t>(tile))
      .refusal({s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], {s[9], s[10]}, {s[11], s[12]}, {s[13], s[14]}});
}

int cuda_version() { return CUDART_VERSION; }

}  // namespace fastres
