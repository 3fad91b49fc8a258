"""The operators as functions, on tensors (`conv_act`, `bn_act`, `add_relu`) or on a module (`bn_act_module`)."""

from fastres.ops import add_relu, bn_act, bn_act_module, conv_act

__all__ = ["add_relu", "bn_act", "bn_act_module", "conv_act"]
