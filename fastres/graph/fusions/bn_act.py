"""BN -> [add] -> [relu] that no convolution takes in becomes one bn_act: pre-activation networks (He et al. 2016b)."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from fastres.graph.fusions import Fusion, Weights
from fastres.graph.normalize import aten
from fastres.graph.patterns import epilogue, norm_name, only_reader
from fastres.graph.rows import ACTS, FreezeRow, Refusal

_BN_ACT = torch.ops.fastres.bn_act.default


class _Found(NamedTuple):
    nodes: list[fx.Node]  # in their order, the last gives the output
    residual: Any
    act: str
    stop: Refusal
    stays: bool  # as it is written


def _match(node: fx.Node, weights: Weights) -> _Found | None:
    if node.target is not aten.batch_norm.default or "row" in node.meta:
        return None
    x: Any = node.args[0]
    if node.args[5]:
        stop = Refusal("BATCH_STATISTICS", "in eval mode too it normalizes by the batch's statistics")
    elif not all(t is None or t in weights.constants.nodes for t in node.args[1:5]):
        stop = Refusal("NOT_CONSTANT", "its tensors are computed from the input")
    else:
        stop = _why_not_folded(node, x, weights)
    if stop.code in ("BATCH_STATISTICS", "NOT_CONSTANT") or len(node.meta["shape"]) != 4:
        return _Found([node], None, "none", stop, True) if weights.folds else None
    behind, residual, act = epilogue(node, weights.constants, ("relu",), ("relu",))
    return _Found([node, *behind], residual, act, stop, False)


def _why_not_folded(norm: fx.Node, x: fx.Node, weights: Weights) -> Refusal:
    """Say why no convolution has taken a BN of constant tensors in."""
    row = weights.rows.get(x)
    if row is None or row.kind != "conv" or {"add", *ACTS}.intersection(row.took):
        return Refusal("NO_CONV", "it reads no convolution's output")
    if only_reader(x) is not norm:
        return Refusal("SHARED", f"{row.name} is read elsewhere too")
    return Refusal(row.reason, row.message)


def _write(found: _Found, weights: Weights) -> None:
    norm, last = found.nodes[0], found.nodes[-1]
    name = norm_name(norm)
    took = ["add"] * (found.residual is not None) + [found.act] * (found.act != "none")
    row = FreezeRow(name, "norm", " + ".join(["batch norm", *took]), *found.stop, tuple(took))
    if found.stays:
        weights.replace(found.nodes, norm, row)
        return
    x, *tensors, _, _, eps, _ = norm.args
    dtype = torch.float64 if weights.dtype_of(norm) is torch.float64 else torch.float32
    parts = ("weight", "bias", "running_mean", "running_var")
    with weights.graph.inserting_before(last):
        kept = [weights.kept(t, f"{name}.{part}", dtype) for t, part in zip(tensors, parts, strict=True)]
        arguments = (x, *kept, found.residual, False, eps, found.act)
        outputs = weights.graph.call_function(_BN_ACT, arguments)
        outputs.meta = {"row": True}
        new = weights.graph.call_function(operator.getitem, (outputs, 0))
    weights.replace(found.nodes, new, row)


FUSION = Fusion("bn_act", 1, _match, _write)
