// conv_act on mma.sync where y has few tiles, or 64 channels.
#include "cuda/conv_sm80.cuh"

FASTRES_LIST_SM80(64x64, 64, 64, 32, 32, 128, 4, Half, BFloat16, float)
