// conv_act for sm_90a where y has 64 channels.
#include "cuda/conv_sm90.cuh"

namespace fastres {

void list_conv_sm90_128x64(std::vector<ConvTile>& tiles) {
  list_conv_sm90<Half, 128, 64, 1, Schedule::kPingpong>(tiles);
  list_conv_sm90<BFloat16, 128, 64, 1, Schedule::kPingpong>(tiles);
  list_conv_sm90<float, 128, 64, 1, Schedule::kPingpong>(tiles);
}

}  // namespace fastres
