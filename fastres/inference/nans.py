"""Where a network makes NaN of finite numbers: its convolutions behind such a place take steps that pass NaN on.

oneDNN's ReLU turns NaN into 0, see `FrozenConv`. An input that is not finite is seen by its sum; a square root of a
negative number in the middle of a network is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fastres.inference.conv import FrozenConv, frozen_convs

_MAKERS = {
    *("sqrt", "rsqrt", "log", "log2", "log10", "log1p", "logit", "reciprocal", "pow", "float_power", "xlogy"),
    *("asin", "acos", "acosh", "atanh", "erfinv", "lgamma", "digamma", "tan", "fmod", "remainder", "std", "var"),
    *("std_mean", "var_mean", "linalg_inv", "inverse", "linalg_solve", "logdet"),
}


def pass_nan(module: nn.Module, everywhere: bool) -> None:
    """Makes the convolutions of ``module`` exact that NaN can reach though the input is finite; or all of them."""
    if everywhere:
        for conv in frozen_convs(module):
            conv.exact = True
    if not isinstance(module, fx.GraphModule):
        return
    reached: set[fx.Node] = set()
    for node in module.graph.nodes:
        if _makes_nan(node) or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            step = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(step, FrozenConv):
                step.exact = True


def _makes_nan(node: fx.Node) -> bool:
    """Whether this operator may give NaN for finite numbers of usual size."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name.partition("::")[2]
    if name == "pow":
        exponent: Any = node.args[1]
        return not isinstance(exponent, int | float) or exponent < 0 or exponent != int(exponent)
    if name in ("div", "true_divide", "floor_divide"):
        divisor: Any = node.args[1]
        return divisor.op != "get_attr" if isinstance(divisor, fx.Node) else divisor == 0
    return name in _MAKERS
