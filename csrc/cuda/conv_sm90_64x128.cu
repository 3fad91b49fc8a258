// conv_act for sm_90a where y has few pixels: twice the tiles.
#include "cuda/conv_sm90.cuh"

namespace fastres {

void list_conv_sm90_64x128(std::vector<ConvTile>& tiles) {
  list_conv_sm90<Half, 64, 128, 1, Schedule::kPingpong>(tiles);
  list_conv_sm90<BFloat16, 64, 128, 1, Schedule::kPingpong>(tiles);
}

}  // namespace fastres
