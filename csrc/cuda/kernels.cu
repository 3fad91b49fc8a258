// What kernel_attributes() reports of each kernel on the current device, and the CUDA release that compiled them.
#include "cuda/kernels.h"

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
  std::vector<KernelAttributes> found;
  for (const Kernel& kernel : kernels) {
    cudaFuncAttributes a{};
    check_cuda(cudaFuncGetAttributes(&a, kernel.function), kernel.name.c_str(), device);
    int blocks = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads, 0),
               kernel.name.c_str(), device);
    found.push_back({kernel.name, a.numRegs, static_cast<int64_t>(a.sharedSizeBytes),
                     static_cast<int64_t>(a.localSizeBytes), kernel.threads, blocks, a.binaryVersion});
  }
  return found;
}

int cuda_version() { return CUDART_VERSION; }

}  // namespace fastres
