// conv_act for sm_90a where tiles do not fill the GPU's last wave (stage 4) or not even its first (batch 1): blocks
// share their depth.
#include "cuda/conv_sm90.cuh"

FASTRES_LIST_SM90(streamk, 128, 128, 1, kStreamK, Half, BFloat16, float)
