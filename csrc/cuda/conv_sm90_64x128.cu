// conv_act for sm_90a where y has few pixels: twice the tiles.
#include "cuda/conv_sm90.cuh"

FASTRES_LIST_SM90(64x128, 64, 128, 1, kPingpong, Half, BFloat16)
