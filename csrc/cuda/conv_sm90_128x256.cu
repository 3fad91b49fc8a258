// conv_act for sm_90a where the products bound it: the largest tile that two warpgroups hold, weights shared by two.
#include "cuda/conv_sm90.cuh"

FASTRES_LIST_SM90(128x256, 128, 256, 2, kCooperative, Half, BFloat16)
