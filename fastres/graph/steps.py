"""Step and Graph: a network as a list of operator calls on slots, in the order in which they run.

    slots    the inputs, then the constants, then what the steps write, each written once
    step     an operator (`fastres::*`, ATen's or one of Python's), its arguments, the slot it writes, the slots that
             nothing reads after it

A Graph is plain data: it is what an executor runs, what a file holds as JSON, and what an exporter sees as stock
operators. Its constants have the names of the source's tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Slot:
    """The value in a slot, as an argument of a step."""

    index: int

    def __repr__(self) -> str:
        return f"%{self.index}"


@dataclass(frozen=True)
class Step:
    """One operator call. `args` and `kwargs` hold plain values, Slots, and lists and tuples of both."""

    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    writes: int
    frees: tuple[int, ...] = ()
    name: str = ""  # the module that it was, for reports

    @property
    def reads(self) -> list[int]:
        """The slots among its arguments, in their order."""
        return [slot.index for slot in slots_in((self.args, self.kwargs))]

    def __reduce__(self) -> Any:
        return _step, (operator_name(self.operator), self.args, self.kwargs, self.writes, self.frees, self.name)

    def __str__(self) -> str:
        parts = [repr(a) for a in self.args] + [f"{key}={value!r}" for key, value in self.kwargs.items()]
        freed = f"  frees {', '.join(f'%{i}' for i in self.frees)}" if self.frees else ""
        return f"%{self.writes} = {operator_name(self.operator)}({', '.join(parts)}){freed}"


@dataclass
class Graph:
    """A network.

    Attributes:
        inputs: how many; their slots are the first.
        constants: their names; their slots come next, in this order. Whoever runs the graph has the tensors.
        steps: in the order in which they run.
        outputs: Slots and plain values.
        made_of: of each constant, in a line: constants of two graphs of one source with equal lines are equal.
    """

    inputs: int
    constants: tuple[str, ...]
    steps: list[Step]
    outputs: tuple[Any, ...]
    made_of: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of slots."""
        return self.inputs + len(self.constants) + len(self.steps)

    @property
    def first_constant(self) -> int:
        """The slot of the first constant."""
        return self.inputs

    @property
    def first_result(self) -> int:
        """The first slot that a step writes."""
        return self.inputs + len(self.constants)

    def check(self) -> None:
        """Raise unless each slot is written once, before it is read, and read no more once it is freed.

        Raises:
            ValueError: the message names the step.
        """
        written = set(range(self.first_result))
        freed: set[int] = set()
        for step in self.steps:
            reads = set(step.reads)
            if not reads <= written or reads & freed:
                raise ValueError(f"{step} reads a slot that is not written, or freed")
            if step.writes in written or not step.writes < self.size:
                raise ValueError(f"{step} writes to a slot that is taken, or is none")
            written.add(step.writes)
            freed |= set(step.frees)
        if not {slot.index for slot in slots_in(self.outputs)} <= written - freed:
            raise ValueError("an output is not written, or freed")

    def __str__(self) -> str:
        names = [f"%{i + self.inputs} = {name}" for i, name in enumerate(self.constants)]
        outputs = f"return {', '.join(map(repr, self.outputs))}"
        return "\n".join([f"inputs: {self.inputs}", *names, *map(str, self.steps), outputs])

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        return self  # never written to


def of_fx(graph: fx.Graph, made_of: Mapping[str, str]) -> Graph:
    """The finished `graph` as steps.

    Args:
        graph: placeholders, `get_attr` nodes with the names of constants, calls of functional operators, an output of
            a flat tuple. `meta["name"]` of a node, where there is one, is its step's name.
        made_of: see `Graph`.
    """
    inputs = graph.find_nodes(op="placeholder")
    names = list(dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr")))
    places: dict[fx.Node, int] = {node: place for place, node in enumerate(inputs)}
    places |= {node: len(inputs) + names.index(str(node.target)) for node in graph.find_nodes(op="get_attr")}
    calls = [node for node in graph.nodes if node.op == "call_function"]
    first = len(inputs) + len(names)
    places |= {node: first + i for i, node in enumerate(calls)}

    def spelled(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Slot(places[value])
        if isinstance(value, tuple | list):
            return type_of(value)(spelled(v) for v in value)
        if isinstance(value, slice):
            return slice(spelled(value.start), spelled(value.stop), spelled(value.step))
        return {key: spelled(v) for key, v in value.items()} if isinstance(value, dict) else value

    (output,) = graph.find_nodes(op="output")
    steps = [
        Step(node.target, spelled(node.args), spelled(dict(node.kwargs)), places[node], (), node.meta.get("name", ""))
        for node in calls
    ]
    return freed(
        Graph(len(inputs), tuple(names), steps, spelled(output.args[0]), {n: made_of.get(n, "") for n in names})
    )


def freed(graph: Graph) -> Graph:
    """The graph with each step freeing the slots that it reads last, and its own where nobody reads it."""
    last: dict[int, int] = {}  # slot -> the step that reads it last
    for i, step in enumerate(graph.steps):
        last |= dict.fromkeys(step.reads, i)
    kept = {slot.index for slot in slots_in(graph.outputs)} | set(range(graph.first_constant, graph.first_result))
    for i, step in enumerate(graph.steps):
        frees = {slot for slot in step.reads if last[slot] == i}
        frees |= set() if step.writes in last else {step.writes}
        graph.steps[i] = replace(step, frees=tuple(sorted(frees - kept)))
    return graph


def type_of(value: tuple[Any, ...] | list[Any]) -> type:
    """tuple or list: fx has immutable ones of its own."""
    return list if isinstance(value, list) else tuple


def slots_in(value: Any) -> Iterator[Slot]:
    """Every Slot in an argument, nested as it may be."""
    if isinstance(value, Slot):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from slots_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from slots_in(item)
    elif isinstance(value, slice):
        yield from slots_in([value.start, value.stop, value.step])


def filled(value: Any, values: Sequence[Any] | Mapping[int, Any]) -> Any:
    """An argument with what is in `values` for its Slots."""
    if isinstance(value, Slot):
        return values[value.index]
    if isinstance(value, tuple | list):
        return type_of(value)([filled(item, values) for item in value])
    if isinstance(value, dict):
        return {key: filled(item, values) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(filled(value.start, values), filled(value.stop, values), filled(value.step, values))
    return value


def operator_name(operator: Any) -> str:
    """`aten.relu.default`, or `operator.getitem`: a name that `find_operator` finds again."""
    if isinstance(operator, torch._ops.OpOverload):
        return str(operator)
    return f"{operator.__module__.removeprefix('_')}.{operator.__name__}"


def find_operator(name: str) -> Callable[..., Any]:
    """The operator of a name, for a pickle; files have an allow-list (inference/file/operators.py)."""
    module, _, function = name.rpartition(".")
    if module in ("operator", "math", "torch"):
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)  # type: ignore[no-any-return]


def _step(name: str, *rest: Any) -> Step:
    return Step(find_operator(name), *rest)
