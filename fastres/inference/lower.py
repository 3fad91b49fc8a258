"""Lowering: the steps of a Graph as plain calls, for inputs of one signature on one device.

The steps run once, one after another, each as its operator wants it on tensors like those (`Operator.bind`: packed
weights on a CPU); what each came to, a function and its arguments, is the plan.

What follows from the sizes of the inputs alone, such as a grid of positions, is computed in that run and kept: the plan
is of that signature.

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

from fastres._dispatch import OUTPUT, Argument, Choices, Prepared, operator_of
from fastres.graph.steps import Graph, Slot, Step, filled, slots_in
from fastres.inference.arena import Places, Wish
from fastres.inference.arena import place as place_all
from fastres.inference.plan import Plan

_UNKNOWN_SHAPE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_SIZES = {getattr(torch.ops.aten, name).int for name in ("sym_size", "sym_stride")} | {torch.ops.aten.sym_numel.default}
_NOWHERE = Places((), (), 0)
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
        calls: one for each step that depends on what is in the inputs.
        outputs: of the run that it was made in.
        ways: by the place of its step, the way taken where there was a choice.
        keys: by the place of its step, the key of that choice.
        held: tensors that the calls hold, beside the constants: packed weights, what follows from the sizes.
        places: of the outputs in planned memory; the calls find those tensors behind the graph's slots, in this order.
        choices: those choices, alike ones once, with arguments to try the ways on; empty unless asked for.
    """

    calls: list[Call]
    outputs: list[Any]
    ways: dict[int, str]
    keys: dict[int, str]
    held: list[Tensor]
    places: Places
    choices: dict[str, tuple[Choices, list[Any]]]


def lower(
    graph: Graph,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    plan: Plan,
    exact: bool = False,
    keep_choices: bool = False,
) -> Lowered:
    """Run `graph` on the inputs, and keep the calls that it came to. Call it without gradients.

    Args:
        constants: in the order of the graph's; the calls hold them.
        plan: the way to take, by the key of a choice; where there is none, the default.
        exact: every call is to pass NaN as eager's do.
        keep_choices: keep what `tune` measures; holds the arguments of those steps.
    """
    settled = _of_sizes(graph) - {slot.index for slot in slots_in(graph.outputs)}
    return _lower(graph, inputs, constants, plan, exact, keep_choices, settled)


def _lower(
    graph: Graph,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    plan: Plan,
    exact: bool,
    keep_choices: bool,
    of_sizes: set[int],
) -> Lowered:
    values: list[Any] = [*inputs, *constants, *[None] * len(graph.steps)]
    known: dict[int, Any] = dict(enumerate(constants, graph.first_constant))
    memory = _Memory(graph, values)
    unsettled = _nan_reaches(graph)
    room = (
        math.inf if plan.max_weights is None else plan.max_weights
    )  # the first layers, of the smallest weights, have it
    unknown: set[int] = set()  # slots whose shape does not follow from the signature
    found = Lowered([], [], {}, {}, [], _NOWHERE, {})
    over: dict[int, tuple[int, int, Call]] = {}  # place of a call -> its step, the slot to write over, that call
    into: dict[int, tuple[int, Prepared]] = {}  # place of a call -> its step, the call that writes to a given tensor
    for place, step in enumerate(graph.steps):
        arguments = filled(step.args, values)
        if unknown.intersection(step.reads) or _UNKNOWN_SHAPE.intersection(getattr(step.operator, "tags", ())):
            unknown.add(step.writes)
        fixed = exact or step.writes in unknown or step.writes in unsettled
        choices = None if fixed or step.writes in of_sizes else _choices(step, arguments)
        if choices is None:
            call = _plain(step, known)
        else:
            if keep_choices and choices.key not in found.choices:
                found.choices[choices.key] = choices, list(arguments)
            found.keys[place] = choices.key
            way, allowed = plan.choices.get(choices.key), choices.within(plan.winograd, room)
            found.ways[place] = way = way if way in allowed else allowed[0]
            room -= choices.holds.get(way, 0)
            prepared = choices.ways[way]()
            call = _flat(prepared.function, _spread(prepared.args, step), step, known)
            if prepared.instead is not None and prepared.overwrites is not None:
                writes_over = _flat(prepared.instead.function, _spread(prepared.instead.args, step), step, known)
                over[len(found.calls)] = place, step.args[prepared.overwrites].index, writes_over
            if prepared.into is not None:
                into[len(found.calls)] = place, prepared.into
        run(call, values)
        memory.note(step, values)
        if step.writes in of_sizes and step.writes not in unknown:
            known[step.writes] = values[step.writes]
            memory.taken.add(step.writes)
        else:
            found.calls.append(call)
        for slot in step.frees:
            values[slot] = None
    written: dict[int, int] = {}  # slot written over -> the slot of what is there then
    for at, (place, slot, call) in over.items():
        if memory.is_free(slot, place):
            found.calls[at] = call
            written[slot] = graph.steps[place].writes
            into.pop(at, None)
    found = found._replace(places=_place(graph, into, found.calls, memory, written, known))
    found.outputs.extend(filled(graph.outputs, values))
    kept = [value for slot, value in known.items() if slot >= graph.first_result]
    if _storages(kept) & _storages(found.outputs):  # which are the caller's to write to
        return _lower(graph, inputs, constants, plan, exact, keep_choices, set())
    own = _storages(list(constants))
    held = [t for call in found.calls for t in call.args if isinstance(t, Tensor) and not _storages(t) & own]
    found.held.extend({id(t): t for t in held}.values())
    return found


def _place(
    graph: Graph,
    into: Mapping[int, tuple[int, Prepared]],
    calls: list[Call],
    memory: _Memory,
    written: Mapping[int, int],
    known: Mapping[int, Any],
) -> Places:
    """Give outputs that nobody sees outside a place in planned memory; their calls are replaced."""
    wishes: list[Wish] = []
    for at, (place, prepared) in into.items():
        step = graph.steps[place]
        last = memory.last_use(step.writes, written)
        if math.isinf(last):
            continue
        size, stride, dtype = memory.seen[step.writes]
        output = Slot(graph.size + len(wishes))
        args = (output if a is OUTPUT else a for a in prepared.args)
        calls[at] = _flat(prepared.function, _spread(tuple(args), step), step, known)
        wishes.append(Wish(size, stride, dtype, place, max(place, int(last))))
    offsets, total = place_all(wishes)
    return Places(tuple(wishes), tuple(offsets), total)


def _of_sizes(graph: Graph) -> set[int]:
    """The slots whose values follow from the sizes of the inputs, and from constants."""
    found: set[int] = set()
    for step in graph.steps:
        tags = getattr(step.operator, "tags", ())
        asks = step.operator in _SIZES
        if asks or (found.union(range(graph.first_constant, graph.first_result)).issuperset(step.reads)):
            if torch.Tag.nondeterministic_seeded not in tags:
                found.add(step.writes)
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
    return tuple(step.args[a.place] if isinstance(a, Argument) and a is not OUTPUT else a for a in args)


def call_of(step: Step) -> Callable[..., Any]:
    """The function that runs a step on any tensors."""
    ours = operator_of(step.operator)
    return step.operator if ours is None or ours.call is None else ours.call


def _plain(step: Step, known: Mapping[int, Any]) -> Call:
    """The step as its operator runs it on any tensors."""
    function = call_of(step)
    args, kwargs = (_settled(given, known) for given in (step.args, step.kwargs))
    if any(slots_in(kwargs)) or any(list(slots_in(a)) and not isinstance(a, Slot) for a in args):
        slots = tuple(dict.fromkeys(slot.index for slot in slots_in((args, kwargs))))
        nested = functools.partial(_nested, function, args, kwargs, slots)
        return _flat(nested, tuple(map(Slot, slots)), step, known)
    if kwargs:
        function = functools.partial(function, **kwargs)
    return _flat(function, args, step, known)


def _settled(value: Any, known: Mapping[int, Any]) -> Any:
    """An argument with what is known of its slots in their places."""
    return filled(value, {slot.index: known.get(slot.index, slot) for slot in slots_in(value)})


def _nested(
    function: Callable[..., Any], args: Any, kwargs: dict[str, Any], slots: tuple[int, ...], *values: Any
) -> Any:
    """A call whose slots are inside lists or among named arguments."""
    found = dict(zip(slots, values, strict=True))
    return function(*filled(args, found), **filled(kwargs, found))


def _flat(function: Any, args: tuple[Any, ...], step: Step, known: Mapping[int, Any]) -> Call:
    """A call with what is known among its arguments in their places."""
    settled = [_settled(a, known) if isinstance(a, Slot) else a for a in args]
    slots = tuple((place, a.index) for place, a in enumerate(settled) if isinstance(a, Slot))
    return Call(function, tuple(None if isinstance(a, Slot) else a for a in settled), slots, step.writes, step.frees)


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
        self.seen: dict[int, tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = {}  # sizes, strides and dtypes
        self.last: dict[int, float] = {slot.index: math.inf for slot in slots_in(graph.outputs)}
        for place, step in enumerate(graph.steps):
            for slot in step.reads:
                self.last[slot] = max(self.last.get(slot, 0), place)

    def note(self, step: Step, values: Sequence[Any]) -> None:
        """Note that the step's output shares the memory of those of its arguments that have its storage."""
        mine = _storages(values[step.writes])
        if isinstance(values[step.writes], Tensor) and values[step.writes].layout is torch.strided:
            t = values[step.writes]
            self.seen[step.writes] = tuple(t.shape), t.stride(), t.dtype
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

    def last_use(self, slot: int, written: Mapping[int, int]) -> float:
        """The last step that reads the memory of `slot`, or what is written over it; inf: it is an output."""
        group, new = set(), {slot}
        while new:
            group |= new
            owners = frozenset().union(*(self.owners[s] for s in new))
            alike = {s for s, of in enumerate(self.owners) if of & owners}
            new = (alike | {written[s] for s in alike if s in written}) - group
        return max(self.last.get(s, 0) for s in group)


def _storages(value: Any) -> set[int]:
    """The storages of a tensor, or of those in a list."""
    leaves = (t for t in tree_leaves(value) if isinstance(t, Tensor) and t.layout is torch.strided)
    return {t.untyped_storage()._cdata for t in leaves}
