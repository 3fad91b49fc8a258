"""conv_int8: a convolution of 8-bit integers with its bias, residual sum and activation, in frozen networks.

    formula    acc = conv2d(x - x_zero, weight)                  integers, exact; the padding is x_zero, which is 0
               z = acc * x_scale * weight_scale + bias           weight_scale: one number per output channel
                   [+ (residual - residual_zero) * residual_scale]
               a = act(z)
               y = clamp(round(a / y_scale) + y_zero, 0, 255), or a in float32 where there is no y_scale

x, residual and y are uint8, the weight is int8: [K, C / groups, R, S]. The reference computes acc and z in float64,
which holds every such sum exactly. oneDNN's kernels (`qconv2d_pointwise`) compute z in float32 and may round a tie to
the other side.

Without VNNI instructions oneDNN adds two products in 16 bits, which saturate from 32768 on: 255 * 127 * 2 do. There a
weight must lie within -64..64, so that the sum of two products fits; `weight_limit` says so to whoever quantizes, and a
network that was quantized elsewhere runs through the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastres._dispatch import REFERENCE, Argument, Backend, Choices, Operator, Prepared, register
from fastres.ops._conv_backends import OUT_OF_PLACE, conv2d, output_size, sound
from fastres.ops._conv_frozen import UNARY, shared_pack
from fastres.ops._int8_quantize import (
    check_quantized,
    check_scale,
    rounded,
    stock_dequantize,
    stock_quantize,
    stock_weight,
)
from fastres.ops._tensors import why_not_reference

Pair = Sequence[int]
Maybe = Tensor | None
ONEDNN = "onednn"
_CL = torch.channels_last

_LIB = torch.library.Library("fastres", "FRAGMENT")
_LIB.define(
    "conv_int8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? residual, float x_scale, "
    "int x_zero, float residual_scale, int residual_zero, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups, str act, float? y_scale, int? y_zero) -> Tensor"
)


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Maybe, residual: Maybe, rest: tuple[Any, ...]) -> Any:
    """The output's shape, or a typed error that names the argument."""
    x_scale, x_zero, r_scale, r_zero, stride, padding, dilation, groups, act, y_scale, y_zero = rest
    check_quantized("conv_int8", "x", x)
    if weight.dtype is not torch.int8 or weight.ndim != 4:
        raise TypeError(
            f"conv_int8: weight: got {weight.dtype} {list(weight.shape)}, expected int8 [K, C / groups, R, S]"
        )
    if x.ndim != 4 or groups < 1 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        want = f"[N, {weight.shape[1] * groups}, H, W]"
        raise ValueError(f"conv_int8: x: got shape {list(x.shape)}, expected {want} for {groups} groups")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or any(value < least for value in values):
            raise ValueError(f"conv_int8: {name}: got {tuple(values)}, expected two numbers of at least {least}")
    k = weight.shape[0]
    for name, t in (("weight_scale", weight_scale), ("bias", bias)):
        if t is not None and (t.shape != (k,) or t.dtype is not torch.float32):
            raise ValueError(f"conv_int8: {name}: got {t.dtype} {list(t.shape)}, expected torch.float32 [{k}]")
    p, q = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if p < 1 or q < 1:
        raise ValueError(f"conv_int8: x: got images of {x.shape[2]}x{x.shape[3]}, too small for the kernel")
    shape = x.shape[0], k, p, q
    check_scale("conv_int8", "x_scale", x_scale, x_zero, "x_zero")
    if y_scale is not None:
        check_scale("conv_int8", "y_scale", y_scale, -1 if y_zero is None else y_zero, "y_zero")
    if residual is not None:
        check_quantized("conv_int8", "residual", residual)
        check_scale("conv_int8", "residual_scale", r_scale, r_zero, "residual_zero")
        if tuple(residual.shape) != shape:
            raise ValueError(f"conv_int8: residual: got shape {list(residual.shape)}, expected {list(shape)}")
    if act not in OUT_OF_PLACE:
        raise ValueError(f"conv_int8: act: got {act!r}, expected one of {tuple(OUT_OF_PLACE)}")
    return shape


def _reference(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Maybe, residual: Maybe, *rest: Any) -> Tensor:
    _check(x, weight, weight_scale, bias, residual, rest)
    x_scale, x_zero, r_scale, r_zero, *where, act, y_scale, y_zero = rest
    z = conv2d(x.double() - x_zero, weight.double(), None, *where)  # [N, K, P, Q], exact
    z = z * (x_scale * weight_scale.double())[:, None, None]
    z = z if bias is None else z + bias.double()[:, None, None]
    z = z if residual is None else z + (residual.double() - r_zero) * r_scale
    a = OUT_OF_PLACE[act](z)
    a = a.float() if y_scale is None else rounded(a, y_scale, y_zero)
    return a.contiguous(memory_format=_CL)


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Maybe, residual: Maybe, *rest: Any) -> Tensor:
    p, q = output_size(x.shape[2:], weight.shape[2:], *rest[4:7])
    dtype = torch.float32 if rest[-2] is None else torch.uint8
    return x.new_empty((x.shape[0], weight.shape[0], p, q), dtype=dtype).contiguous(memory_format=_CL)


for _key in ("CPU", "CUDA"):
    _LIB.impl("conv_int8", _reference, _key)
torch.library.register_fake("fastres::conv_int8", _fake, lib=_LIB)


def stock(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Maybe, residual: Maybe, *rest: Any) -> Tensor:
    """The convolution of the numbers that the integers stand for, between PyTorch's quantizing operators."""
    x_scale, x_zero, r_scale, r_zero, *where, act, y_scale, y_zero = rest
    z = conv2d(stock_dequantize(x, x_scale, x_zero), stock_weight(weight, weight_scale), bias, *where)
    z = z if residual is None else z + stock_dequantize(residual, r_scale, r_zero)
    a = OUT_OF_PLACE[act](z)
    return a if y_scale is None else stock_quantize(a, y_scale, y_zero)


# ---- oneDNN ----------------------------------------------------------------------------------------------------------

_onednn: Any = torch.ops.onednn


def has_onednn() -> bool:
    """Tell whether this torch has oneDNN's int8 convolutions."""
    return torch.backends.mkldnn.is_available() and hasattr(_onednn, "qconv2d_pointwise")


@cache
def weight_limit() -> int:
    """The largest weight that oneDNN multiplies right on this CPU: 127, or 64 where sums of two products saturate."""
    if not has_onednn():
        return 127  # the reference's products are exact
    x = torch.full((1, 64, 4, 4), 255, dtype=torch.uint8).contiguous(memory_format=_CL)
    weight = torch.full((64, 64, 1, 1), 127, dtype=torch.int8)
    one, where = torch.ones(64), ([1, 1], [0, 0], [1, 1], 1)
    y = _convolve(x, weight, one, None, None, 1.0, 0, 1.0, 0, *where, "none", None, None)
    return 127 if bool((y == 64.0 * 255 * 127).all()) else 64


def _pack(weight: Tensor, scale: Tensor, x_scale: float, x_zero: int, where: Any, shape: Sequence[int]) -> Tensor:
    stride, padding, dilation, groups = where
    plain = weight.detach().contiguous()
    lists = list(stride), list(padding), list(dilation)
    return _onednn.qconv_prepack(plain, scale, x_scale, x_zero, *lists, groups, list(shape))  # type: ignore[no-any-return]


@cache
def _no_zero_points(channels: int) -> Tensor:
    return torch.zeros(channels, dtype=torch.int64)


def _calls(
    pack: Tensor, weight_scale: Tensor, bias: Maybe, residual: bool, rest: tuple[Any, ...]
) -> tuple[Any, tuple[Any, ...]]:
    """oneDNN's function and its arguments, x and the residual as `Argument`s."""
    x_scale, x_zero, r_scale, r_zero, stride, padding, dilation, groups, act, y_scale, y_zero = rest
    name, scalars = UNARY[act]
    if y_scale is not None and y_zero == 0 and act == "relu":
        name = "none"  # what is below 0 saturates at 0
    dtype = torch.float32 if y_scale is None else torch.uint8
    head = Argument(0), x_scale, x_zero, pack, weight_scale, _no_zero_points(len(weight_scale))
    where = list(stride), list(padding), list(dilation), groups
    out = 1.0 if y_scale is None else y_scale, y_zero or 0, dtype
    if not residual:
        return _onednn.qconv2d_pointwise.default, (*head, bias, *where, *out, name, scalars, "")
    after = r_scale, r_zero, "sum", 1.0, name, scalars, ""
    return _onednn.qconv2d_pointwise.binary, (*head, Argument(4), bias, *where, *out, *after)


def _convolve(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Maybe, residual: Maybe, *rest: Any) -> Tensor:
    """One call of oneDNN on a weight packed for it; writes over the residual."""
    pack = _pack(weight, weight_scale, rest[0], rest[1], rest[4:8], x.shape)
    function, args = _calls(pack, weight_scale, bias, residual is not None, rest)
    given = {0: x, 4: residual}
    return function(*(given[a.place] if isinstance(a, Argument) else a for a in args))  # type: ignore[no-any-return]


@cache
def _is_right(
    channels: int, weight: tuple[int, ...], where: tuple[Any, ...], zeros: tuple[int, int], residual: bool, act: str
) -> bool:
    """Tell whether oneDNN computes a convolution like this one as the reference does, up to the side of a tie.

    On an image of a few windows, with every border. Kernels for few channels, groups and dilations have been wrong at
    the last columns in other releases; none is in oneDNN 3.10, with AMX, VNNI or AVX2-VNNI.
    """
    stride, padding, dilation, groups = where
    least = [(k - 1) * d + 1 for k, d in zip(weight[2:], dilation, strict=True)]
    h, w = least[0] + stride[0], least[1] + 3 * stride[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, channels, h, w), generator=generator, dtype=torch.uint8).contiguous(memory_format=_CL)
    limit = weight_limit()
    kernel = torch.randint(-limit, limit + 1, weight, generator=generator, dtype=torch.int32).to(torch.int8)
    scale = torch.rand(weight[0], generator=generator) + 0.5
    p, q = output_size((h, w), weight[2:], stride, padding, dilation)
    other = None
    if residual:
        other = torch.randint(0, 256, (2, weight[0], p, q), generator=generator, dtype=torch.uint8)
        other = other.contiguous(memory_format=_CL)
    spread = 100.0 * limit * (weight[1] * weight[2] * weight[3]) ** 0.5 / 60
    rest = 1.0, zeros[0], spread, 7, *where, act, spread, zeros[1]
    want = _reference(x, kernel, scale, None, other, *rest)
    got = _convolve(x, kernel, scale, None, None if other is None else other.clone(memory_format=_CL), *rest)
    off = (got.int() - want.int()).abs()
    return bool((off <= 1).all()) and float((off > 0).double().mean()) < 0.01


def why_not(x: Tensor, weight: Tensor, residual: Maybe, rest: tuple[Any, ...]) -> str:
    """Say why oneDNN does not run the call; empty where it does."""
    _, x_zero, _, _, *where, act, y_scale, y_zero = rest
    if x.device.type != "cpu" or not has_onednn() or not torch.backends.mkldnn.enabled:
        return "no oneDNN"
    if not x.numel() or (residual is not None and (y_scale is None or act not in ("none", "relu"))):
        return "an epilogue that it does not have"
    limit = weight_limit()
    if limit < 127 and int(weight.int().abs().max()) > limit:
        return "weights of 8 bits saturate on this CPU"
    spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], where[2], strict=True)]
    if x_zero and any(pad >= span for pad, span in zip(where[1], spans, strict=True)):
        return "windows of padding alone, which it computes wrong with a zero point"  # oneDNN 3.10
    if sound(tuple(x.shape[2:]), tuple(weight.shape[2:]), *where[:3])[2]:
        return "one column of outputs with a stride, which it computes wrong"
    groups = where[3]
    unusual = groups > 1 or max(where[2]) > 1 or weight.shape[1] < 16 or weight.shape[0] < 16
    frozen = tuple(map(tuple, where[:3])), groups
    zeros = x_zero, y_zero or 0
    if unusual and not _is_right(
        x.shape[1], tuple(weight.shape), (*frozen[0], groups), zeros, residual is not None, act
    ):
        return "oneDNN computes it wrong"
    return ""


def bind(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Maybe, residual: Maybe, *rest: Any) -> Choices | None:
    """oneDNN's way to run the call on tensors alike; None where it refuses."""
    _check(x, weight, weight_scale, bias, residual, rest)
    if why_not(x, weight, residual, rest):
        return None
    return Choices(
        f"conv_int8 {described(x, weight, rest)}{'' if residual is None else ' add'}",
        {ONEDNN: lambda: prepared(x, weight, weight_scale, bias, residual, rest)},
    )  # it holds a pack as large as the weight, always: there is no other way


def described(x: Tensor, weight: Tensor, rest: tuple[Any, ...]) -> str:
    """A line that is equal for calls alike."""
    *where, act = rest[4:9]
    shapes = f"{'x'.join(map(str, x.shape))} by {'x'.join(map(str, weight.shape))}"
    geometry = " ".join(f"{name}{a}x{b}" for name, (a, b) in zip("spd", where[:3], strict=True))
    return f"{shapes} {geometry} g{where[3]} {act} {'float32' if rest[-2] is None else 'uint8'}"


def prepared(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Maybe, residual: Maybe, rest: tuple[Any, ...]
) -> Prepared:
    """oneDNN's call on a weight packed for x.

    Without padding a zero point of x goes into the bias: oneDNN takes up to a third longer with one. Images of one
    pixel become one image, with the batch for its width: oneDNN multiplies each image by itself.
    """
    x_zero, padding = rest[1], rest[5]
    if x_zero and not any(padding):
        shift = x_zero * rest[0] * weight_scale.double() * weight.flatten(1).sum(1, dtype=torch.int64)  # [K]
        bias = ((0.0 if bias is None else bias.double()) - shift).float()
        rest = (rest[0], 0, *rest[2:])
    row = residual is None and tuple(x.shape[2:]) == (1, 1) and tuple(weight.shape[2:]) == (1, 1) and not any(padding)
    shape = (1, x.shape[1], 1, x.shape[0]) if row else x.shape
    pack = shared_pack(weight, _pack(weight, weight_scale, rest[0], rest[1], rest[4:8], shape))
    function, args = _calls(pack, weight_scale, bias, residual is not None, rest)
    into_layout = not x.is_contiguous(memory_format=_CL)
    if row:
        return Prepared(_on_a_row(function), args)
    if residual is None:
        return Prepared(_on_channels_last(function) if into_layout else function, args)
    place = next(i for i, a in enumerate(args) if isinstance(a, Argument) and a.place == 4)
    over = None
    if not into_layout and residual.is_contiguous(memory_format=_CL):
        over = Prepared(function, args)
    return Prepared(_on_a_copy(function, place), args, None if over is None else 4, over)


def _on_channels_last(function: Any) -> Any:
    def run(x: Tensor, *args: Any) -> Tensor:
        return function(x.contiguous(memory_format=_CL), *args)  # type: ignore[no-any-return]

    return run


def _on_a_row(function: Any) -> Any:
    def run(x: Tensor, *args: Any) -> Tensor:
        n, c = x.shape[:2]
        row = x.reshape(1, 1, n, c).permute(0, 3, 1, 2)  # [1, C, 1, N]
        y = function(row, *args)  # [1, K, 1, N]
        return y.permute(0, 2, 3, 1).reshape(n, -1, 1, 1)  # type: ignore[no-any-return]

    return run


def _on_a_copy(function: Any, place: int) -> Any:
    """The function that writes its answer over the residual, on a copy of it."""

    def run(x: Tensor, *args: Any) -> Tensor:
        given = list(args)
        given[place - 1] = args[place - 1].clone(memory_format=_CL)
        return function(x.contiguous(memory_format=_CL), *given)  # type: ignore[no-any-return]

    return run


OPERATOR = register(Operator("conv_int8", order={}))
OPERATOR.add(Backend(REFERENCE, why_not_reference, _reference))
OPERATOR.call, OPERATOR.stock, OPERATOR.bind = _reference, stock, bind
OPERATOR.images = lambda *args: (0, 4)
