"""The least cost of a step: the multiplications it makes, and the bytes that it must read and write once."""

from __future__ import annotations

from collections.abc import Sequence, Set
from math import prod
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_PRODUCTS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default}
_FREE = {aten.reshape.default, aten.flatten.using_ints, aten.split.Tensor, aten.chunk.default, aten.slice.Tensor}


def step_cost(nodes: Sequence[fx.Node], dtype: torch.dtype, constants: Set[fx.Node]) -> tuple[int, int, int]:
    """Return the cost of a chain of nodes run as one step, at the capture's batch; ``constants`` are weights.

    Returns:
        Flops (a multiply-add is two), bytes of activations, bytes of weights; floating tensors in ``dtype``.
    """
    inside = set(nodes)
    flops = sum(_flops(node) for node in nodes)
    read = {source for node in nodes for source in node.all_input_nodes if source not in inside}
    moved = weights = 0
    for node in read:
        if node in constants:
            weights += _bytes(node, dtype)
        elif nodes[-1].target not in _FREE:
            moved += _bytes(node, dtype)
    if nodes[-1].target not in _FREE:
        moved += _bytes(nodes[-1], dtype)
    return flops, moved, weights


def _flops(node: Any) -> int:
    out = int(prod(node.meta.get("size", (0,))))
    if node.target in _PRODUCTS:
        return 2 * _products(node)
    if node.target is aten.linear.default:
        return 2 * out * int(node.args[1].meta["size"][-1])
    return 0


def _products(conv: Any) -> int:
    """The multiplications of a convolution: none for taps in the padding, of which a dilated kernel has many."""
    x, (_, per_group, *kernel) = conv.args[0].meta.get("size"), conv.args[1].meta["size"]
    out = conv.meta.get("size", (0,))
    where = conv.args[3:6]
    if conv.target is not aten.conv2d.default or x is None or len(where) < 3 or len(out) != 4:
        return int(prod(out)) * int(per_group) * int(prod(kernel))
    taps = 1
    for i, (stride, padding, dilation) in enumerate(zip(*where, strict=True), 2):
        starts = [stride * at - padding for at in range(out[i])]
        taps *= sum(0 <= start + dilation * tap < x[i] for start in starts for tap in range(kernel[i - 2]))
    return int(out[0]) * int(out[1]) * int(per_group) * taps


def _bytes(node: Any, dtype: torch.dtype) -> int:
    own: torch.dtype | None = node.meta.get("dtype")
    if own is None:
        return 0
    return int(prod(node.meta.get("size", (0,)))) * (dtype if own.is_floating_point else own).itemsize


def operator_name(node: fx.Node) -> str:
    """aten.max_pool2d for aten.max_pool2d.default."""
    return str(node.target).removesuffix(".default")
