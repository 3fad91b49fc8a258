"""Tensors of every operator: eager's output strides, one memory order for all inputs, typed checks, refusals."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor
from torch._prims_common import compute_elementwise_output_strides

from fastres import _extension

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*KERNEL_DTYPES, torch.float64)


def is_channels_last(x: Tensor) -> bool:
    """Say whether eager calls x, [N, C, H, W], channels_last; ambiguous strides count as NCHW, as there."""
    smallest = 0
    shape, stride = x.shape, x.stride()
    if shape[0] * shape[2] * shape[3] == 1:  # eager's batch_norm answers in NCHW strides
        return False
    if stride[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if shape[d] == 0 or stride[d] < smallest:
            return False
        if d == 0 and smallest == stride[1]:  # N111: the strides say nothing
            return False
        smallest = stride[d]
        if shape[d] > 1:
            smallest = smallest * shape[d]
    return True


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_elementwise(a: Tensor, b: Tensor, act: str = "relu", device: torch.device | str | None = None) -> Tensor:
    """An uninitialized tensor with the strides that eager gives `act(a + b)`; `a` and `b` have one shape and dtype."""
    device = a.device if device is None else device
    if a.is_contiguous() and b.is_contiguous():
        return torch.empty_like(a, memory_format=torch.contiguous_format, device=device)
    if a.ndim == 4 and is_nhwc(a) and is_nhwc(b):
        return torch.empty_like(a, memory_format=torch.channels_last, device=device)
    y = torch.empty_strided(a.shape, compute_elementwise_output_strides(a, b), dtype=a.dtype, device=device)
    # the addition may leave odd strides on dimensions of size 1; the activation makes them canonical
    return torch.empty_like(y, memory_format=torch.contiguous_format) if act == "relu" and y.is_contiguous() else y


def with_strides(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`t`, copied only if its strides are others."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def stats_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and of per-channel arithmetic: float32, float64 for float64 activations."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def check_activation(op: str, name: str, t: object, like: Tensor | None = None) -> None:
    """Raises unless `t` is a floating tensor of a known dtype, and of `like`'s shape, dtype and device when given."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name}: got {type(t).__name__}, expected a Tensor")
    if t.dtype not in DTYPES:
        raise TypeError(f"{op}: {name}: got dtype {t.dtype}, expected one of {[str(d) for d in DTYPES]}")
    if t.layout is not torch.strided:
        raise TypeError(f"{op}: {name}: got layout {t.layout}, expected a strided (dense) tensor")
    if like is None:
        return
    if t.shape != like.shape:
        raise ValueError(f"{op}: {name}: got shape {list(t.shape)}, expected x's shape {list(like.shape)}")
    if t.dtype != like.dtype:
        raise TypeError(f"{op}: {name}: got dtype {t.dtype}, expected x's dtype {like.dtype}")
    if t.device != like.device:
        raise ValueError(f"{op}: {name}: got device {t.device}, expected x's device {like.device}")


def why_not_cpu(x: Tensor) -> list[str]:
    """Refusals of the C++ CPU kernels."""
    if x.device.type != "cpu":
        return [f"x is on {x.device}, the kernel runs on cpu"]
    if x.dtype not in KERNEL_DTYPES:
        return [f"dtype {x.dtype} runs through the reference"]
    missing = _extension.why_not_cpu()
    return [missing] if missing else []


def why_not_cuda(x: Tensor) -> list[str]:
    """Refusals of the CUDA C++ kernels."""
    if x.device.type != "cuda":
        return [f"x is on {x.device}, the kernel runs on cuda"]
    if x.dtype not in KERNEL_DTYPES:
        return [f"dtype {x.dtype} runs through the reference"]
    missing = _extension.why_not_cuda()
    if missing:
        return [missing]
    built_for = str(_extension.build_info_cuda().get("architectures", ""))
    unfit = _extension.why_not_architecture(torch.cuda.get_device_capability(x.device), built_for)
    return [unfit] if unfit else []


@cache
def _triton_missing() -> bool:
    return importlib.util.find_spec("triton") is None


def why_not_triton(x: Tensor) -> list[str]:
    """Refusals of the Triton kernels."""
    if _triton_missing():
        return ["triton is not installed (pip install triton)"]
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return [f"x is on {x.device}, the kernel runs on cuda"]
    if x.dtype not in KERNEL_DTYPES:
        return [f"dtype {x.dtype} runs through the reference"]
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return [f"compute capability {torch.cuda.get_device_capability(x.device)}, the kernels need 8.0"]
    return []


def why_not_reference(x: Tensor) -> list[str]:
    """The reference takes everything that the checks let through."""
    return []
