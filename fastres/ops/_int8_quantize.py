"""quantize and dequantize: numbers as unsigned 8-bit integers and back, in frozen networks.

    formula    q = clamp(round(x / scale) + zero_point, 0, 255)     ties to even; NaN gives 0
               x' = (q - zero_point) * scale

zero_point is the integer that stands for 0, so that padding is exact. One pass over x: images [N, C, H, W] in either
layout come out in channels_last, which the int8 convolutions read.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastres import _extension
from fastres._dispatch import REFERENCE, Argument, Backend, Choices, Operator, Prepared, register
from fastres.ops._tensors import KERNEL_DTYPES, why_not_reference

_LIB = torch.library.Library("fastres", "FRAGMENT")
_LIB.define("quantize(Tensor x, float scale, int zero_point) -> Tensor")
_LIB.define("dequantize(Tensor x, float scale, int zero_point, ScalarType dtype) -> Tensor")
_LIB.define("_quantize_native(Tensor x, float scale, int zero_point) -> Tensor?")
_LIB.define("_dequantize_native(Tensor x, float scale, int zero_point) -> Tensor?")

NATIVE = "native"
_quantize_native = torch.ops.fastres._quantize_native.default
_dequantize_native = torch.ops.fastres._dequantize_native.default


def check_quantized(op: str, name: str, t: object) -> None:
    """Raise TypeError unless `t` is a uint8 tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name}: got {type(t).__name__}, expected a Tensor")
    if t.dtype is not torch.uint8:
        raise TypeError(f"{op}: {name}: got dtype {t.dtype}, expected torch.uint8")


def check_scale(op: str, name: str, scale: float, zero_point: int, zero_name: str) -> None:
    """Raise ValueError unless they map 0..255 to numbers, 0 among them."""
    if not 0 < scale < float("inf"):
        raise ValueError(f"{op}: {name}: got {scale}, expected a positive finite number")
    if not 0 <= zero_point <= 255:
        raise ValueError(f"{op}: {zero_name}: got {zero_point}, expected an integer from 0 to 255")


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last for images, else contiguous."""
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format


def rounded(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Numbers as uint8, in the arithmetic of x: multiplied by the scale's inverse as the kernels do it."""
    q = torch.round(x * (1.0 / scale)) + zero_point
    return q.nan_to_num(0.0, 255.0, 0.0).clamp_(0, 255).to(torch.uint8)


def _quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"quantize: x: got {got}, expected a floating Tensor")
    check_scale("quantize", "scale", scale, zero_point, "zero_point")
    wide = x if x.dtype is torch.float64 else x.float()
    return rounded(wide, scale, zero_point).contiguous(memory_format=layout_of(x))


def _dequantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    check_quantized("dequantize", "x", x)
    check_scale("dequantize", "scale", scale, zero_point, "zero_point")
    wide = x.to(torch.float64 if dtype is torch.float64 else torch.float32)
    return wide.sub_(zero_point).mul_(scale).to(dtype)


def _fake_quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8, memory_format=layout_of(x))


def _fake_dequantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


for _key in ("CPU", "CUDA"):
    _LIB.impl("quantize", _quantize, _key)
    _LIB.impl("dequantize", _dequantize, _key)
torch.library.register_fake("fastres::quantize", _fake_quantize, lib=_LIB)
torch.library.register_fake("fastres::dequantize", _fake_dequantize, lib=_LIB)


# ---- stock operators: what exporters read as QuantizeLinear and DequantizeLinear -------------------------------------


_namespace: Any = None  # PyTorch's quantizing operators, once they are registered


def load_stock_operators() -> None:
    """Register PyTorch's quantizing operators, which an import does: before anything is traced."""
    global _namespace
    try:
        import_module("torch.ao.quantization.fx._decomposed")
    except ImportError:  # a torch without them: arithmetic does
        return
    _namespace = torch.ops.quantized_decomposed


def stock_quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """uint8 by PyTorch's operators."""
    if _namespace is None:
        return torch.clamp(torch.round(x.float() * (1.0 / scale)) + zero_point, 0, 255).to(torch.uint8)
    return _namespace.quantize_per_tensor.default(x.float(), scale, zero_point, 0, 255, torch.uint8)  # type: ignore[no-any-return]


def stock_dequantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers by PyTorch's operators."""
    if _namespace is None:
        return ((x.float() - zero_point) * scale).to(dtype)
    y = _namespace.dequantize_per_tensor.default(x, scale, zero_point, 0, 255, torch.uint8)
    return y if dtype is torch.float32 else y.to(dtype)  # type: ignore[no-any-return]


def stock_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight of int8, [K, ...], as numbers, with a scale for each output channel."""
    if _namespace is None:
        return weight.float() * scale.view(-1, *[1] * (weight.ndim - 1))
    zero_points = torch.zeros_like(scale, dtype=torch.int64)
    return _namespace.dequantize_per_channel.default(  # type: ignore[no-any-return]
        weight, scale, zero_points, 0, -128, 127, torch.int8
    )


# ---- frozen networks -------------------------------------------------------------------------------------------------


def why_not_native(t: Tensor) -> str:
    """Say why the C++ kernels do not take such a tensor; empty where they do."""
    if t.device.type != "cpu" or not t.numel() or t.layout is not torch.strided:
        return "not a dense tensor on a CPU with an element"
    return _extension.why_not_cpu() or ""


def native_or(kernel: Any, reference: Any) -> Any:
    """The kernel's answer or, where it returns None for a layout that it does not know, the reference's."""

    def run(x: Tensor, *rest: Any) -> Tensor:
        y: Tensor | None = kernel(x, *rest)
        return reference(x, *rest) if y is None else y

    return run


def _bind_quantize(x: Tensor, scale: float, zero_point: int) -> Choices | None:
    check_scale("quantize", "scale", scale, zero_point, "zero_point")
    if x.dtype not in KERNEL_DTYPES or why_not_native(x):
        return None
    args = Argument(0), scale, zero_point
    return _one_way("quantize", x, native_or(_quantize_native, _quantize), args)


def _bind_dequantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Choices | None:
    check_quantized("dequantize", "x", x)
    check_scale("dequantize", "scale", scale, zero_point, "zero_point")
    if dtype is not torch.float32 or why_not_native(x):
        return None

    def reference(x: Tensor, scale: float, zero_point: int) -> Tensor:
        return _dequantize(x, scale, zero_point, dtype)

    return _one_way("dequantize", x, native_or(_dequantize_native, reference), (Argument(0), scale, zero_point))


def _one_way(name: str, x: Tensor, function: Any, args: tuple[Any, ...]) -> Choices:
    key = f"{name} {'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
    return Choices(key, {NATIVE: lambda: Prepared(function, args)})


QUANTIZE = register(Operator("quantize", order={}, example=lambda probe: (probe, 1.0, 0)))
QUANTIZE.add(Backend(REFERENCE, why_not_reference, _quantize))
QUANTIZE.call, QUANTIZE.stock, QUANTIZE.bind = _quantize, stock_quantize, _bind_quantize
QUANTIZE.images = lambda *args: (0,)

DEQUANTIZE = register(Operator("dequantize", order={}))
DEQUANTIZE.add(Backend(REFERENCE, why_not_reference, _dequantize))
DEQUANTIZE.call, DEQUANTIZE.stock, DEQUANTIZE.bind = _dequantize, stock_dequantize, _bind_dequantize
DEQUANTIZE.images = lambda *args: (0,)
