// conv_act on mma.sync where y has few tiles, or 64 channels.
#include "cuda/conv_sm80.cuh"

namespace fastres {

void list_conv_sm80_64x64(std::vector<ConvTile>& tiles) {
  list_conv_sm80<Half, 64, 64, 32, 32, 128, 4>(tiles);
  list_conv_sm80<BFloat16, 64, 64, 32, 32, 128, 4>(tiles);
  list_conv_sm80<float, 64, 64, 32, 32, 128, 4>(tiles);
}

}  // namespace fastres
