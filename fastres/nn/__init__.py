"""Drop-in modules that call the fused operators, with torchvision's constructor arguments, child names and state_dict.

A step whose norm is neither `nn.BatchNorm2d` nor a FrozenBatchNorm2d (SyncBatchNorm after conversion, a parametrized or
hooked child) runs its stock modules instead, with the same result.
"""

from fastres.nn.blocks import BasicBlock, Bottleneck
from fastres.nn.checkpoint import bn_once
from fastres.nn.conv_steps import conv_bn_act, conv_norm_act, run_sequence
from fastres.nn.layers import AddReLU, BNAddReLU, BNReLU, ConvBNReLU
from fastres.nn.steps import bn_step, norm_act

__all__ = [
    "AddReLU",
    "BNAddReLU",
    "BNReLU",
    "BasicBlock",
    "Bottleneck",
    "ConvBNReLU",
    "bn_once",
    "bn_step",
    "conv_bn_act",
    "conv_norm_act",
    "norm_act",
    "run_sequence",
]
