// fastres._C, and with FASTRES_CUDA fastres._C_cuda: says how the extension was built. Importing it also loads the
// operators that the other files register. Two modules, because one with CUDA code loads in a CUDA build of torch alone.
//
// pybind11 alone, no torch: the copy of pybind11 that comes with torch refuses the macro that the operators need.
#if defined(TORCH_TARGET_VERSION)
constexpr unsigned long long kTorchTarget = TORCH_TARGET_VERSION;  // major, minor, patch: one byte each, from the top
#undef TORCH_TARGET_VERSION
#else
constexpr unsigned long long kTorchTarget = 0;
#endif

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#if defined(FASTRES_CUDA)
#include "cuda/kernels.h"
#else
#include "cpu/isa.h"
#endif

#if !defined(FASTRES_FLAGS)
#define FASTRES_FLAGS ""
#endif
#if !defined(FASTRES_ARCHITECTURES)
#define FASTRES_ARCHITECTURES ""
#endif
#if !defined(FASTRES_CUTLASS)
#define FASTRES_CUTLASS ""
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

// Rises when a native operator's schema changes: a binary of another number is refused at import.
constexpr int kSchemaVersion = 9;

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["schema_version"] = kSchemaVersion;
  info["torch_target"] = std::to_string(kTorchTarget >> 56 & 0xff) + "." + std::to_string(kTorchTarget >> 48 & 0xff);
  info["compiler"] = compiler();
  info["flags"] = FASTRES_FLAGS;
  info["cxx_std"] = static_cast<long>(__cplusplus);
#if defined(FASTRES_CUDA)
  const int version = fastres::cuda_version();
  info["cuda"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["architectures"] = FASTRES_ARCHITECTURES;
  info["cutlass"] = FASTRES_CUTLASS;
#else
  info["isa_runtime"] = fastres::isa_name(fastres::runtime_isa());
  info["has_pairs"] = fastres::has_pairs();
#endif
  return info;
}

// Resources of each device kernel by its name; the CPU module has none, and neither has a machine without a GPU.
py::dict kernel_attributes() {
  py::dict kernels;
#if defined(FASTRES_CUDA)
  for (const fastres::KernelAttributes& k : fastres::kernel_attributes()) {
    kernels[py::str(k.name)] = py::dict("registers"_a = k.registers, "shared_bytes"_a = k.shared_bytes,
                                        "local_bytes"_a = k.local_bytes, "threads"_a = k.threads,
                                        "blocks_per_multiprocessor"_a = k.blocks, "architecture"_a = k.architecture);
  }
#endif
  return kernels;
}

#if defined(FASTRES_CUDA)
py::list conv_kernels() {
  py::list kernels;
  for (const fastres::ConvKernel& k : fastres::conv_kernels()) {
    kernels.append(py::dict("name"_a = k.name, "element"_a = k.element, "architecture"_a = k.architecture,
                            "pixels"_a = k.pixels, "channels"_a = k.channels, "depth"_a = k.depth,
                            "cluster"_a = k.cluster, "splits_depth"_a = k.splits_depth, "threads"_a = k.threads,
                            "shared_bytes"_a = k.shared_bytes));
  }
  return kernels;
}
#endif

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "fastres: native kernels, registered with torch on import.";
  m.def("build_info", &build_info, "How this extension was built, and for what.");
  m.def("kernel_attributes", &kernel_attributes,
        "Registers, memory and occupancy of each device kernel; creates a CUDA context. {} without a GPU.");
#if defined(FASTRES_CUDA)
  m.def("conv_kernels", &conv_kernels, "The kernels of conv_act, in the order of _conv_act_native's `tile`.");
  m.def("why_not_conv", &fastres::why_not_conv, "Why a kernel of conv_act cannot take a convolution; empty: it can.");
#endif
}
