"""conv_act -> max_pool2d becomes one stem: the convolution's output is never written.

Not for the convolutions that Winograd or a product runs, 3x3 and 1x1 of stride 1: they gain more by those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fastres.graph.fusions import Fusion, Weights
from fastres.graph.normalize import aten, pair
from fastres.graph.patterns import only_reader

_CONV_ACT, _STEM = torch.ops.fastres.conv_act.default, torch.ops.fastres.stem.default
_DEFAULTS: tuple[Any, ...] = (None, None, [], 0, 1, False)  # of max_pool2d's arguments


@dataclass(frozen=True)
class _Found:
    conv: fx.Node
    pool: fx.Node
    window: list[list[int]]  # kernel, stride, padding


def _match(node: fx.Node, weights: Weights) -> _Found | None:
    if node.target is not _CONV_ACT or not weights.folds or node not in weights.rows:
        return None
    pool, (_, weight, _, residual, scale, stride) = only_reader(node), node.args[:6]
    if residual is not None or scale is not None or pool is None or pool.target is not aten.max_pool2d.default:
        return None
    kernel = weight.meta["shape"][2:]  # type: ignore[union-attr]
    if max(kernel) <= 3 and max(pair(stride)) == 1:
        return None
    window = _window(pool)
    return None if window is None else _Found(node, pool, window)


def _window(pool: fx.Node) -> list[list[int]] | None:
    """Its kernel, stride and padding, two numbers each; None where it is dilated, rounds up, or is not constant."""
    given: tuple[Any, ...] = (*pool.args, *_DEFAULTS[len(pool.args) :])
    _, kernel, stride, padding, dilation, ceil_mode = given
    if pool.kwargs or ceil_mode or pair(dilation) != [1, 1]:
        return None
    window: list[Any] = [pair(kernel), pair(stride or kernel), pair(padding)]
    return window if all(type(n) is int for part in window for n in part) else None


def _write(found: _Found, weights: Weights) -> None:
    x, weight, bias, _, _, *rest = found.conv.args
    row = weights.rows.pop(found.conv)
    with weights.graph.inserting_before(found.pool):
        new = weights.graph.call_function(_STEM, (x, weight, bias, *rest, *found.window))
    weights.replace([found.conv, found.pool], new, replace(row, became=f"{row.became} + max_pool"))
    weights.rows[new] = replace(weights.rows[new], flops=row.flops)


FUSION = Fusion("stem", 4, _match, _write)
