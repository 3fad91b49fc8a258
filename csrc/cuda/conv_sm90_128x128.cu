// conv_act for sm_90a in the middle: one warpgroup's epilogue, with its residual, goes under the other's products.
#include "cuda/conv_sm90.cuh"

FASTRES_LIST_SM90(128x128, 128, 128, 1, kPingpong, Half, BFloat16, float)
