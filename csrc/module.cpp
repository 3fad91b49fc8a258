// fastres._C: says how the extension was built. Importing it also loads the operators that the other files register.
//
// pybind11 alone, no torch: the copy of pybind11 that comes with torch refuses the macro that the operators need.
#if defined(TORCH_TARGET_VERSION)
constexpr unsigned long long kTorchTarget = TORCH_TARGET_VERSION;  // major, minor, patch: one byte each, from the top
#undef TORCH_TARGET_VERSION
#else
constexpr unsigned long long kTorchTarget = 0;
#endif

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

#if !defined(FASTRES_CXX_FLAGS)
#define FASTRES_CXX_FLAGS ""
#endif

namespace py = pybind11;

namespace {

// Rises when a native operator's schema changes: a binary of another number is refused at import.
constexpr int kSchemaVersion = 2;

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
  info["flags"] = FASTRES_CXX_FLAGS;
  info["cxx_std"] = static_cast<long>(__cplusplus);
  info["isa_runtime"] = fastres::isa_name(fastres::runtime_isa());
  return info;
}

// Registers and spills of each device kernel; the CPU build has none.
py::dict kernel_attributes() { return py::dict(); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "fastres: native CPU kernels, registered with torch on import.";
  m.def("build_info", &build_info, "How this extension was built, and the instruction set it uses here.");
  m.def("kernel_attributes", &kernel_attributes, "Resources of each device kernel: {} in the CPU build.");
}
