"""Folding a batch normalization into the convolution before it.

    formula    y     = scale * (conv(x, w) + b - mean) + beta        scale = gamma / sqrt(var + eps), per output channel
                     = conv(x, w') + b'
               w'    = scale * w
               b'    = scale * (b - mean) + beta

Everything is computed in float64 and rounded once, to the frozen dtype. A missing bias, gamma or beta is 0, 1 or 0.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# Classes of libraries that need not be installed. They have weight, bias, running_mean, running_var and an eps of their
# own (torchvision's is 1e-5 unless given); timm's also end with a drop layer and an activation, which stay.
_FROZEN = (("torchvision.ops.misc", "FrozenBatchNorm2d"),)
_WITH_ACT = (("timm.layers.norm_act", "BatchNormAct2d"), ("timm.layers.norm_act", "FrozenBatchNormAct2d"))


class Refusal(NamedTuple):
    """A reason to leave something as it is: a code and a sentence."""

    code: str
    message: str


class Folded(NamedTuple):
    weight: Tensor  # [C_out, C_in / groups, *kernel], the frozen dtype
    bias: Tensor  # [C_out], the frozen dtype


def _is_one_of(module: nn.Module, classes: tuple[tuple[str, str], ...]) -> bool:
    return any(type(module) is getattr(sys.modules.get(where), name, None) for where, name in classes)


def is_norm(module: nn.Module) -> bool:
    """Say whether folding knows what this module computes in eval mode: one of the classes above, no subclass."""
    return type(module) in NORMS or _is_one_of(module, _FROZEN) or _is_one_of(module, _WITH_ACT)


def remainder(norm: nn.Module) -> nn.Module:
    """Return what is left of a norm once it is folded: nothing, or timm's drop layer and activation."""
    if not _is_one_of(norm, _WITH_ACT):
        return nn.Identity().eval()
    rest = [m for m in (norm.get_submodule("drop"), norm.get_submodule("act")) if type(m) is not nn.Identity]
    return nn.Sequential(*rest).eval() if rest else nn.Identity().eval()


def refuse_norm(norm: nn.Module) -> Refusal | None:
    """Say why this norm cannot be folded whatever its numbers are."""
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        return Refusal(
            "BATCH_STATISTICS", "it keeps no running statistics: in eval mode too it normalizes by the batch's"
        )
    return None


def fold(conv: Any, norm: Any, dtype: torch.dtype) -> Folded | Refusal:
    """The convolution's weight and bias with ``norm`` folded in, rounded to ``dtype``; or why not.

    Args:
        conv: a Conv1d, Conv2d or Conv3d; weight [C_out, C_in / groups, *kernel], bias [C_out] or None.
        norm: weight, bias [C_out] or None; running_mean, running_var [C_out]; eps, its own.
        dtype: what the frozen network computes in.

    Refused (codes): ``BAD_VARIANCE`` where var + eps is not a positive normal float32, the type that every BN computes
    in; ``OVERFLOW`` and ``UNDERFLOW`` where the folded weights do not fit ``dtype``: infinite, or so small that
    rounding them costs more than twice the rounding of ``dtype``.
    """
    refusal = refuse_norm(norm)
    if refusal is not None:
        return refusal
    if len(norm.running_var) != len(conv.weight):
        return Refusal("SHAPE", f"it has {len(norm.running_var)} channels, the convolution {len(conv.weight)}")
    affine = norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    if isinstance(affine, Refusal):
        return affine
    return fold_affine(conv.weight, conv.bias, *affine, dtype)


def norm_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor] | Refusal:
    """scale and shift of a BN, float64 [C]: y = scale * x + shift. Refused: ``BAD_VARIANCE``."""
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

    Refused (codes): ``OVERFLOW`` and ``UNDERFLOW``, see :func:`fold`.
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
