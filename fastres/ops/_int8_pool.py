"""max_pool_int8 and mean_int8: pooling of quantized images, in frozen networks.

    formula    max_pool_int8   y = max_pool2d(x)                                      x's scale and zero point
               mean_int8       m = (sum x - H W zero_point) * scale / (H W)           over H and W, exact
                               y = m, or clamp(round(m / y_scale) + y_zero_point, 0, 255)

The largest of a window is the largest integer, whatever the scale; 0, the least of them, stands for what lies outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres._dispatch import REFERENCE, Argument, Backend, Choices, Operator, Prepared, register
from fastres.ops._int8_quantize import (
    NATIVE,
    check_quantized,
    check_scale,
    native_or,
    stock_dequantize,
    stock_quantize,
    why_not_native,
)
from fastres.ops._tensors import why_not_reference

_LIB = torch.library.Library("fastres", "FRAGMENT")
_LIB.define(
    "max_pool_int8(Tensor x, SymInt[2] kernel, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool ceil) "
    "-> Tensor"
)
_LIB.define("mean_int8(Tensor x, float scale, int zero_point, float? y_scale, int? y_zero_point) -> Tensor")
# None, having done nothing, unless x is channels_last
_LIB.define("_max_pool_int8_native(Tensor x, int[] window, int p, int q) -> Tensor?")
_LIB.define("_mean_int8_native(Tensor x, float scale, int zero_point, float y_scale, int y_zero_point) -> Tensor?")
_max_pool_native = torch.ops.fastres._max_pool_int8_native.default
_mean_native = torch.ops.fastres._mean_int8_native.default
Pair = Sequence[int]


def _max_pool(x: Tensor, *window: Any) -> Tensor:
    """PyTorch's pool of floats, which hold 0..255 exactly."""
    check_quantized("max_pool_int8", "x", x)
    y: Tensor = F.max_pool2d(x.float(), *window)
    return y.to(torch.uint8)


def _fake_max_pool(x: Tensor, *window: Any) -> Tensor:
    y: Tensor = F.max_pool2d(x.float(), *window)
    return y.to(torch.uint8)


def _mean(x: Tensor, scale: float, zero_point: int, y_scale: float | None, y_zero_point: int | None) -> Tensor:
    """The mean over H and W: [N, C, 1, 1], float32 or, with a scale for it, uint8."""
    check_quantized("mean_int8", "x", x)
    check_scale("mean_int8", "scale", scale, zero_point, "zero_point")
    pixels = x.shape[2] * x.shape[3]
    total = x.sum((2, 3), keepdim=True, dtype=torch.int64) - pixels * zero_point  # [N, C, 1, 1]
    if y_scale is None or y_zero_point is None:
        return (total.double() * (scale / pixels)).float()
    check_scale("mean_int8", "y_scale", y_scale, y_zero_point, "y_zero_point")
    q = torch.round(total.double() * (scale / pixels / y_scale)) + y_zero_point
    return q.clamp_(0, 255).to(torch.uint8)


def _fake_mean(x: Tensor, scale: float, zero_point: int, y_scale: float | None, y_zero_point: int | None) -> Tensor:
    return x.new_empty((*x.shape[:2], 1, 1), dtype=torch.float32 if y_scale is None else torch.uint8)


for _key in ("CPU", "CUDA"):
    _LIB.impl("max_pool_int8", _max_pool, _key)
    _LIB.impl("mean_int8", _mean, _key)
torch.library.register_fake("fastres::max_pool_int8", _fake_max_pool, lib=_LIB)
torch.library.register_fake("fastres::mean_int8", _fake_mean, lib=_LIB)


# ---- frozen networks -------------------------------------------------------------------------------------------------


def _stock_max_pool(x: Tensor, *window: Any) -> Tensor:
    """The pool of the numbers of a scale of 1: exporters know no pool of uint8."""
    return stock_quantize(F.max_pool2d(stock_dequantize(x, 1.0, 0), *window), 1.0, 0)


def _stock_mean(x: Tensor, scale: float, zero_point: int, y_scale: float | None, y_zero_point: int | None) -> Tensor:
    y = stock_dequantize(x, scale, zero_point).mean((2, 3), keepdim=True)
    return y if y_scale is None or y_zero_point is None else stock_quantize(y, y_scale, y_zero_point)


def _bind_max_pool(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil: bool) -> Choices | None:
    if x.dtype is not torch.uint8 or x.ndim != 4 or max(dilation) > 1 or why_not_native(x):
        return None
    p, q = _max_pool(x[:1, :1], kernel, stride, padding, dilation, ceil).shape[2:]
    where = [*kernel, *stride, *padding]

    def run(x: Tensor) -> Tensor:
        y: Tensor | None = _max_pool_native(x, where, p, q)
        return _max_pool(x, kernel, stride, padding, dilation, ceil) if y is None else y

    key = f"max_pool_int8 {'x'.join(map(str, x.shape))} {where} {ceil}"
    return Choices(key, {NATIVE: lambda: Prepared(run, (Argument(0),))})


def _bind_mean(x: Tensor, *scales: Any) -> Choices | None:
    if x.dtype is not torch.uint8 or x.ndim != 4 or why_not_native(x):
        return None
    _mean(x[:1, :1, :1, :1], *scales)  # its checks
    scale, zero_point, y_scale, y_zero_point = scales
    given = scale, zero_point, y_scale or 0.0, y_zero_point or 0
    run = native_or(lambda x, *_: _mean_native(x, *given), _mean)
    return Choices(f"mean_int8 {'x'.join(map(str, x.shape))}", {NATIVE: lambda: Prepared(run, (Argument(0), *scales))})


MAX_POOL = register(Operator("max_pool_int8", order={}))
MAX_POOL.add(Backend(REFERENCE, why_not_reference, _max_pool))
MAX_POOL.call, MAX_POOL.stock, MAX_POOL.bind = _max_pool, _stock_max_pool, _bind_max_pool
MAX_POOL.images = lambda *args: (0,)

MEAN = register(Operator("mean_int8", order={}))
MEAN.add(Backend(REFERENCE, why_not_reference, _mean))
MEAN.call, MEAN.stock, MEAN.bind = _mean, _stock_mean, _bind_mean
MEAN.images = lambda *args: (0,)
