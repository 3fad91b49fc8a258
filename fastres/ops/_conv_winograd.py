"""3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3) and F(4x4, 3x3), on a CPU: csrc/cpu/conv_winograd.cpp.

Frozen networks call the native operators, on weights that were transformed once. "winograd2" has 2.25 times fewer
products than a direct convolution and is at least as exact; "winograd4" has 4 times fewer and 1.4 times the error.
docs/winograd.md says why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres.ops._tensors import why_not_cpu

TILES = {"winograd2": 2, "winograd4": 4}  # way -> the side of a tile of outputs
ACTS = ("none", "relu", "relu6", "hardswish")  # that the kernel has in its epilogue
_FEWEST = 16  # channels: with fewer, the transforms take longer than the products that they save

_LIB = torch.library.Library("fastres", "FRAGMENT")
_LIB.define("_conv_winograd_pack_native(Tensor weight, int tile) -> Tensor")
_END = "Tensor? scale, int outputs, int pad_h, int pad_w, str act"
_LIB.define(f"_conv_winograd_native(Tensor x, Tensor u, Tensor? bias, Tensor? residual, {_END}) -> Tensor")
_LIB.define(f"_conv_winograd_over_native(Tensor x, Tensor u, Tensor? bias, Tensor(a!) residual, {_END}) -> Tensor(a!)")

pack = torch.ops.fastres._conv_winograd_pack_native.default
forward = torch.ops.fastres._conv_winograd_native.default
over = torch.ops.fastres._conv_winograd_over_native.default


def why_not(x: Tensor, weight: tuple[int, ...], where: tuple[Any, ...], act: str) -> list[str]:
    """Refusals for x, [N, C, H, W], a weight of this shape, (stride, padding, dilation, groups) and an activation."""
    reasons = why_not_cpu(x)
    stride, padding, dilation, groups = where
    if tuple(weight[2:]) != (3, 3):
        reasons.append(f"the kernel is {weight[2]}x{weight[3]}, Winograd's is 3x3")
    if tuple(stride) != (1, 1) or tuple(dilation) != (1, 1):
        reasons.append(f"stride {tuple(stride)} and dilation {tuple(dilation)}, Winograd's are 1")
    if groups != 1:
        reasons.append(f"{groups} groups, Winograd has 1")
    if max(padding) > 2:
        reasons.append(f"padding {tuple(padding)}, Winograd's is at most 2")
    if min(weight[:2]) < _FEWEST:
        reasons.append(f"{weight[1]} to {weight[0]} channels: below {_FEWEST} the transforms cost more than they save")
    if act not in ACTS:
        reasons.append(f"act is {act!r}: the kernel has {', '.join(ACTS)}")
    if x.numel() == 0:
        reasons.append("an empty tensor runs through the reference")
    return reasons


def faster(n: int, c: int, k: int, p: int, q: int) -> tuple[str, ...]:
    """The ways that are faster than oneDNN's, the fastest first, as far as the sizes tell; `tune` measures.

    Products at the rate of the multiply-adds, transforms at that of memory in L2, the transformed weight read once:
    seconds in units of one multiply-add on 16 lanes and 2 ports.
    """
    direct = 9.0 * c * k * n * p * q / 32
    costs = {}
    for way, m in TILES.items():
        taps, tiles = (m + 2) ** 2, n * -(-p // m) * -(-q // m)
        products = taps * tiles * c * k / 32
        transforms = taps * tiles * (c + k) / 8  # a vector of V or M is made, stored and read again
        weights = taps * c * k / 4  # from the last-level cache or memory
        costs[way] = products + transforms + weights
    return tuple(way for way in sorted(costs, key=lambda way: costs[way]) if costs[way] < 0.85 * direct)
