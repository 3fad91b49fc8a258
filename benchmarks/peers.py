"""What stands beside fastres, and what `fastres` itself is: the same call in eager, compiled and fused form.

Eager is what torchvision's blocks do: the addition and the ReLU are in place where autograd allows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres.functional import add_relu, bn_act

LEVELS = ("eager", "quick", "all")  # eager alone; other engines, torch.compile at a few cases; torch.compile everywhere
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Forward = Callable[..., Tensor]


def eager_bn_act(running: tuple[Tensor, Tensor], training: bool, act: str) -> Forward:
    def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.batch_norm(x, *running, weight, bias, training, 0.1, 1e-5)
        if residual is not None:
            out += residual
        return out.relu_() if act == "relu" else out

    return forward


def fused_bn_act(running: tuple[Tensor, Tensor], training: bool, act: str, backend: str = "auto") -> Forward:
    how: dict[str, Any] = {"act": act, "training": training, "momentum": 0.1, "eps": 1e-5, "backend": backend}

    def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return bn_act(x, *running, weight, bias, residual, **how)

    return forward


def eager_add_relu(x: Tensor, residual: Tensor) -> Tensor:
    return (x + residual).relu_()  # a leaf cannot take torchvision's `out += residual`; one allocation, as fastres


def fused_add_relu(backend: str = "auto") -> Forward:
    return partial(add_relu, backend=backend)


def backend_of(peer: str) -> str | None:
    """The backend that a peer of an operator asks for; None for one that is not ours."""
    return {"fastres": "auto", "eager": None, "compile": None}.get(peer, peer)


def eager_conv_act(stride: int, padding: int, act: str) -> Forward:
    def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.conv2d(x, weight, bias, stride, padding)
        if residual is not None:
            out += residual
        return out.relu_() if act == "relu" else out

    return forward


def conv_bias(stride: int, padding: int, read: bool) -> Forward:
    """What a fused convolution is held against: the convolution and its bias and, with `read`, one reading of the
    residual."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.conv2d(x, weight, bias, stride, padding)
        if read and residual is not None:
            words(residual).max()
        return out

    return forward


def words(t: Tensor) -> Tensor:
    """A dense channels_last tensor as integers of 4 bytes, in the order of its memory, whatever they mean."""
    return t.permute(0, 2, 3, 1).reshape(-1).view(torch.int32)


def compiled(forward: Any) -> Any:
    """torch.compile in its default mode; it compiles at the first call, and in a training call for backward too."""
    return torch.compile(forward, dynamic=False, fullgraph=True)


def with_gradients(forward: Forward, inputs: tuple[Tensor, ...], dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """One call: y, and its gradients for all inputs, which are leaves."""

    def call() -> tuple[Tensor, ...]:
        y = forward(*inputs)
        return y, *torch.autograd.grad(y, inputs, dy)

    return call


def forward_only(forward: Forward, inputs: tuple[Tensor, ...], grad: bool) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(grad):
            return (forward(*inputs),)

    return call


def module_variants(module: nn.Module, x: Tensor, names: tuple[str, ...]) -> dict[str, tuple[nn.Module, Tensor]]:
    """Copies of a module, one for each name, and the input in its layout.

    Names: eager, swapped, swapped_min (memory="min") or compile, each alone (NCHW) or with _channels_last behind it.
    """
    variants = {}
    for name in names:
        layout = LAYOUTS["channels_last" if name.endswith("channels_last") else "nchw"]
        variant: Any = copy.deepcopy(module)
        variant = variant.to(memory_format=layout)
        if name.startswith("swapped"):
            fastres.swap(variant, strict=True, memory="min" if name.startswith("swapped_min") else "default")
        if name.startswith("compile"):
            variant = compiled(variant)
        variants[name] = variant, x.contiguous(memory_format=layout)
    return variants
