"""Patterns that fusions share: the only reader of a node, residual sums, affines by constants, epilogues."""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from fastres.graph.constants import Constants, per_channel
from fastres.graph.normalize import activation, aten
from fastres.graph.questions import same_shape

CONVS = (aten.conv2d.default, aten.conv1d.default, aten.conv3d.default)
_ARITHMETIC = {
    getattr(getattr(aten, name), overload): name
    for name in ("mul", "div", "add", "sub", "rsub")
    for overload in ("Tensor", "Scalar")
}


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads `node`; None where others do too, or it is an output."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].op == "call_function" else None


def is_residual_add(node: fx.Node, constants: Constants) -> bool:
    """Tell whether this is x + y of two different tensors of one shape and dtype, neither of them constant."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return False
    x, y = node.args
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node) or x is y or {x, y} & constants.nodes:
        return False
    same = same_shape(x.meta.get("shape"), y.meta.get("shape"), node.meta.get("shape"))
    return same and x.meta["dtype"] == y.meta["dtype"] == node.meta["dtype"] and x.meta["dtype"].is_floating_point


def other(node: fx.Node, operand: fx.Node) -> Any:
    """The other operand of a sum or product."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def arithmetic(node: fx.Node) -> str:
    """mul, div, add, sub or rsub (value - x) of an affine that is no BN; empty for anything else."""
    return _ARITHMETIC.get(cast(Any, node.target), "")


def is_affine(node: fx.Node, x: fx.Node, constants: Constants) -> bool:
    """Tell whether `node` is scale * x + shift with one scale and shift a channel, all constant."""
    if node.target is aten.batch_norm.default:
        statistics = node.args[1:5]
        known = all(t is None or t in constants.nodes for t in statistics)
        return node.args[0] is x and known and None not in statistics[2:] and not node.args[5]
    name = arithmetic(node)
    if not name or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return False
    if not same_shape(node.meta.get("shape"), x.meta.get("shape")) or node.meta["dtype"] != x.meta["dtype"]:
        return False
    if name in ("div", "rsub") and node.args[0] is not x:
        return False
    return node.args[0] is not node.args[1] and per_channel(other(node, x), constants, x.meta["shape"]) is not None


def epilogue(
    last: fx.Node, constants: Constants, acts: tuple[str, ...], residual_acts: tuple[str, ...]
) -> tuple[list[fx.Node], Any, str]:
    """[add] -> [act] behind `last`: the nodes, the residual or None, the activation's name or "none"."""
    nodes: list[fx.Node] = []
    residual = None
    reader = only_reader(last)
    if reader is not None and is_residual_add(reader, constants):
        residual, reader = other(reader, last), only_reader(reader)
        nodes.append(list(last.users)[0])
    act = None if reader is None else activation(reader)
    if reader is None or act is None or act not in (acts if residual is None else residual_acts):
        return nodes, residual, "none"
    return [*nodes, reader], residual, act


def norm_name(node: fx.Node) -> str:
    """The module that a BN or another affine came from."""
    if node.target is aten.batch_norm.default:
        for t in node.args[1:5]:
            if isinstance(t, fx.Node) and t.op == "get_attr":
                return str(t.target).rpartition(".")[0] or str(t.target)
    return str(node.meta.get("where") or node.name)


def module_name(node: fx.Node) -> str:
    """The module that a convolution or linear layer was, by its weight's name where it has one."""
    weight = node.args[1]
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target).endswith(".weight"):
        return str(weight.target).removesuffix(".weight")
    return str(node.meta.get("where") or node.name)
