"""The referee's say in how layers run: by Winograd's large tiles as long as the whole network passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres._dispatch import Argument, Prepared
from fastres.inference.frozen import FrozenModel
from fastres.ops import _conv_native as native
from fastres.verify import Verification


def settle(frozen: FrozenModel, inputs: Any, judge: Callable[[], Verification | None]) -> Verification | None:
    """The verdict, once layers that run by Winograd's large tiles have gone back to smaller ones until it holds.

    The most erroneous half of those left goes at a time: from F(4x4) to F(2x2), which is as exact as a direct product,
    and at last to direct ones. Where there is no verdict, F(4x4) is not taken; sizes that were not measured take it
    where the example does. A network that is rejected with direct products too keeps its plan.
    """
    plan = frozen.plan
    if "4x4" not in frozen.report.winograd:
        plan.winograd = min(plan.winograd, 2)
    verdict = judge()
    if not frozen.report.winograd or verdict:
        return verdict
    large = _by_error(frozen, inputs)
    if verdict is None:
        _move(frozen, large, [])
        return None
    rejected, before = verdict, (plan.winograd, dict(plan.choices))
    left, moved = large, 0
    while left and not verdict:
        half = -(-len(left) // 2)
        _move(frozen, left[:half], left[half:])
        left, moved = left[half:], moved + half
        verdict = judge()
    names = _names(frozen, inputs, large[:moved])
    note = f"went from F(4x4, 3x3) to F(2x2, 3x3) until the referee took the network: {', '.join(names)}"
    if not verdict:
        plan.winograd, note = 0, "no Winograd: the referee did not take the network by it"
        frozen.choose({key: way for key, way in plan.choices.items() if way not in native.TILES})
        verdict = judge()
    if not verdict:
        plan.winograd, choices = before
        frozen.choose(choices)
        return rejected
    frozen.report.notes.append(note)
    return verdict


def _names(frozen: FrozenModel, inputs: Any, keys: list[str]) -> list[str]:
    """The names of the steps whose choice has one of these keys."""
    found = frozen.prepared(inputs)
    assert found is not None  # the keys are of its executor
    executor, tensors, constants = found
    of = executor.keys(tensors, constants)
    return [executor.graph.steps[place].name for place, key in of.items() if key in keys]


def _move(frozen: FrozenModel, back: list[str], left: list[str]) -> None:
    """Run the convolutions of these keys by F(2x2), and those that are left by F(4x4)."""
    frozen.plan.winograd = 4 if left else 2
    frozen.choose(frozen.plan.choices | dict.fromkeys(back, "winograd2") | dict.fromkeys(left, "winograd4"))


def _by_error(frozen: FrozenModel, inputs: Any) -> list[str]:
    """The keys of the convolutions that run by F(4x4), the most erroneous first: on random images, beside oneDNN's."""
    found = frozen.prepared(inputs)
    errors: dict[str, float] = {}
    if found is None:
        return []
    executor, tensors, constants = found
    for choices, arguments in executor.find_choices(tensors, constants):
        way = frozen.plan.choices.get(choices.key, choices.within(frozen.plan.winograd)[0])
        if choices.tiles.get(way) == 4:
            given = _random(arguments)
            y, direct = (_prepared_call(choices.ways[name](), given)() for name in (way, "packed"))
            errors[choices.key] = float((y - direct).double().norm() / direct.double().norm())
    return sorted(errors, key=lambda key: -errors[key])


def _random(arguments: list[Any]) -> list[Any]:
    images = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.ndim == 4]
    given = list(arguments)
    for i in images[:1] + images[2:]:  # the second one is the weight
        given[i] = torch.empty_like(given[i]).normal_()
    return given


def _prepared_call(prepared: Prepared, given: list[Any]) -> Callable[[], Any]:
    args = [given[a.place] if isinstance(a, Argument) else a for a in prepared.args]
    return lambda: prepared.function(*args)
