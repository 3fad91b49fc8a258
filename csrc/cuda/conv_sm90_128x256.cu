// conv_act for sm_90a where the products bound it: the largest tile that two warpgroups hold, weights shared by two.
#include "cuda/conv_sm90.cuh"

namespace fastres {

void list_conv_sm90_128x256(std::vector<ConvTile>& tiles) {
  list_conv_sm90<Half, 128, 256, 2, Schedule::kCooperative>(tiles);
  list_conv_sm90<BFloat16, 128, 256, 2, Schedule::kCooperative>(tiles);
}

}  // namespace fastres
