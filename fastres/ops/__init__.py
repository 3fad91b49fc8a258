"""The operators: importing this package defines them. One file each, read from top to bottom."""

from fastres.ops import _conv_stem as _conv_stem  # for frozen networks alone: no public function
from fastres.ops import _int8_conv as _int8_conv
from fastres.ops import _int8_pool as _int8_pool
from fastres.ops import _int8_quantize as _int8_quantize
from fastres.ops import _int8_stem as _int8_stem
from fastres.ops.add_relu import add_relu
from fastres.ops.bn_act import bn_act, bn_act_module
from fastres.ops.conv_act import conv_act

__all__ = ["add_relu", "bn_act", "bn_act_module", "conv_act"]
