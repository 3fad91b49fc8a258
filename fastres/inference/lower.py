"""Lowering: the steps of a Graph as plain calls, for inputs of one signature on one device.

The steps run once, one after another, each as its operator wants it on tensors like those (`Operator.bind`: packed
weights on a CPU); what each came to, a function and its arguments, is the plan.

A residual is written over where its memory is the network's own and nothing reads it later; which tensors share memory
is seen in that run. Out of place it is copied first: 0.8 to 1.2 ms of a ResNet-18 at batch 8.

oneDNN's ReLU turns NaN into 0. An input that is not finite is seen by its sum, but a square root of a negative number
in the middle of a network is not: steps behind an operator that makes NaN of finite numbers take calls that pass it on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastres._dispatch import Argument, Choices, operator_of
from fastres.graph.steps import Graph, Slot, Step, filled, slots_in

_UNKNOWN_SHAPE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_MAKE_NAN = {
    *("sqrt", "rsqrt", "log", "log2", "log10", "log1p", "logit", "reciprocal", "pow", "float_power", "xlogy"),
    *("asin", "acos", "acosh", "atanh", "erfinv", "lgamma", "digamma", "tan", "fmod", "remainder", "std", "var"),
    *("std_mean", "var_mean", "linalg_inv", "inverse", "linalg_solve", "logdet"),
}


class Call(NamedTuple):
    """One call of a plan: `function(*args)` with the values of slots in their places."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    slots: tuple[tuple[int, int], ...]  # (place among args, slot)
    writes: int
    frees: tuple[int, ...]


class Lowered(NamedTuple):
    """A Graph for one signature.

    Attributes:
        calls: one for each step.
        outputs: of the run that it was made in.
        ways: by the place of its step, the way taken where there was a choice.
        choices: those choices, alike ones once, with arguments to try the ways on; empty unless asked for.
    """

    calls: list[Call]
    outputs: list[Any]
    ways: dict[int, str]
    choices: dict[str, tuple[Choices, list[Any]]]


def lower(
    graph: Graph,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    wanted: Mapping[str, str],
    exact: bool = False,
    keep_choices: bool = False,
) -> Lowered:
    """Run `graph` on the inputs, and keep the calls that it came to. Call it without gradients.

    Args:
        constants: in the order of the graph's; the calls hold them.
        wanted: by the key of a choice, the way to take; where there is none, the default.
        exact: every call is to pass NaN as eager's do.
        keep_choices: keep what `tune` measures; holds the arguments of those steps.
    """
    values: list[Any] = [*inputs, *constants, *[None] * len(graph.steps)]
    memory = _Memory(graph, values)
    unsettled = _nan_reaches(graph)
    unknown: set[int] = set()  # slots whose shape does not follow from the signature
    found = Lowered([], [], {}, {})
    over: dict[int, tuple[int, Call]] = {}  # place of a call -> the slot to write over, the call that does
    for place, step in enumerate(graph.steps):
        arguments = filled(step.args, values)
        if unknown.intersection(step.reads) or _UNKNOWN_SHAPE.intersection(getattr(step.operator, "tags", ())):
            unknown.add(step.writes)
        fixed = exact or step.writes in unknown or step.writes in unsettled
        choices = None if fixed else _choices(step, arguments)
        if choices is None:
            call = _plain(step, graph, constants)
        else:
            if keep_choices and choices.key not in found.choices:
                found.choices[choices.key] = choices, list(arguments)
            way = wanted.get(choices.key)
            found.ways[place] = way = way if way in choices.ways else next(iter(choices.ways))
            prepared = choices.ways[way]()
            call = _flat(prepared.function, _spread(prepared.args, step), step, graph, constants)
            if prepared.instead is not None and prepared.overwrites is not None:
                writes_over = _spread(prepared.instead.args, step)
                target = step.args[prepared.overwrites].index
                over[place] = target, _flat(prepared.instead.function, writes_over, step, graph, constants)
        found.calls.append(call)
        run(call, values)
        memory.note(step, values)
        for slot in step.frees:
            values[slot] = None
    for place, (slot, call) in over.items():
        if memory.is_free(slot, place):
            found.calls[place] = call
    found.outputs.extend(filled(graph.outputs, values))
    return found


def run(call: Call, values: list[Any]) -> None:
    """One call, on the values of the slots."""
    args = list(call.args)
    for place, slot in call.slots:
        args[place] = values[slot]
    values[call.writes] = call.function(*args)


def _choices(step: Step, arguments: tuple[Any, ...]) -> Choices | None:
    operator = operator_of(step.operator)
    return None if operator is None or operator.bind is None else operator.bind(*arguments, **step.kwargs)


def _spread(args: tuple[Any, ...], step: Step) -> tuple[Any, ...]:
    """A prepared call's arguments with those of the step in them."""
    return tuple(step.args[a.place] if isinstance(a, Argument) else a for a in args)


def _plain(step: Step, graph: Graph, constants: Sequence[Tensor]) -> Call:
    """The step as its operator runs it on any tensors."""
    operator = operator_of(step.operator)
    function = step.operator if operator is None or operator.call is None else operator.call
    if any(slots_in(step.kwargs)) or any(list(slots_in(a)) and not isinstance(a, Slot) for a in step.args):
        slots = tuple(dict.fromkeys(step.reads))
        nested = functools.partial(_nested, function, step.args, step.kwargs, slots)
        return _flat(nested, tuple(map(Slot, slots)), step, graph, constants)
    if step.kwargs:
        function = functools.partial(function, **step.kwargs)
    return _flat(function, step.args, step, graph, constants)


def _nested(
    function: Callable[..., Any], args: Any, kwargs: dict[str, Any], slots: tuple[int, ...], *values: Any
) -> Any:
    """A call whose slots are inside lists or among named arguments."""
    known = dict(zip(slots, values, strict=True))
    return function(*filled(args, known), **filled(kwargs, known))


def _flat(function: Any, args: tuple[Any, ...], step: Step, graph: Graph, constants: Sequence[Tensor]) -> Call:
    """A call with the constants among its arguments in their places."""
    first, end = graph.first_constant, graph.first_result
    template, slots = list(args), []
    for place, value in enumerate(args):
        if isinstance(value, Slot):
            template[place] = constants[value.index - first] if first <= value.index < end else None
            if template[place] is None:
                slots.append((place, value.index))
    return Call(function, tuple(template), tuple(slots), step.writes, step.frees)


def _nan_reaches(graph: Graph) -> set[int]:
    """The slots that NaN can reach although the inputs are finite."""
    reached: set[int] = set()
    for step in graph.steps:
        if _makes_nan(step, graph) or reached.intersection(step.reads):
            reached.add(step.writes)
    return reached


def _makes_nan(step: Step, graph: Graph) -> bool:
    """Tell whether this operator may give NaN for finite numbers of usual size."""
    if not isinstance(step.operator, torch._ops.OpOverload):
        return False
    name = step.operator._schema.name.partition("::")[2]
    operand: Any = step.args[1] if len(step.args) > 1 else next(iter(step.kwargs.values()), None)
    if name == "pow":
        return not isinstance(operand, int | float) or operand < 0 or operand % 1 != 0
    if name in ("div", "true_divide", "floor_divide"):
        if isinstance(operand, Slot):
            return not graph.first_constant <= operand.index < graph.first_result
        return bool(operand == 0)
    return name in _MAKE_NAN


class _Memory:
    """A record of which slots share memory, as a run shows it, and of when each is read last."""

    def __init__(self, graph: Graph, values: Sequence[Any]) -> None:
        self.steps = graph.steps
        self.owners: list[frozenset[int]] = [frozenset({slot}) for slot in range(graph.size)]
        self.taken = set(range(graph.first_result))  # inputs and constants: not the network's to write to
        self.last: dict[int, float] = {slot.index: math.inf for slot in slots_in(graph.outputs)}
        for place, step in enumerate(graph.steps):
            for slot in step.reads:
                self.last[slot] = max(self.last.get(slot, 0), place)

    def note(self, step: Step, values: Sequence[Any]) -> None:
        """Note that the step's output shares the memory of those of its arguments that have its storage."""
        mine = _storages(values[step.writes])
        owners: set[int] = set()
        known: set[int] = set()
        for slot in step.reads:
            common = mine & _storages(values[slot])
            if common:
                owners |= self.owners[slot]
                known |= common
        if not mine or mine - known:
            owners.add(step.writes)
        self.owners[step.writes] = frozenset(owners)

    def is_free(self, slot: int, place: int) -> bool:
        """Tell whether the memory of `slot` is the network's own and only the step at `place` still reads it."""
        owners, step = self.owners[slot], self.steps[place]
        if owners & self.taken:
            return False
        alike = {s for s, of in enumerate(self.owners) if of & owners and s != step.writes}
        if any(self.last.get(s, 0) > place for s in alike):
            return False
        return [s for s in step.reads if s in alike] == [slot]


def _storages(value: Any) -> set[int]:
    """The storages of a tensor, or of those in a list."""
    leaves = (t for t in tree_leaves(value) if isinstance(t, Tensor) and t.layout is torch.strided)
    return {t.untyped_storage()._cdata for t in leaves}
