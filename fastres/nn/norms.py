"""The norms that a fused step stands for: nn.BatchNorm2d, and the FrozenBatchNorm2d of detection networks.

    frozen    y = x * scale + shift    scale = weight * rsqrt(running_var + eps), shift = bias - running_mean * scale

with the same statistics in training mode. torchvision's has eps as an attribute, those of Hugging Face's detection
networks, a class for each, as a constant. A class is known by its forward: the same code as a formula below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastres.ops._autograd import is_transformed
from fastres.ops.bn_act import batch_norm_arguments


def _own_eps(self: Any, x: Any) -> Any:
    """torchvision's FrozenBatchNorm2d.forward."""
    w = self.weight.reshape(1, -1, 1, 1)
    b = self.bias.reshape(1, -1, 1, 1)
    rv = self.running_var.reshape(1, -1, 1, 1)
    rm = self.running_mean.reshape(1, -1, 1, 1)
    scale = w * (rv + self.eps).rsqrt()
    bias = b - rm * scale
    return x * scale + bias


def _own_eps_and_act(self: Any, x: Any) -> Any:
    """timm's FrozenBatchNormAct2d.forward."""
    w = self.weight.reshape(1, -1, 1, 1)
    b = self.bias.reshape(1, -1, 1, 1)
    rv = self.running_var.reshape(1, -1, 1, 1)
    rm = self.running_mean.reshape(1, -1, 1, 1)
    scale = w * (rv + self.eps).rsqrt()
    bias = b - rm * scale
    x = x * scale + bias
    x = self.act(self.drop(x))
    return x


def _constant_eps(self: Any, x: Any) -> Any:
    """DetrFrozenBatchNorm2d.forward, and its copies in Hugging Face's other detection networks."""
    weight = self.weight.reshape(1, -1, 1, 1)
    bias = self.bias.reshape(1, -1, 1, 1)
    running_var = self.running_var.reshape(1, -1, 1, 1)
    running_mean = self.running_mean.reshape(1, -1, 1, 1)
    epsilon = 1e-5
    scale = weight * (running_var + epsilon).rsqrt()
    bias = bias - running_mean * scale
    return x * scale + bias


def same_code(function: Any, formula: Callable[..., Any]) -> bool:
    """Say whether both do the same to the same names, whatever their docstrings and local names."""
    ours, theirs = formula.__code__, getattr(function, "__code__", None)
    if theirs is None or (theirs.co_code, theirs.co_names) != (ours.co_code, ours.co_names):
        return False
    texts = (str, type(None))  # a docstring, or none
    return [c for c in theirs.co_consts if not isinstance(c, texts)] == [
        c for c in ours.co_consts if not isinstance(c, texts)
    ]


_EPS: dict[type, float | str | None] = {}  # of frozen norms; "own": an attribute; None: no frozen norm


def _frozen_eps(cls: type) -> float | str | None:
    if cls not in _EPS:
        forward = getattr(getattr(cls, "fastres_stock", cls), "forward", None)
        frozen = issubclass(cls, nn.Module) and not issubclass(cls, nn.BatchNorm2d)
        own = frozen and any(same_code(forward, formula) for formula in (_own_eps, _own_eps_and_act))
        _EPS[cls] = "own" if own else 1e-5 if frozen and same_code(forward, _constant_eps) else None
    return _EPS[cls]


def is_frozen_norm(module: Any) -> bool:
    """Say whether `module`'s class is a FrozenBatchNorm2d, timm's with its activation included."""
    return _frozen_eps(type(module)) is not None


def norm_arguments(norm: Any) -> dict[str, Any]:
    """`bn_act`'s arguments that mean what the forward of `norm`, without an activation of its own, would do now."""
    if isinstance(norm, nn.BatchNorm2d):
        return batch_norm_arguments(norm)
    eps = _frozen_eps(type(norm))
    return {
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "weight": norm.weight,
        "bias": norm.bias,
        "training": False,
        "momentum": 0.0,
        "eps": norm.eps if eps == "own" else eps,
        "num_batches_tracked": None,
    }


def runs_stock(norm: Any, x: Tensor) -> bool:
    """Say whether a frozen `norm` has to run by its formula: where dtypes are promoted, and inside a transform."""
    return not isinstance(norm, nn.BatchNorm2d) and (norm.weight.dtype is not x.dtype or is_transformed())


def stock_step(x: Tensor, norm: Any, residual: Tensor | None, act: str) -> Tensor:
    """act(norm(x) [+ residual]) by the formula of a frozen norm. x: [N, C, H, W]."""
    how = norm_arguments(norm)
    mean, var, weight, bias = (
        how[name].reshape(1, -1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
    )
    scale = weight * (var + how["eps"]).rsqrt()
    y = x * scale + (bias - mean * scale)
    y = y if residual is None else y + residual
    return torch.relu(y) if act == "relu" else y
