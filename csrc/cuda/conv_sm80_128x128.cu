// conv_act on mma.sync where y has many tiles.
#include "cuda/conv_sm80.cuh"

FASTRES_LIST_SM80(128x128, 128, 128, 64, 64, 64, 4, Half, BFloat16, float)
