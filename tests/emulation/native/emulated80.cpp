// conv_act's kernels for sm_80 behind a C interface, for ctypes: compiled and linked with csrc/cuda's files by
// tests/emulation/emulation.py, with an ordinary C++ compiler against the headers of tests/emulation/native/emulator80.
#include <cutlass/cutlass.h>

#include "cuda/conv_epilogue.cuh"

namespace fastres {
alignas(1024) char shared[emulator::kMostShared + emulator::kBeyond];
}

namespace {
fastres::ConvShape shape_of(const int64_t* values) {
  fastres::ConvShape shape;
  static_assert(sizeof shape == 15 * sizeof *values);
  std::memcpy(&shape, values, sizeof shape);
  return shape;
}
}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorInvalidValue; }

void set_order(int backwards, int at_once) {
  emulator::backwards = backwards != 0;
  emulator::at_once = at_once != 0;
}
void set_last_blocks(uint64_t count) { emulator::last_blocks = count; }

int conv_tile_count() { return static_cast<int>(fastres::conv_tiles().size()); }

// Of a tile: its element type, pixels, channels, depth, threads, shared bytes; the name is the result.
const char* conv_tile(int index, int64_t* out) {
  const fastres::ConvTile& t = fastres::conv_tiles()[index];
  const int64_t values[] = {static_cast<int64_t>(t.type), t.pixels, t.channels, t.depth, t.threads, t.shared_bytes};
  std::memcpy(out, values, sizeof values);
  return t.name.c_str();
}

// `shape`: n h w c k r s p q, then stride, padding and dilation, each of both axes.
const char* conv_refusal(int tile, const int64_t* shape) {
  static std::string reason;
  reason = fastres::conv_tiles()[tile].refusal(shape_of(shape));
  return reason.c_str();
}

// A message, or null.
const char* conv_act(int tile, const int64_t* shape, const void* x, const void* weight, const void* bias,
                     const void* residual, void* y, const char* act) {
  static std::string problem;
  const fastres::ConvTile& chosen = fastres::conv_tiles()[tile];
  const fastres::ConvShape s = shape_of(shape);
  const auto range = [&](const void* p, int64_t count, bool writable) {
    const auto begin = reinterpret_cast<uintptr_t>(p);
    if (p != nullptr) emulator::tensors.push_back({begin, begin + count * fastres::size_of(chosen.type), writable});
  };
  emulator::fault.clear();
  emulator::tensors.clear();
  range(x, s.n * s.h * s.w * s.c, false);
  range(weight, s.k * s.r * s.s * s.c, false);
  range(bias, s.k, false);
  range(residual, s.pixels() * s.k, false);
  range(y, s.pixels() * s.k, true);
  try {
    fastres::ConvTensors tensors{x, weight, bias, residual, y, 0, 0};
    problem = fastres::activation_bounds(act, tensors.lower, tensors.upper) ? chosen.refusal(s) : "act";
    if (problem.empty()) chosen.run(s, tensors, nullptr, {0, nullptr});
  } catch (const std::exception& error) {
    problem = error.what();
  }
  if (problem.empty()) problem = emulator::fault;
  return problem.empty() ? nullptr : problem.c_str();
}

void bounded(const float* z, float lower, float upper, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = fastres::bounded(z[i], {lower, upper});
}

}  // extern "C"
