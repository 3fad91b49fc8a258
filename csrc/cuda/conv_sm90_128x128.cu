// conv_act for sm_90a in the middle: one warpgroup's epilogue, with its residual, goes under the other's products.
#include "cuda/conv_sm90.cuh"

namespace fastres {

void list_conv_sm90_128x128(std::vector<ConvTile>& tiles) {
  list_conv_sm90<Half, 128, 128, 1, Schedule::kPingpong>(tiles);
  list_conv_sm90<BFloat16, 128, 128, 1, Schedule::kPingpong>(tiles);
  list_conv_sm90<float, 128, 128, 1, Schedule::kPingpong>(tiles);
}

}  // namespace fastres
