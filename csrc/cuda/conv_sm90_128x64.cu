// conv_act for sm_90a where y has 64 channels.
#include "cuda/conv_sm90.cuh"

FASTRES_LIST_SM90(128x64, 128, 64, 1, kPingpong, Half, BFloat16, float)
