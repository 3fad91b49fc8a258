// conv_act on mma.sync where y has many tiles.
#include "cuda/conv_sm80.cuh"

namespace fastres {

void list_conv_sm80_128x128(std::vector<ConvTile>& tiles) {
  list_conv_sm80<Half, 128, 128, 64, 64, 64, 4>(tiles);
  list_conv_sm80<BFloat16, 128, 128, 64, 64, 64, 4>(tiles);
  list_conv_sm80<float, 128, 128, 64, 64, 64, 4>(tiles);
}

}  // namespace fastres
