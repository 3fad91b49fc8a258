"""Folding an affine, a batch normalization for one, into the convolution before it.

    formula    y     = scale * (conv(x, w) + b) + shift        per output channel
                     = conv(x, w') + b'
               BN    scale = gamma / sqrt(var + eps), shift = beta - scale * mean
               w'    = scale * w
               b'    = scale * b + shift

Everything is computed in float64 and rounded once, to the frozen dtype. A missing bias, gamma or beta is 0, 1 or 0.

Source: Jacob et al. 2018, section 3.2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.graph.rows import Refusal


class Folded(NamedTuple):
    weight: Tensor  # [C_out, C_in / groups, *kernel], the frozen dtype
    bias: Tensor  # [C_out], the frozen dtype


def norm_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor] | Refusal:
    """scale and shift of a BN, float64 [C]: y = scale * x + shift.

    Refused: ``BAD_VARIANCE`` where var + eps is not a positive normal float32, the type that every BN computes in.
    """
    spread = var.detach().double() + eps
    if not bool((spread >= torch.finfo(torch.float32).tiny).all()):  # NaN fails too
        least = float(spread.min()) if len(spread) else 0.0
        return Refusal("BAD_VARIANCE", f"its var + eps is {least:.3g} at the least, not a normal float32")
    scale = spread.rsqrt()
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean.detach().double() * scale
    return scale, shift if bias is None else shift + bias.detach().double()


def fold_affine(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> Folded | Refusal:
    """The weight and bias of ``scale * (conv(x, weight) + bias) + shift`` as one convolution, rounded to ``dtype``.

    Args:
        weight: [C_out, C_in / groups, *kernel], bias: [C_out] or None; any floating dtype.
        scale, shift: [C_out], float64.

    Refused: ``OVERFLOW`` and ``UNDERFLOW`` where the folded weights do not fit ``dtype``: infinite, or so small that
    rounding them costs more than twice the rounding of ``dtype``.
    """
    exact = weight.detach().to(torch.float64, copy=True)  # one copy of it, and nothing else that large
    exact.mul_(scale.view(-1, *[1] * (weight.ndim - 1)))  # [C_out, C_in / groups, *kernel]
    moved = shift if bias is None else shift + scale * bias.detach().double()  # [C_out]
    folded = Folded(exact.to(dtype, copy=True), moved.to(dtype))
    if not exact.numel():
        return folded
    for name, rounded, of in (("weight", folded.weight, exact), ("bias", folded.bias, moved)):
        if not all(math.isfinite(float(end)) for end in rounded.aminmax()):
            largest = float(of.abs().max())
            return Refusal("OVERFLOW", f"the folded {name} reaches {largest:.3g}, too large for {short(dtype)}")
    size = float(torch.linalg.vector_norm(exact))
    lost = float(torch.linalg.vector_norm(exact.sub_(folded.weight)))
    if lost > 2 * torch.finfo(dtype).eps * size:
        rms = size / math.sqrt(exact.numel())
        return Refusal("UNDERFLOW", f"the folded weight's RMS is {rms:.3g}, too small for {short(dtype)}")
    return folded


def short(dtype: torch.dtype) -> str:
    """float16 for torch.float16."""
    return str(dtype).removeprefix("torch.")
