"""The JSON document of a file, everything but the weights: graph, call, plan and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastres.graph.captured import Captured
from fastres.graph.questions import UnknownQuestion
from fastres.graph.steps import Graph, Slot, Step, freed, slots_in
from fastres.inference.file.likeness import likeness_from_json
from fastres.inference.file.operators import name_of, operator_for
from fastres.inference.file.trees import Parameters, Trees, signature_from_json, signature_to_json
from fastres.inference.file.values import DTYPES, MAX_DEPTH, FrozenFileError, Values, short
from fastres.inference.plan import Plan
from fastres.inference.report import FreezeReport

MAX_STEPS = 50_000
MAX_CALLS = 64


@dataclass
class Stored:
    """A network and how it is called.

    Attributes:
        calls: the steps and the call that they answer: the example's, then others that were captured.
        tensors: the constants of all, by name.
        signature: name, kind and default of the source's parameters.
        dtype: what it computes in.
        plan: how it runs.
        device: what it was planned on, and runs on.
        report: of the freeze.
        likeness: of its source, see likeness.py.
    """

    calls: list[tuple[Graph, Captured]]
    tensors: dict[str, Tensor]
    signature: Parameters
    dtype: torch.dtype
    plan: Plan
    device: torch.device
    report: FreezeReport
    likeness: dict[str, Any] = field(default_factory=lambda: {"attributes": {}})


def to_json(stored: Stored) -> dict[str, Any]:
    """The document. Raises FrozenFileError for what no file can hold; the message names the step or the tensor."""
    for name, t in stored.tensors.items():
        if t.layout is not torch.strided or t.is_quantized or t.dtype not in DTYPES.values() or t.is_meta:
            what = "meta" if t.is_meta else f"{t.layout} and {t.dtype}"
            raise FrozenFileError(f"{name} is {what}: a file holds dense tensors of {', '.join(DTYPES)}")
    encode = Values().encode
    own, *others = [_call_to_json(graph, captured) for graph, captured in stored.calls]
    return {
        **own,
        "others": others,
        "signature": signature_to_json(stored.signature),
        "dtype": encode(stored.dtype),
        "device": encode(stored.device),
        "plan": encode(asdict(stored.plan)),
        "report": encode(asdict(stored.report)),
        "likeness": encode(stored.likeness),
    }


def _call_to_json(graph: Graph, captured: Captured) -> dict[str, Any]:
    encode, steps = Values().encode, []
    for step in graph.steps:
        try:
            kwargs = {name: encode(value) for name, value in step.kwargs.items()}
            row = {"operator": name_of(step.operator), "args": [encode(a) for a in step.args], "kwargs": kwargs}
        except FrozenFileError as error:
            raise FrozenFileError(f"step {step.name or step}: {error}") from error
        steps.append({**row, "name": step.name})
    call: list[Any] = [Slot(i) for i in range(graph.inputs)]
    for place, value in captured.plain:
        call.insert(place, value)
    return {
        "constants": list(graph.constants),
        "steps": steps,
        "outputs": Trees().encode(tree_unflatten(graph.outputs, captured.outputs)),
        "call": Trees().encode(tree_unflatten(call, captured.tree)),
        "inputs": encode([(tuple(dims), dtype) for dims, dtype in captured.inputs]),
        "batch": captured.batch,
        "questions": encode(list(captured.questions)),
    }


def from_json(document: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device | None) -> Stored:
    """Return what ``to_json`` was given.

    Raises:
        FrozenFileError: a part of it is none, or of another type.
        Exception: whatever Python and torch raise for what passed the checks here.
    """

    def part(name: str, hint: Any) -> Any:
        return typed(hint, Values().decode(document[name]), name)

    saved = part("device", torch.device)
    device = _available(saved if device is None else device, asked=device is not None)
    moved = {saved: device, torch.device(saved.type): device}
    others = typed(list[dict[str, Any]], document["others"], "others")
    if len(others) > MAX_CALLS:
        raise FrozenFileError(f"it holds {len(others)} further captures, more than {MAX_CALLS}")
    calls = [_call_from_json(one, moved) for one in (document, *others)]
    names = {name for graph, _ in calls for name in graph.constants}
    if names != set(tensors) or any(name.count(".") > MAX_DEPTH for name in names):
        raise FrozenFileError("its tensors are not the constants of its graph")
    report = part("report", FreezeReport)
    str(report), report.to_dict()  # it can be shown
    return Stored(
        calls,
        {name: t.to(device) for name, t in tensors.items()},
        signature_from_json(document["signature"]),
        part("dtype", torch.dtype),
        part("plan", Plan),
        device,
        report,
        likeness_from_json(part("likeness", Any)),
    )


def _call_from_json(document: Mapping[str, Any], moved: Mapping[torch.device, torch.device]) -> tuple[Graph, Captured]:
    def part(name: str, hint: Any) -> Any:
        return typed(hint, Values().decode(document[name]), name)

    inputs = part("inputs", list[tuple[tuple[int | str, ...], torch.dtype]])
    call, tree = tree_flatten(Trees().decode(document["call"]))
    outputs, its_tree = tree_flatten(Trees().decode(document["outputs"]))
    if [leaf for leaf in call if type(leaf) is Slot] != [Slot(i) for i in range(len(inputs))]:
        raise FrozenFileError("its call does not take its inputs one after another")
    plain = tuple((place, leaf) for place, leaf in enumerate(call) if type(leaf) is not Slot)
    names = part("constants", list[str])
    steps = _steps(document["steps"], len(inputs) + len(names), moved)
    graph = freed(Graph(len(inputs), tuple(names), steps, tuple(outputs)))
    graph.check()
    read = {slot for step in steps for slot in step.reads} | {slot.index for slot in slots_in(graph.outputs)}
    if len(set(names)) < len(names):
        raise FrozenFileError("its tensors are not the constants of its graph: one has a name twice")
    if not set(range(graph.first_constant, graph.first_result)) <= read:
        raise FrozenFileError("it has constants that its graph does not use")
    captured = _captured(inputs, its_tree, tree, plain, part("batch", int), tuple(part("questions", list[str])))
    return graph, captured


def _captured(inputs: Any, outputs: Any, tree: Any, plain: Any, batch: int, questions: tuple[str, ...]) -> Captured:
    try:
        return Captured(fx.Graph(), inputs, outputs, tree, plain, {}, batch, [], questions)
    except UnknownQuestion as error:
        raise FrozenFileError(f"its network asks {short(str(error))}, which is no question of sizes") from error


def _steps(rows: Any, first: int, moved: Mapping[torch.device, torch.device]) -> list[Step]:
    """The steps, the first of which writes the slot `first`."""
    if not isinstance(rows, list) or len(rows) + first > MAX_STEPS:
        raise FrozenFileError(f"it has no list of at most {MAX_STEPS} inputs, constants and steps")
    decode, steps = Values(moved).decode, []
    for writes, row in enumerate(rows, first):
        try:
            args = tuple(typed(list[Any], row["args"], "args"))
            args = tuple(decode(value) for value in args)
            kwargs = {name: decode(value) for name, value in typed(dict[str, Any], row["kwargs"], "kwargs").items()}
            operator = operator_for(row["operator"], args, kwargs)
            steps.append(Step(operator, args, kwargs, writes, (), typed(str, row["name"], "name")))
        except FrozenFileError as error:
            raise FrozenFileError(f"step {short(row.get('name'))}: {error}") from error
    return steps


def typed(hint: Any, data: Any, what: str) -> Any:
    """Plain data as a value of this type: dataclasses of dicts, what containers hold too.

    Fields that this version lacks are left out, those that the data lack are defaults.

    Raises:
        FrozenFileError: it is of another type; the message says that with `what`.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(data, dict):
        hints = get_type_hints(hint)
        given = [f.name for f in fields(hint) if f.name in data]
        cls: Any = hint
        return cls(**{name: typed(hints[name], data[name], f"{what}.{name}") for name in given})
    if origin in (Union, UnionType):
        for option in inner:
            try:
                return typed(option, data, what)
            except FrozenFileError:
                continue
    elif origin is dict and type(data) is dict:
        return {typed(inner[0], key, what): typed(inner[1], value, what) for key, value in data.items()}
    elif origin is list and type(data) is list:
        return [typed(inner[0], value, what) for value in data]
    elif origin is tuple and type(data) is tuple and (inner[-1] is ... or len(inner) == len(data)):
        each = inner[:1] * len(data) if inner[-1] is ... else inner
        return tuple(typed(one, value, what) for one, value in zip(each, data, strict=True))
    elif hint is Any or type(data) is hint or (hint is float and type(data) is int):
        return data
    raise FrozenFileError(f"its {what}: {short(data)} is no {getattr(hint, '__name__', hint)}")


def _available(device: torch.device, asked: bool) -> torch.device:
    if device.type in ("cpu", "meta"):
        return device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        hint = "" if asked else "; device='cpu' loads it here"
        reason = (str(error).splitlines() or [""])[0]
        raise FrozenFileError(f"it is for {device}, which is not there{hint}: {reason}") from error
    return device
