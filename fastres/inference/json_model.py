"""What a file says of a network beside its weights, as one JSON document: graph, call, plan and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec

from fastres.inference.capture import Dims
from fastres.inference.json_graph import graph_from_json, graph_to_json
from fastres.inference.json_specs import (
    Parameters,
    signature_from_json,
    signature_to_json,
    spec_from_json,
    spec_to_json,
)
from fastres.inference.json_values import Decoder, FrozenFileError, encode, short
from fastres.inference.likeness import likeness_from_json
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
    report = stored.report
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
        "report": encode(
            {
                **_data(report),
                "rows": [_data(row) for row in report.rows],
                "verification": report.verification
                and {**_data(report.verification), "rows": [_data(row) for row in report.verification.rows]},
            }
        ),
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
        raise FrozenFileError(f"its network cannot be built: {type(error).__name__}: {short(str(error))}") from error


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
    if type(batch) is not int or type(plan.channels_last) is not bool or type(parts) not in (int, type(None)):
        raise FrozenFileError(f"{short(batch)}, {short(plan)} are no batch and plan")
    if type(dtype) is not torch.dtype or not dtype.is_floating_point or (parts is not None and parts < 1):
        raise FrozenFileError(f"{short(dtype)}, {short(parts)} are no dtype and number of images")
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
        raise FrozenFileError(f"it is for {device}, which is not there{hint}: {short(str(error))}") from error
    return device


def _is_input(row: Any) -> bool:
    if type(row) is not tuple or len(row) != 2 or type(row[0]) is not tuple or type(row[1]) is not torch.dtype:
        return False
    return all(type(size) is str or (type(size) is int and size >= 0) for size in row[0])


def _report(data: Any) -> FreezeReport:
    """The report of plain data."""
    rows, verification = data["rows"], data["verification"]
    if verification is not None:
        judged = tuple(_made(Row, row) for row in verification["rows"])
        verification = _made(Verification, {**verification, "rows": judged})
    made = _made(FreezeReport, {**data, "rows": [_made(FreezeRow, row) for row in rows], "verification": verification})
    str(made), made.to_dict()  # it can be shown
    return made  # type: ignore[no-any-return]


def _made(cls: Any, data: Any) -> Any:
    """A dataclass of its fields; those that this version lacks are left out, those that the file lacks are defaults."""
    if not isinstance(data, dict):
        raise FrozenFileError(f"{short(data)} is no {cls.__name__}")
    return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})
