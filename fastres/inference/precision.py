"""The referee's say in how layers run: by Winograd's large tiles as long as the whole network passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres._dispatch import Argument, Prepared
from fastres.inference.frozen import FrozenModel
from fastres.inference.tune import tell_ways
from fastres.ops import _conv_native as native
from fastres.verify import Verification


def settle(frozen: FrozenModel, inputs: Any, judge: Callable[[], Verification | None]) -> Verification | None:
    """The verdict, once layers that run by Winograd's large tiles have gone back to smaller ones until it holds.

    The most erroneous half of those left goes at a time: from F(4x4) to F(2x2), which is as exact as a direct product,
    and at last to direct ones.
    """
    verdict = judge()
    found = frozen.prepared(inputs) if frozen.plan.winograd and frozen.report.winograd else None
    if found is None or verdict is None or verdict:
        return verdict
    executor, tensors, constants = found
    errors = {}
    for choices, arguments in executor.find_choices(tensors, constants):
        way = frozen.plan.choices.get(choices.key, choices.within(frozen.plan.winograd)[0])
        if choices.tiles.get(way) == 4:
            given = _random(arguments)
            y, direct = (_prepared_call(choices.ways[name](), given)() for name in (way, "packed"))
            errors[choices.key] = float((y - direct).double().norm() / direct.double().norm())
    left = sorted(errors, key=lambda key: -errors[key])
    moved = 0
    while left and verdict is not None and not verdict:
        half = -(-len(left) // 2)
        chosen = frozen.plan.choices | dict.fromkeys(left[:half], "winograd2") | dict.fromkeys(left[half:], "winograd4")
        left, moved = left[half:], moved + half
        frozen.plan.winograd = 4 if left else 2
        frozen.choose(chosen)
        verdict = judge()
    if verdict is not None and not verdict:
        frozen.plan.winograd = 0
        frozen.choose({key: way for key, way in frozen.plan.choices.items() if way not in native.TILES})
        verdict = judge()
    text = f"{moved} kinds of convolutions went from F(4x4, 3x3) to F(2x2, 3x3) until the referee took the network"
    frozen.report.notes.append(
        text if frozen.plan.winograd else "no Winograd: the referee did not take the network by it"
    )
    tell_ways(frozen, inputs)
    return verdict


def _random(arguments: list[Any]) -> list[Any]:
    images = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.ndim == 4]
    given = list(arguments)
    for i in images[:1] + images[2:]:  # the second one is the weight
        given[i] = torch.empty_like(given[i]).normal_()
    return given


def _prepared_call(prepared: Prepared, given: list[Any]) -> Callable[[], Any]:
    args = [given[a.place] if isinstance(a, Argument) else a for a in prepared.args]
    return lambda: prepared.function(*args)
