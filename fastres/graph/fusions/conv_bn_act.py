"""conv2d -> affine ... -> [add] -> [act] becomes one conv_act.

    affine   a BN by running statistics, or a product or sum with one number a channel, all constant
    add      a residual of the output's shape, whatever made it
    act      ReLU, and without a residual ReLU6, Hardswish, SiLU

Every node is read by the next alone, so the call runs where the last node stood. Where new constants may be made, the
affines are folded into the convolution in float64; otherwise they are conv_act's scale and bias, computed in every
call. 1-D and 3-D convolutions are folded where they can be, and called as they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fastres.graph.constants import as_channels
from fastres.graph.fold import Folded, fold_affine, norm_affine
from fastres.graph.fusions import Fusion, Weights
from fastres.graph.normalize import aten
from fastres.graph.patterns import CONVS, arithmetic, epilogue, is_affine, module_name, norm_name, only_reader, other
from fastres.graph.rows import ACTS, FreezeRow, Refusal

_RESIDUAL_ACTS = ("relu",)  # that a convolution fuses behind a residual
_CONV_ACT = torch.ops.fastres.conv_act.default


@dataclass
class _Found:
    """A convolution and what it takes in; `stop` says why not more."""

    nodes: list[fx.Node]  # in their order, the last gives the output
    affines: list[fx.Node] = field(default_factory=list)
    residual: Any = None
    act: str = "none"
    stop: Refusal | None = None
    folded: Folded | None = None

    @property
    def conv(self) -> fx.Node:
        return self.nodes[0]

    @property
    def is_2d(self) -> bool:
        return self.conv.target is aten.conv2d.default and len(self.conv.meta["shape"]) == 4


def _match(node: fx.Node, weights: Weights) -> _Found | None:
    if node.target not in CONVS or "row" in node.meta:
        return None
    constants = weights.constants.nodes
    _, weight, bias = (*node.args, None, None)[:3]
    ready = weight in constants and (bias is None or bias in constants)
    if not ready or not node.meta["dtype"].is_floating_point:
        return None
    found = _Found([node])
    if len(node.meta["shape"]) != len(weight.meta["shape"]):  # type: ignore[union-attr]
        found.stop = Refusal("NO_BATCH", "its input has no batch dimension")  # its channels are in another place
        return found if weights.folds else None
    refused = None
    current = node
    while (reader := only_reader(current)) is not None and is_affine(reader, current, weights.constants):
        found.affines.append(current := reader)
    if found.affines and weights.folds and not weights.has(_made_of(found, weights, "weight")):
        folded = _fold(found, weights)
        if isinstance(folded, Refusal):
            refused, found.affines = folded, []
        else:
            found.folded = folded
    found.nodes += found.affines
    if found.is_2d:
        behind, found.residual, found.act = epilogue(found.nodes[-1], weights.constants, ACTS, _RESIDUAL_ACTS)
        found.nodes += behind
    found.stop = refused or (None if found.affines else _why_no_more(node))
    return found if weights.folds or (found.is_2d and len(found.nodes) > 1) else None


def _why_no_more(conv: fx.Node) -> Refusal:
    """For a convolution that took no affine in: why."""
    norms = [user for user in conv.users if user.target is aten.batch_norm.default]
    if not norms:
        return Refusal("NO_NORM", "no BN reads it")
    names = ", ".join(norm_name(norm) for norm in norms)
    if len(conv.users) > 1:
        return Refusal("OTHER_USE", f"{names} reads it, and {len(conv.users) - 1} other(s) do too")
    if norms[0].args[5]:
        return Refusal("BATCH_STATISTICS", f"{names} normalizes by the batch's statistics in eval mode too")
    return Refusal("NOT_CONSTANT", f"the tensors of {names} are computed from the input")


# ---- folding ---------------------------------------------------------------------------------------------------------


def _fold(found: _Found, weights: Weights) -> Folded | Refusal:
    """The convolution's weight and bias with the affines behind it, in float64, rounded once."""
    constants = weights.constants
    weight, bias = (*found.conv.args[1:], None)[:2]
    channels: int = weight.meta["shape"][0]  # type: ignore[union-attr]
    device = constants.tensors[next(iter(constants.tensors))].device
    scale = torch.ones(channels, dtype=torch.float64, device=device)
    shift = torch.zeros_like(scale)
    current = found.conv
    for node in found.affines:
        if node.target is aten.batch_norm.default:
            tensors: list[Any] = [None if t is None else constants.exact(t) for t in node.args[1:5]]
            affine = norm_affine(tensors[2], tensors[3], tensors[0], tensors[1], node.args[7])  # type: ignore[arg-type]
            if isinstance(affine, Refusal):
                return Refusal(affine.code, f"{norm_name(node)}: {affine.message}")
            scale, shift = scale * affine[0], shift * affine[0] + affine[1]
        else:
            value = as_channels(other(node, current), constants, channels)
            scale, shift = _applied(node, current, value, scale, shift)
        current = node
    exact_bias = None if bias is None else constants.exact(bias)
    result = fold_affine(constants.unrounded(weight), exact_bias, scale, shift, weights.dtype_of(found.conv))
    if isinstance(result, Refusal):
        return Refusal(result.code, f"{norm_name(found.affines[0])}: {result.message}")
    return result


def _applied(node: fx.Node, x: fx.Node, value: Any, scale: Any, shift: Any) -> tuple[Any, Any]:
    """(scale, shift) after a product or sum with `value`: tensors, or proxies, which write the arithmetic down."""
    name = arithmetic(node)
    if name == "mul":
        return scale * value, shift * value
    if name == "div":
        return scale / value, shift / value
    if name == "rsub" or (name == "sub" and node.args[0] is not x):
        return -scale, value - shift
    return scale, shift + value if name == "add" else shift - value


def _in_graph(found: _Found, weights: Weights) -> tuple[fx.Node, fx.Node]:
    """Nodes that compute scale and shift, [K], from the tensors as they are at the call."""
    _, weight, bias = (*found.conv.args, None)[:3]
    channels: int = weight.meta["shape"][0]  # type: ignore[union-attr]
    dtype = torch.float64 if found.conv.meta["dtype"] is torch.float64 else torch.float32
    tracer = fx.proxy.GraphAppendingTracer(weights.graph)

    def per_channel(node: Any) -> Any:  # [K]
        return fx.Proxy(node, tracer).to(dtype).reshape(-1).expand(channels)

    scale: Any = None
    shift: Any = 0.0 if bias is None else per_channel(bias)
    current = found.conv
    for node in found.affines:
        if node.target is aten.batch_norm.default:
            statistics: list[Any] = [None if t is None else per_channel(t) for t in node.args[1:5]]
            gamma, beta, mean, var = statistics
            factor = (var + node.args[7]).rsqrt()
            factor = factor if gamma is None else factor * gamma
            scale, shift = factor if scale is None else scale * factor, (shift - mean) * factor
            shift = shift if beta is None else shift + beta
        else:
            operand = other(node, current)
            value = per_channel(operand) if isinstance(operand, fx.Node) else float(operand)
            scale, shift = _applied(node, current, value, 1.0 if scale is None else scale, shift)
        current = node
    kernel = fx.Proxy(weight, tracer)  # type: ignore[arg-type]
    full = (x if isinstance(x, fx.Proxy) else kernel.new_full((channels,), x, dtype=dtype) for x in (scale, shift))
    scale, shift = full
    return scale.node, shift.node


# ---- writing ---------------------------------------------------------------------------------------------------------


def _made_of(found: _Found, weights: Weights, what: str) -> str:
    """A line that says what the weight or bias of the step is made of."""
    constants = weights.constants

    def spell(node: fx.Node) -> str:
        parts = ["x" if isinstance(a, fx.Node) and a not in constants.nodes else a for a in node.args]
        return f"{node.target}({', '.join(constants.key(p) if isinstance(p, fx.Node) else repr(p) for p in parts)})"

    tensors = ", ".join("None" if t is None else constants.key(t) for t in (*found.conv.args, None)[1:3])  # type: ignore[arg-type]
    affines = "; ".join(map(spell, found.affines))
    return f"conv({tensors}) [{affines}] {weights.dtype_of(found.conv)} {what}"


def _write(found: _Found, weights: Weights) -> None:
    graph, conv = weights.graph, found.conv
    x, weight, bias, *where = (*conv.args, None)[: max(len(conv.args), 3)]
    name, scale = module_name(conv), None
    row = _row(name, found, bias is not None, weights)
    with graph.inserting_before(found.nodes[-1]):
        if found.affines and weights.folds:
            parts: list[Any] = [weight, bias]
            for i, part in enumerate(("weight", "bias")):

                def make(i: int = i) -> Tensor:
                    assert found.folded is not None
                    return found.folded[i]

                parts[i] = weights.put(f"{name}.{part}", _made_of(found, weights, part), make)
            weight, bias = parts
        elif found.affines:
            scale, bias = _in_graph(found, weights)
        else:
            dtype = weights.dtype_of(conv)
            weight, bias = weights.kept(weight, f"{name}.weight", dtype), weights.kept(bias, f"{name}.bias", dtype)
        if found.is_2d:
            new = graph.call_function(_CONV_ACT, (x, weight, bias, found.residual, scale, *where, found.act))
        else:
            new = graph.call_function(conv.target, (x, weight, bias, *where))  # type: ignore[arg-type]
    weights.replace(found.nodes, new, row)


def _row(name: str, found: _Found, has_bias: bool, weights: Weights) -> FreezeRow:
    took = [_kind(found)] if found.affines else []
    parts = (
        ["bias"] * (bool(found.affines) or has_bias)
        + ["add"] * (found.residual is not None)
        + [found.act] * (found.act != "none")
    )
    folded = ", ".join(dict.fromkeys(norm_name(n) for n in found.affines))
    stop = found.stop or Refusal("", "")
    message = "; ".join(part for part in (f"{folded} folded" if folded else stop.message, _readers(found)) if part)
    shape = found.conv.args[1].meta["size"]  # type: ignore[union-attr]
    held = (math.prod(shape) + shape[0]) * weights.dtype.itemsize  # what was folded is no longer read
    return FreezeRow(name, "conv", " + ".join(["conv", *parts]), stop.code, message, (*took, *parts), weights=held)


def _kind(found: _Found) -> str:
    """bn where one of the affines is one, or they are written as one: a product and a sum with tensors; else scale."""
    if any(n.target is aten.batch_norm.default for n in found.affines):
        return "bn"
    names = {arithmetic(n) for n in found.affines if len(n.all_input_nodes) > 1}
    return "bn" if names & {"mul", "div"} and names & {"add", "sub"} else "scale"


def _readers(found: _Found) -> str:
    """Name what reads the output, where a convolution did not take an activation in."""
    if found.act != "none":
        return ""
    users = found.nodes[-1].users
    names = sorted({str(u.target).removeprefix("aten.") if u.op == "call_function" else u.op for u in users})
    return f"read by {', '.join(names)}"


FUSION = Fusion("conv_bn_act", 0, _match, _write)
