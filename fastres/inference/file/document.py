"""What a file says of a network beside its weights, as one JSON document: graph, call, plan and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, fx

from fastres.graph.captured import Captured
from fastres.graph.rows import FreezeRow
from fastres.graph.steps import Graph, Step, freed, slots_in
from fastres.inference.file.likeness import likeness_from_json
from fastres.inference.file.operators import target_from_json, target_to_json
from fastres.inference.file.trees import (
    Parameters,
    signature_from_json,
    signature_to_json,
    spec_from_json,
    spec_to_json,
)
from fastres.inference.file.values import DTYPES, Decoder, FrozenFileError, encode, short
from fastres.inference.plan import Plan
from fastres.inference.report import FreezeReport
from fastres.verify.verdict import Row, Verification

MAX_STEPS = 50_000


@dataclass
class Stored:
    """What a file holds: a network and how it is called.

    Attributes:
        graph: the network's steps.
        tensors: its constants, by name.
        captured: the call that it answers.
        signature: name, kind and default of the source's parameters.
        dtype: what it computes in.
        plan: how it runs.
        device: what it was planned on, and runs on.
        report: of the freeze.
        likeness: of its source, see likeness.py; nothing in files without one.
    """

    graph: Graph
    tensors: dict[str, Tensor]
    captured: Captured
    signature: Parameters
    dtype: torch.dtype
    plan: Plan
    device: torch.device
    report: FreezeReport
    likeness: dict[str, Any] = field(default_factory=dict)


def to_json(stored: Stored) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document, and the tensors that go with it by name. Raises FrozenFileError for what no file can hold."""
    for name, t in stored.tensors.items():
        if t.layout is not torch.strided or t.is_quantized or t.dtype not in DTYPES.values():
            raise FrozenFileError(f"{name} is {t.layout} and {t.dtype}: a file holds dense ones of {', '.join(DTYPES)}")
        if t.is_meta:
            raise FrozenFileError(f"{name} is on meta and has no values")
    report = _data(stored.report)
    report["rows"] = [_data(row) for row in stored.report.rows]
    verdict = stored.report.verification
    if verdict is not None:  # one that failed is false
        report["verification"] = {**_data(verdict), "rows": [_data(row) for row in verdict.rows]}
    document = {
        "graph": graph_to_json(stored.graph),
        "signature": signature_to_json(stored.signature),
        "tree": spec_to_json(stored.captured.tree),
        "plain": encode(stored.captured.plain),
        "inputs": encode([(tuple(dims), dtype) for dims, dtype in stored.captured.inputs]),
        "outputs": spec_to_json(stored.captured.outputs),
        "batch": stored.captured.batch,
        "dtype": encode(stored.dtype),
        "plan": encode(_data(stored.plan)),
        "device": encode(stored.device),
        "report": encode(report),
        **stored.likeness,
    }
    return document, stored.tensors


def _data(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in fields(instance)}


def from_json(document: Any, tensors: Mapping[str, Tensor], device: torch.device | None) -> Stored:
    """What ``to_json`` was given. Raises FrozenFileError, whatever is wrong with the document."""
    try:
        return _rebuilt(document, tensors, device)
    except FrozenFileError:
        raise
    except KeyError as error:
        raise FrozenFileError(f"its JSON has no {error}") from error
    except Exception as error:  # torch's own refusals of what passed the checks here
        reason = " ".join(str(error).split())[:200]
        raise FrozenFileError(f"its network cannot be built: {type(error).__name__}: {reason}") from error


def _rebuilt(document: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device | None) -> Stored:
    value = Decoder()
    saved = value(document["device"])
    if type(saved) is not torch.device:
        raise FrozenFileError("it names no device")
    device = _available(saved if device is None else device, asked=device is not None)
    graph = graph_from_json(document["graph"], {saved: device, torch.device(saved.type): device})
    if set(graph.constants) != set(tensors):
        raise FrozenFileError("its tensors are not the constants of its graph")
    held = {name: tensors[name].to(device) for name in graph.constants}
    inputs, plain, tree = value(document["inputs"]), value(document["plain"]), spec_from_json(document["tree"])
    outputs, batch = spec_from_json(document["outputs"]), document["batch"]
    dtype, plan = value(document["dtype"]), _made(Plan, value(document["plan"]))
    count = graph.inputs
    if not isinstance(inputs, list) or len(inputs) != count or not all(map(_is_input, inputs)):
        raise FrozenFileError("its inputs are not those of its graph")
    if not isinstance(plain, tuple) or not all(type(p) is tuple and len(p) == 2 and type(p[0]) is int for p in plain):
        raise FrozenFileError("its arguments that are no tensors are no list")
    if tree.num_leaves != count + len(plain) or outputs.num_leaves != len(graph.outputs):
        raise FrozenFileError("the trees of its inputs and outputs do not have as many leaves as its graph")
    parts = plan.images_at_a_time
    if tree.type is not tuple or [child.type for child in tree._children] != [tuple, dict]:
        raise FrozenFileError("its arguments are not positional and named ones")
    if type(batch) is not int or (parts is not None and parts < 1):
        raise FrozenFileError(f"{short(batch)}, {short(parts)} are no numbers of images")
    if type(dtype) is not torch.dtype or not dtype.is_floating_point:
        raise FrozenFileError(f"{short(dtype)} is no dtype to compute in")
    signature, report = signature_from_json(document["signature"]), _report(value(document["report"]))
    likeness = likeness_from_json(value(document["likeness"])) if "likeness" in document else {}
    captured = Captured(fx.Graph(), inputs, outputs, tree, plain, {}, batch)
    return Stored(graph, held, captured, signature, dtype, plan, device, report, likeness)


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """The steps in their order; what a step writes and frees follows from its place.

    Raises:
        FrozenFileError: the graph holds something that no file can; the message names the step.
    """
    steps = []
    for step in graph.steps:
        try:
            row = {
                "operator": target_to_json(step.operator),
                "args": [encode(a) for a in step.args],
                "kwargs": {name: encode(value) for name, value in step.kwargs.items()},
                "name": step.name,
            }
        except FrozenFileError as error:
            raise FrozenFileError(f"step {step.name or step}: {error}") from error
        steps.append(row)
    outputs = [encode(value) for value in graph.outputs]
    return {"inputs": graph.inputs, "constants": list(graph.constants), "steps": steps, "outputs": outputs}


def graph_from_json(data: Any, moved: Mapping[torch.device, torch.device]) -> Graph:
    """The steps. Raises FrozenFileError for anything that ``graph_to_json`` does not write."""
    if not isinstance(data, dict):
        raise FrozenFileError("its JSON describes no graph")
    inputs, names, rows = data.get("inputs"), data.get("constants"), data.get("steps")
    if type(inputs) is not int or not 0 <= inputs <= MAX_STEPS or not isinstance(names, list):
        raise FrozenFileError("its graph has no number of inputs, or no list of constants")
    if not all(isinstance(name, str) and 0 < len(name) < 1000 for name in names) or len(set(names)) < len(names):
        raise FrozenFileError("its graph has constants that are no names, or one twice")
    if not isinstance(rows, list) or len(rows) + len(names) > MAX_STEPS or not isinstance(data.get("outputs"), list):
        raise FrozenFileError("its graph has no list of steps, or none of outputs")
    first = inputs + len(names)
    steps = []
    for i, row in enumerate(rows):
        decode = Decoder(first + i, moved)
        if not isinstance(row, dict) or set(row) != {"operator", "args", "kwargs", "name"}:
            raise FrozenFileError(f"{short(row)} is no step")
        if not isinstance(row["args"], list) or not isinstance(row["kwargs"], dict) or type(row["name"]) is not str:
            raise FrozenFileError(f"{short(row)}: its arguments are no list and no object")
        args = tuple(decode(a) for a in row["args"])
        kwargs = {name: decode(value) for name, value in row["kwargs"].items()}
        operator = target_from_json(row["operator"], args, kwargs)
        steps.append(Step(operator, args, kwargs, first + i, (), row["name"]))
    outputs = tuple(Decoder(first + len(steps))(value) for value in data["outputs"])
    graph = freed(Graph(inputs, tuple(names), steps, outputs))
    graph.check()
    read = {slot for step in steps for slot in step.reads} | {slot.index for slot in slots_in(outputs)}
    if not set(range(inputs, first)) <= read:
        raise FrozenFileError("it has constants that its graph does not use")
    return graph


def _available(device: torch.device, asked: bool) -> torch.device:
    if device.type in ("cpu", "meta"):
        return device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        hint = "" if asked else "; device='cpu' loads it here"
        raise FrozenFileError(
            f"it is for {device}, which is not there{hint}: {(str(error).splitlines() or [''])[0]}"
        ) from error
    return device


def _is_input(row: Any) -> bool:
    if type(row) is not tuple or len(row) != 2 or type(row[0]) is not tuple or type(row[1]) is not torch.dtype:
        return False
    return all(type(size) is str or (type(size) is int and size >= 0) for size in row[0])


def _report(data: Any) -> FreezeReport:
    """The report of plain data."""
    data = _dict(data, FreezeReport)
    verification = data.get("verification")
    if verification is not None:
        verification = _dict(verification, Verification)
        judged = tuple(_made(Row, row) for row in _list(verification.get("rows")))
        verification = _made(Verification, {**verification, "rows": judged})
    rows = [_made(FreezeRow, row) for row in _list(data.get("rows"))]
    made = _made(FreezeReport, {**data, "rows": rows, "verification": verification})
    str(made), made.to_dict()  # it can be shown
    return made  # type: ignore[no-any-return]


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise FrozenFileError(f"{short(data)} are no rows of its report")
    return data


def _dict(data: Any, cls: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise FrozenFileError(f"{short(data)} is no {cls.__name__}")
    return data


def _made(cls: Any, data: Any) -> Any:
    """A dataclass of its fields; those that this version lacks are left out, those that the file lacks are defaults."""
    hints, data = get_type_hints(cls), _dict(data, cls)
    given = {field.name: data[field.name] for field in fields(cls) if field.name in data}
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if not needed <= set(given):
        raise FrozenFileError(f"its {cls.__name__} lacks {', '.join(sorted(needed - set(given)))}")
    for name, value in given.items():
        if not _is_a(value, hints[name]):
            raise FrozenFileError(f"{name} of its {cls.__name__} is {short(value)}, expected {hints[name]}")
    return cls(**given)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated type; what lists and dicts hold is not looked at."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is_a(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return type(value) in (int, float)
    return hint is Any or type(value) is (get_origin(hint) or hint)
