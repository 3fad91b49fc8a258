"""What a file says of a network beside its weights, as one JSON document: graph, call, plan and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec

from fastres.graph.export import Dims
from fastres.inference.json_graph import graph_from_json, graph_to_json
from fastres.inference.file.trees import (
    Parameters,
    signature_from_json,
    signature_to_json,
    spec_from_json,
    spec_to_json,
)
from fastres.inference.file.values import Decoder, FrozenFileError, encode, short
from fastres.inference.hub import likeness_from_json
from fastres.inference.plan import Plan
from fastres.inference.report import FreezeReport, FreezeRow
from fastres.verify.verdict import Row, Verification


@dataclass
class Stored:
    """What a file holds: a network and how it is called.

    Attributes:
        module: the network; it takes flat tensors and returns a flat tuple.
        signature: name, kind and default of the source's parameters.
        tree, plain: the bound arguments' tree, and those of its leaves that are no tensors, by place.
        inputs: of each tensor its sizes, a name for one that may vary, and its dtype.
        outputs: the tree that the flat outputs are leaves of.
        batch: what the varying size was in the capture.
        dtype: what it computes in.
        plan: how it runs.
        device: what it was planned on, and runs on.
        report: of the freeze.
        likeness: of its source, see `likeness_to_json`; nothing in files without one.
    """

    module: fx.GraphModule
    signature: Parameters
    tree: TreeSpec
    plain: tuple[tuple[int, Any], ...]
    inputs: list[tuple[Dims, torch.dtype]]
    outputs: TreeSpec
    batch: int
    dtype: torch.dtype
    plan: Plan
    device: torch.device
    report: FreezeReport
    likeness: dict[str, Any] = field(default_factory=dict)


def to_json(stored: Stored) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document, and the tensors that go with it by name. Raises FrozenFileError for what no file can hold."""
    graph, tensors = graph_to_json(stored.module)
    report = _data(stored.report)
    report["rows"] = [_data(row) for row in stored.report.rows]
    verdict = stored.report.verification
    if verdict is not None:  # one that failed is false
        report["verification"] = {**_data(verdict), "rows": [_data(row) for row in verdict.rows]}
    document = {
        "graph": graph,
        "signature": signature_to_json(stored.signature),
        "tree": spec_to_json(stored.tree),
        "plain": encode(stored.plain),
        "inputs": encode([(tuple(dims), dtype) for dims, dtype in stored.inputs]),
        "outputs": spec_to_json(stored.outputs),
        "batch": stored.batch,
        "dtype": encode(stored.dtype),
        "plan": encode(_data(stored.plan)),
        "device": encode(stored.device),
        "report": encode(report),
        **stored.likeness,
    }
    return document, tensors


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
    module = graph_from_json(document["graph"], tensors, saved, device)
    inputs, plain, tree = value(document["inputs"]), value(document["plain"]), spec_from_json(document["tree"])
    outputs, batch = spec_from_json(document["outputs"]), document["batch"]
    dtype, plan = value(document["dtype"]), _made(Plan, value(document["plan"]))
    returned: Any = module.graph.output_node().args[0]
    count = len(module.graph.find_nodes(op="placeholder"))
    if not isinstance(inputs, list) or len(inputs) != count or not all(map(_is_input, inputs)):
        raise FrozenFileError("its inputs are not those of its graph")
    if not isinstance(plain, tuple) or not all(type(p) is tuple and len(p) == 2 and type(p[0]) is int for p in plain):
        raise FrozenFileError("its arguments that are no tensors are no list")
    if tree.num_leaves != count + len(plain) or outputs.num_leaves != len(returned):
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
    return Stored(module, signature, tree, plain, inputs, outputs, batch, dtype, plan, device, report, likeness)


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
