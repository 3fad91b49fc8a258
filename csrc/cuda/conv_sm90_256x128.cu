// conv_act for sm_90a where the products bound it and y has 128 channels.
#include "cuda/conv_sm90.cuh"

FASTRES_LIST_SM90(256x128, 256, 128, 1, kCooperative, Half, BFloat16)
