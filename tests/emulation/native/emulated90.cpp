// The convolutions for sm_90a on a machine without a GPU, behind a C interface for ctypes: csrc/cuda/conv_sm90.cuh and
// CUTLASS, translated by tests/emulation/cuda_to_cpp.py, on the emulator. With EMULATED_ALL every kernel that is shipped,
// otherwise one of each kind: all three schedules, a cluster of two, fp16 and TF32.
#include <cutlass/functional.h>

#include <stdexcept>

#include "cuda/conv_tiles.cu"

// Left out by CUTLASS where the compiler is not nvcc.
template <>
struct cutlass::atomic_add<float> {
  void operator()(float* to, const float& value) { atomicAdd(to, value); }
};

#if defined(EMULATED_ALL)
#include "cuda/conv_sm90_128x128.cu"
#include "cuda/conv_sm90_128x256.cu"
#include "cuda/conv_sm90_128x64.cu"
#include "cuda/conv_sm90_256x128.cu"
#include "cuda/conv_sm90_64x128.cu"
#include "cuda/conv_sm90_streamk.cu"
#else
#include "cuda/conv_sm90.cuh"
#endif

namespace fastres {
namespace {

std::string said;

const std::vector<ConvTile>& emulated() {
#if defined(EMULATED_ALL)
  return conv_tiles();
#else
  static const std::vector<ConvTile> found = [] {
    std::vector<ConvTile> tiles;
    list_conv_sm90<Half, 128, 256, 2, Schedule::kCooperative>(tiles);
    list_conv_sm90<Half, 128, 128, 1, Schedule::kStreamK>(tiles);
    list_conv_sm90<float, 128, 64, 1, Schedule::kPingpong>(tiles);
    return tiles;
  }();
  return found;
#endif
}

const ConvTile& tile_at(int number) { return emulated().at(static_cast<size_t>(number)); }

}  // namespace
}  // namespace fastres

extern "C" {

int tiles() { return static_cast<int>(fastres::emulated().size()); }

const char* tile_label(int number) {
  fastres::said = fastres::tile_at(number).label();
  return fastres::said.c_str();
}

// rows and columns of a tile, blocks of a cluster, whether it splits the depth.
void tile_numbers(int number, int* out) {
  const fastres::ConvTile& tile = fastres::tile_at(number);
  const int numbers[] = {tile.pixels, tile.channels, tile.cluster, tile.splits_depth};
  std::memcpy(out, numbers, sizeof numbers);
}

// sizes: n, h, w, c, k, r, s, p, q, then stride, padding, dilation. A message, or null.
const char* conv_act(int number, const int64_t* sizes, void* x, void* weight, void* bias, void* residual, void* y,
                     const char* act, int multiprocessors, uint64_t seed) {
  using namespace fastres;
  try {
    const ConvTile& tile = tile_at(number);
    ConvShape shape;
    static_assert(sizeof shape == 15 * sizeof(int64_t));
    std::memcpy(&shape, sizes, sizeof shape);
    said = tile.refusal(shape);
    if (!said.empty()) return said.c_str();
    ConvTensors tensors{x, weight, bias, residual, y, 0, 0};
    if (!activation_bounds(act, tensors.lower, tensors.upper)) throw std::runtime_error("no such activation");
    emulator::start(seed);
    std::vector<char> workspace(tile.workspace(shape, multiprocessors) + 256, '\x7f');
    char* aligned = workspace.data() + (256 - address_of(workspace.data()) % 256) % 256;
    tile.run(shape, tensors, aligned, {multiprocessors, nullptr});
    return nullptr;
  } catch (const std::exception& error) {
    said = error.what();
    return said.c_str();
  }
}

void set_planning(int on) { emulator::planning = on != 0; }
int64_t counted(const char* what) { return emulator::counted(what); }

}  // extern "C"
