// conv_act for sm_90a where tiles do not fill the GPU's last wave (stage 4) or not even its first (batch 1): blocks
// share their depth.
#include "cuda/conv_sm90.cuh"

namespace fastres {

void list_conv_sm90_streamk(std::vector<ConvTile>& tiles) {
  list_conv_sm90<Half, 128, 128, 1, Schedule::kStreamK>(tiles);
  list_conv_sm90<BFloat16, 128, 128, 1, Schedule::kStreamK>(tiles);
  list_conv_sm90<float, 128, 128, 1, Schedule::kStreamK>(tiles);
}

}  // namespace fastres
