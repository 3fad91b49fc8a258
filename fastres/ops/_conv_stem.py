"""stem: a convolution, its activation and the max-pool behind it, the start of a ResNet, in frozen networks.

    formula    y = max_pool2d(act(conv2d(x, weight) [+ bias]))

The convolution's output, four times as large as y, is never written: 3.2 MB for an image of 224x224, and as much to
read again. A fusion (graph/fusions/stem.py) writes it; outside a frozen network it is conv_act, then max_pool2d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres._dispatch import OPERATORS, OUTPUT, REFERENCE, Argument, Backend, Choices, Operator, Prepared, register
from fastres.ops import _conv_frozen, _conv_native
from fastres.ops._tensors import why_not_reference

_LIB = torch.library.Library("fastres", "FRAGMENT")
_LIB.define(
    "stem(Tensor x, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups, str act, SymInt[2] pool, SymInt[2] pool_stride, SymInt[2] pool_padding) -> Tensor"
)
FUSED = "fused"
Maybe = Tensor | None


def _pooled(convolve: Callable[..., Tensor], window: tuple[Any, ...], *arguments: Any) -> Tensor:
    """The convolution with its activation, then PyTorch's pool."""
    y: Tensor = F.max_pool2d(convolve(*arguments), *window)
    return y


def _apart(convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Maybe, *rest: Any) -> Tensor:
    return _pooled(convolve, rest[5:], x, weight, bias, None, None, *rest[:5])


def _forward(*arguments: Any) -> Tensor:
    return _apart(torch.ops.fastres.conv_act.default, *arguments)


def _bind(x: Tensor, weight: Tensor, bias: Maybe, *rest: Any) -> Choices | None:
    """The ways of the convolution with PyTorch's pool behind it, and the one that has both in one pass."""
    *where, act = rest[:5]
    window = tuple(tuple(part) for part in rest[5:])
    bind = OPERATORS["conv_act"].bind
    found = None if bind is None else bind(x, weight, bias, None, None, *where, act)
    if found is None:
        return None

    def behind(prepare: Callable[[], Prepared]) -> Prepared:
        prepared = prepare()
        return Prepared(functools.partial(_pooled, prepared.function, window), prepared.args)

    ways: dict[str, Callable[[], Prepared]]
    ways = {way: functools.partial(behind, prepare) for way, prepare in found.ways.items()}
    stride, padding, dilation, _ = where
    square = all(a == b for a, b in window)
    if square and not _conv_native.why_not_direct(x, tuple(where), act):

        def fused() -> Prepared:
            at = [*weight.shape[2:], *stride, *padding, *dilation], [part[0] for part in window]
            args = Argument(0), _conv_frozen.kept(weight, 1), bias, None, None, weight.shape[0], *at, act
            return Prepared(_conv_native.direct, args, into=Prepared(_conv_native.direct_into, (*args, OUTPUT)))

        ways = {FUSED: fused, **ways}
    key = f"stem {found.key} pool{'x'.join(str(part[0]) for part in window)}"
    return replace(found, key=key, ways=ways, holds=found.holds | {FUSED: found.holds[_conv_native.DIRECT]})


for _key in ("CPU", "CUDA"):
    _LIB.impl("stem", _forward, _key)
torch.library.register_fake("fastres::stem", _forward, lib=_LIB)

OPERATOR = register(Operator("stem", order={}))
OPERATOR.add(Backend(REFERENCE, why_not_reference, _forward))
OPERATOR.call, OPERATOR.bind = _forward, _bind
OPERATOR.stock = functools.partial(_apart, _conv_frozen.stock)
OPERATOR.images = lambda *args: (0,)
