"""conv_act in frozen networks: oneDNN's convolution with its whole epilogue, on a weight packed for the input's shape.

A pack made for another batch size can be slower than none, so there are two ways: "packed", and "plain", on the weight
as it is, which oneDNN reorders in every call. Kernels of our own (_conv_native) are further ways: "winograd2" and
"winograd4" for 3x3 convolutions, "product" for 1x1, "direct" for the rest.
oneDNN's ReLU turns NaN into 0, and a Winograd tile spreads it: a network whose input is finite has none to lose, and
for the rest an executor runs conv_act, which passes NaN as eager does.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastres._dispatch import OUTPUT, Argument, Choices, Prepared
from fastres._stamp import version
from fastres.ops import _conv_native as native
from fastres.ops._conv_backends import OUT_OF_PLACE, Conv, Maybe, conv2d, is_wide, output_size, sound, why_not_onednn
from fastres.ops._tensors import is_channels_last, stats_dtype

UNARY: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "hardswish": ("hardswish", []),
    "silu": ("swish", []),
}
_BINARY: dict[str, str | None] = {"none": None, "relu": "relu"}
_onednn = torch.ops.mkldnn._convolution_pointwise
_X, _RESIDUAL = Argument(0), Argument(3)


def stock(x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe, scale: Maybe, *where: Any) -> Tensor:
    """The call by PyTorch's operators; nothing in place, as under vmap a batch may be of the residual alone."""
    *geometry, act = where[:5]  # a backend may follow
    z = conv2d(x, weight, None if scale is not None else bias, *geometry)  # [N, K, P, Q]
    if scale is not None:
        z = z.to(stats_dtype(x)) * scale[:, None, None]
        z = z if bias is None else z + bias[:, None, None]
    z = z if residual is None else z + residual
    return OUT_OF_PLACE[act](z).to(x.dtype)


def bind(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    residual: Maybe,
    scale: Maybe,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    act: str,
    backend: str = "auto",
) -> Choices | None:
    """oneDNN's ways to run the call on tensors alike; None where it refuses, or the layout is not its fast one."""
    if x.device.type != "cpu" or x.ndim != 4 or x.dtype != weight.dtype or scale is not None:
        return None
    n, c, h, w = x.shape
    k, per_group, r, s = weight.shape
    if c != per_group * groups or k == 1 or not _is_nhwc(x) or not is_channels_last(x):
        return None
    _, dilation, column = sound((h, w), (r, s), stride, padding, dilation)
    where = tuple(stride), tuple(padding), tuple(dilation)
    call = Conv(True, x.numel() == 0, (n, h, w), (k, per_group, r, s), *where, groups, act, residual is not None)
    if why_not_onednn(x, call):
        return None
    p, q = output_size((h, w), (r, s), *where)
    if residual is not None:
        # one pixel: the strides say nothing, and oneDNN fails on them
        if act not in _BINARY or p * q == 1 or residual.shape != (n, k, p, q):
            return None
        if residual.dtype != x.dtype or not _is_nhwc(residual):
            return None

    def on(kernel: Tensor) -> Prepared:
        rest = kernel, bias, padding, stride, dilation, groups
        if residual is None:
            name, scalars = UNARY[act]
            return Prepared(_onednn.default, (_X, *rest, name, scalars, ""))
        epilogue: tuple[Any, ...] = "add", None, _BINARY[act], [], None
        over = Prepared(torch.ops.mkldnn._convolution_pointwise_.binary, (_RESIDUAL, _X, *rest, *epilogue))
        return Prepared(_onednn.binary, (_X, _RESIDUAL, *rest, *epilogue), _RESIDUAL.place, over)

    def pack(kernel: Tensor) -> Tensor:
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        return reorder(kernel, padding, stride, dilation, groups, list(x.shape))  # type: ignore[no-any-return]

    doubtful = column or is_wide(x, weight, tuple(stride), tuple(dilation))
    if doubtful and not _is_right(x, weight, pack, (padding, stride, dilation, groups)):
        return None

    size = "x".join(map(str, x.shape))
    kernel = "x".join(map(str, weight.shape))
    geometry = " ".join(f"{name}{a}x{b}" for name, (a, b) in zip("spd", where, strict=True))
    after = act if residual is None else f"add {act}"
    dtype = str(x.dtype).removeprefix("torch.")
    key = f"conv_act {size} by {kernel} {geometry} g{groups} {after} {dtype}"
    ways: dict[str, Callable[[], Prepared]] = {
        "packed": lambda: on(shared_pack(weight, pack(weight.detach()))),
        "plain": lambda: on(weight.detach()),
    }

    def own(forward: Any, into: Any, at: tuple[Any, ...], tile: int) -> Prepared:
        added = None if residual is None else _RESIDUAL
        args = _X, kept(weight, tile), bias, added, None, k, *at, act
        to = Prepared(into, (*args, OUTPUT))
        if residual is None:
            return Prepared(forward, args, into=to)
        return Prepared(forward, args, _RESIDUAL.place, Prepared(into, (*args, _RESIDUAL)), to)

    asked = x, tuple(weight.shape), (stride, padding, dilation, groups), act
    first: tuple[str, ...] = ()
    if not native.why_not_1x1(*asked):
        ways[native.PRODUCT] = functools.partial(own, native.forward_1x1, native.into_1x1, tuple(stride), 1)
    elif not native.why_not(*asked):
        first = native.faster(n, c, k, p, q, x.dtype)
        for way, tile in native.TILES.items():
            ways[way] = functools.partial(own, native.forward, native.into, tuple(padding), tile)
    if (len(ways) == 2 or native.has_pairs(x.dtype)) and not native.why_not_direct(x, asked[2], act):
        at: tuple[list[int], list[int]] = [r, s, *stride, *padding, *dilation], []
        first = (native.DIRECT, *first) if native.has_pairs(x.dtype) else first
        ways[native.DIRECT] = functools.partial(own, native.direct, native.direct_into, at, 1)
    order = [*first, *(way for way in ways if way not in first)]
    holds = {"packed": weight.numel() * weight.itemsize} | native.bytes_held(weight)
    return Choices(key, {way: ways[way] for way in order}, native.TILES, holds)


def _is_right(x: Tensor, weight: Tensor, pack: Callable[[Tensor], Tensor], where: tuple[Any, ...]) -> bool:
    """Tell whether oneDNN computes a convolution like this one, packed and plain; see `_conv_backends.sound`."""
    given, kernel = (
        torch.arange(t.numel(), dtype=torch.float64).mul_(0.7).sin_().view(t.shape).to(t) for t in (x, weight)
    )
    given, kernel = (t.contiguous(memory_format=torch.channels_last) for t in (given, kernel))
    padding, stride, dilation, groups = where
    want = F.conv2d(given.double(), kernel.double(), None, stride, padding, dilation, groups)
    got = (_onednn.default(given, k, None, *where, "none", [], "") for k in (kernel, pack(kernel)))
    return all(float((y - want).norm()) < 0.05 * float(want.norm()) for y in got)


def _is_nhwc(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


_packs: Any = WeakIdKeyDictionary()  # weight -> its packs, weakly, each with the weight's version


def shared_pack(weight: Tensor, pack: Tensor) -> Tensor:
    """This pack or an equal one that is there already: those for two image sizes are equal as a rule."""
    kept = [(other, at) for other, at in _packs.get(weight, ()) if other() is not None and at == version(weight)]
    for other, _ in kept:
        found = other()
        if found is not None and torch.equal(_raw(found), _raw(pack)):
            return found  # type: ignore[no-any-return]
    _packs[weight] = [*kept, (weakref.ref(pack), version(weight))]
    return pack


_transformed: Any = WeakIdKeyDictionary()  # weight -> by tile, weakly, its transform and the weight's version


def kept(weight: Tensor, tile: int) -> Tensor:
    """The weight made ready for our own kernels, for Winograd's tiles or, 1, for products; image sizes share it."""
    reference, at = _transformed.get(weight, {}).get(tile, (lambda: None, None))
    found = reference()
    if found is None or at != version(weight):
        plain = weight.detach()
        found = native.pack_direct(plain) if tile == 1 else native.pack(plain, tile)
        _transformed[weight] = {**_transformed.get(weight, {}), tile: (weakref.ref(found), version(weight))}
    return found  # type: ignore[no-any-return]


def _raw(pack: Tensor) -> Tensor:
    """The bytes of a packed weight."""
    size = torch.ops.mkldnn._nbytes(pack)
    return torch.frombuffer((ctypes.c_ubyte * size).from_address(torch.ops.mkldnn.data_ptr(pack)), dtype=torch.uint8)
