// conv_act for sm_90a where the products bound it and y has 128 channels.
#include "cuda/conv_sm90.cuh"

namespace fastres {

void list_conv_sm90_256x128(std::vector<ConvTile>& tiles) {
  list_conv_sm90<Half, 256, 128, 1, Schedule::kCooperative>(tiles);
  list_conv_sm90<BFloat16, 256, 128, 1, Schedule::kCooperative>(tiles);
}

}  // namespace fastres
