"""The calls that a benchmark compares: eager, compiled and fused forms of an operator or a module.

Eager is what torchvision's blocks do: the addition and the ReLU are in place where autograd allows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastres

LEVELS = (
    "eager",
    "quick",
    "all",
)  # eager; also the engines, torch.compile in a few cases; torch.compile everywhere
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Forward = Callable[..., Tensor]
Call = Callable[[], tuple[Tensor, ...]]


def backend_of(peer: str) -> str | None:
    """The backend of ours that a peer of an operator asks for; None for eager and torch.compile."""
    return {"fastres": "auto", "eager": None, "compile": None}.get(peer, peer)


def words(t: Tensor) -> Tensor:
    """View a dense channels_last tensor as 4-byte integers in memory order, to read it at full bandwidth."""
    return t.permute(0, 2, 3, 1).reshape(-1).view(torch.int32)


def compiled(forward: Any) -> Any:
    """torch.compile in its default mode; it compiles at the first call, and in a training call for backward too."""
    return torch.compile(forward, dynamic=False, fullgraph=True)


def with_gradients(forward: Forward, inputs: tuple[Tensor, ...], dy: Tensor, parameters: Any = ()) -> Call:
    """A call that returns y and its gradients for the inputs that require one and the parameters."""
    leaves = (*(t for t in inputs if t.requires_grad), *parameters)

    def call() -> tuple[Tensor, ...]:
        y = forward(*inputs)
        return y, *torch.autograd.grad(y, leaves, dy)

    return call


def forward_only(forward: Forward, inputs: tuple[Tensor, ...], grad: bool) -> Call:
    """A call that returns (y,), with gradients enabled or not."""

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(grad):
            return (forward(*inputs),)

    return call


def conv_tensors(
    c: Any, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random x, weight, bias and residual of a shapes.Conv in one dtype, images and weights in channels_last.

    The weights are scaled so that the output has the size of x; the residual is None unless the convolution ends a
    block.
    """

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device).mul_(scale).to(dtype).contiguous(memory_format=torch.channels_last)

    x = tensor(batch, c.inputs, c.size, c.size)
    weight = tensor(c.outputs, c.inputs, c.kernel, c.kernel, scale=(c.inputs * c.kernel**2) ** -0.5)
    bias = torch.randn(c.outputs, device=device).to(dtype)
    return x, weight, bias, tensor(batch, c.outputs, c.out, c.out) if c.residual else None


def module_variants(module: nn.Module, x: Tensor, names: tuple[str, ...]) -> dict[str, tuple[nn.Module, Tensor]]:
    """Copies of a module by name, each with the input in its layout.

    Names: eager, swapped, swapped_min (memory="min") or compile; NCHW, or with the suffix _channels_last in that
    layout.
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
