"""A network's graph as JSON, and a graph built from JSON that nobody has to trust.

``torch.fx`` writes Python text from a graph and runs it: names of nodes, paths of attributes and the text of arguments
all become code. So every name in a file must be a plain ASCII identifier, every path is made of such names and finds
what this module put there itself, every function is on the list of json_ops.py, every module on that of
json_leaves.py, and every argument is a plain value of json_values.py, written into the text by ``repr``.

::

    {"nodes":   [{"op": "call_module", "name": "conv1", "target": "conv1", "args": [{"node": "x"}], "kwargs": {}}, ...],
     "modules": [{"name": "conv1", "class": "FrozenConv", "settings": {...}}, ...],
     "tensors": [{"name": "conv1.weight", "data": "conv1.weight", "kind": "parameter"}, ...],
     "strides": {"conv1.weight": [27, 1, 9, 3], ...}}

Only what the graph uses is kept. A tensor with two names is stored once, under the first; it has strides here where it
is dense but not contiguous, such as a weight in channels_last.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastres.inference.json_leaves import LEAVES, leaf_from_json, leaf_to_json, settle
from fastres.inference.json_ops import target_from_json, target_to_json
from fastres.inference.json_paths import Paths, put
from fastres.inference.json_values import DTYPES, Decoder, FrozenFileError, encode, short

MAX_NODES = 50_000
MAX_SIZE = 2**48
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}", re.ASCII)
_KINDS = ("parameter", "buffer")


def graph_to_json(module: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The graph, its modules and tensors as JSON; the tensors to store, by name.

    Raises:
        FrozenFileError: the graph holds something that no file can; the message names the node.
    """
    nodes: list[dict[str, Any]] = []
    modules: dict[str, dict[str, Any]] = {}
    paths = Paths()
    tensors = _Tensors(paths)
    for node in module.graph.nodes:
        try:
            nodes.append(_node_to_json(node, module, paths, modules, tensors))
        except FrozenFileError as error:
            raise FrozenFileError(f"node {node.name}: {error}") from error
    data = {"nodes": nodes, "modules": list(modules.values()), "tensors": list(tensors.rows.values())}
    return {**data, "strides": tensors.strides}, tensors.data


def _node_to_json(
    node: fx.Node, module: fx.GraphModule, paths: Paths, modules: dict[str, dict[str, Any]], tensors: _Tensors
) -> dict[str, Any]:
    row: dict[str, Any] = {"op": node.op, "name": node.name}
    if node.op == "call_function":
        row["target"] = target_to_json(node.target)
    elif node.op == "get_attr":
        path = str(node.target)
        row["target"] = paths[path]
        owner, _, name = path.rpartition(".")
        tensors.add(path, module.get_submodule(owner), name)
    elif node.op == "call_module":
        path = str(node.target)
        row["target"] = paths[path]
        if path not in modules:
            child = module.get_submodule(path)
            leaf = leaf_to_json(child)
            if leaf is None:
                raise FrozenFileError(f"it calls a {type(child).__name__}: a file holds {', '.join(LEAVES)} alone")
            modules[path] = {"name": paths[path], "class": leaf[0], "settings": encode(leaf[1])}
            for name, _ in (*child.named_parameters(), *child.named_buffers()):
                tensors.add(f"{path}.{name}", child, name)
    elif node.op not in ("placeholder", "output"):
        raise FrozenFileError(f"a {node.op} cannot be saved")
    if node.op != "placeholder":
        row["args"] = [encode(a) for a in node.args]
        row["kwargs"] = {name: encode(value) for name, value in node.kwargs.items()}
    elif node.args:
        raise FrozenFileError("an input with a default value cannot be saved")
    return row


class _Tensors:
    """The rows of a graph's tensors, and what of them is stored: memory with two names once."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.rows: dict[str, dict[str, Any]] = {}
        self.data: dict[str, Tensor] = {}
        self.strides: dict[str, list[int]] = {}
        self._known: dict[Any, str] = {}

    def add(self, path: str, owner: nn.Module, name: str) -> None:
        if path in self.rows:
            return
        t = getattr(owner, name)
        reason = _why_not(t)
        if reason:
            raise FrozenFileError(f"{path} {reason}")
        key = id(t) if not t.numel() else (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device)
        data = self._known.setdefault(key, self.paths[path])
        if self.data.setdefault(data, t) is t and t.stride() != _contiguous(t) and is_dense(t.shape, t.stride()):
            if min(t.stride()) > 0:  # a size of 1 may have any stride
                self.strides[data] = list(t.stride())
        row: dict[str, Any] = {"name": self.paths[path], "data": data, "kind": _KINDS[name not in owner._parameters]}
        if row["kind"] == "buffer" and name in owner._non_persistent_buffers_set:
            row["persistent"] = False
        self.rows[path] = row


def _why_not(t: Any) -> str:
    """Why a file cannot hold an attribute; empty where it can."""
    if type(t) not in (Tensor, nn.Parameter):
        return f"is a {type(t).__name__}, not a plain tensor"
    if t.layout is not torch.strided or t.is_quantized or t.dtype not in DTYPES.values():
        return f"is {t.layout} and {t.dtype}: a file holds dense tensors of {', '.join(DTYPES)}"
    return "is on meta and has no values" if t.is_meta else ""


def _contiguous(t: Tensor) -> tuple[int, ...]:
    """Its strides, were it contiguous: ``is_contiguous`` does not look at those of sizes of 1, and layouts do."""
    return torch.empty(t.shape, device="meta").stride()


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether these strides reach each of numel places once, and no other."""
    if 0 in shape:
        return False
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def layout(data: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides that a stored tensor had; None: contiguous. Raises FrozenFileError where they do not fit."""
    table = data.get("strides")
    if not isinstance(table, Mapping):
        raise FrozenFileError("its graph has no table of strides")
    strides = table.get(name)
    if strides is None:
        return None
    if not isinstance(strides, list) or len(strides) != len(shape) or 0 in shape:
        raise FrozenFileError(f"{name}: {short(strides)} are no strides of {short(shape)}")
    if any(type(s) is not int or not 0 < s < MAX_SIZE for s in strides) or not is_dense(shape, tuple(strides)):
        raise FrozenFileError(f"{name}: the strides {short(strides)} do not fit {short(shape)}")
    return tuple(strides)


def graph_from_json(
    data: Mapping[str, Any], stored: Mapping[str, Tensor], saved: torch.device, device: torch.device
) -> fx.GraphModule:
    """The network, on ``device``, in eval mode.

    Args:
        data: what ``graph_to_json`` returned, from a file.
        stored: the tensors of the file by name, laid out as they were.
        saved: the device that it was saved on: arguments that name it name ``device`` instead.
        device: where it is to run; on meta it is checked, and cannot.

    Raises:
        FrozenFileError: anything that ``graph_to_json`` does not write.
    """
    nodes, modules, rows = (_rows(data, name) for name in ("nodes", "modules", "tensors"))
    if not set(data["strides"]) <= set(stored):
        raise FrozenFileError("it has strides of tensors that it does not have")
    network = fx.GraphModule(nn.Module(), fx.Graph(), "FrozenNetwork")
    tensors = _tensors_from_json(rows, stored, device)
    named = (row.get("target") for row in nodes if row.get("op") in ("get_attr", "call_module"))
    _install(network, dict.fromkeys(path for path in named if isinstance(path, str)), modules, tensors)
    moved = {saved: device, torch.device(saved.type): device}
    network.graph = _nodes_from_json(nodes, network, {row["name"] for row in modules}, set(tensors), moved)
    return network.eval()


def _rows(data: Any, name: str) -> list[dict[str, Any]]:
    rows = data.get(name) if isinstance(data, Mapping) else None
    if not isinstance(rows, list) or len(rows) > MAX_NODES or not all(isinstance(row, dict) for row in rows):
        raise FrozenFileError(f"its graph has no list of {name}")
    return rows


def _tensors_from_json(
    rows: list[dict[str, Any]], stored: Mapping[str, Tensor], device: torch.device
) -> dict[str, tuple[Tensor, bool]]:
    """Each path's parameter or buffer, and whether it is in the state_dict; two paths of one tensor share it."""
    found: dict[str, tuple[Tensor, bool]] = {}
    made: dict[tuple[str, str], Tensor] = {}
    moved: dict[str, Tensor] = {}
    for row in rows:
        path, key, kind = row.get("name"), row.get("data"), row.get("kind")
        if not isinstance(path, str) or path in found:
            raise FrozenFileError(f"the tensor {short(path)} is there twice, or has no name")
        if not isinstance(key, str) or key not in stored or kind not in _KINDS:
            raise FrozenFileError(f"the tensor {short(path)} is not in the file")
        if key not in moved:
            moved[key] = stored[key].to(device)
        if (key, kind) not in made:
            parameter = kind == "parameter"
            made[key, kind] = nn.Parameter(moved[key], requires_grad=False) if parameter else moved[key]
        found[path] = made[key, kind], row.get("persistent") is not False
    if len(moved) != len(stored):
        raise FrozenFileError(f"it has tensors that its graph does not use: {short(sorted(set(stored) - set(moved)))}")
    return found


def _install(
    network: nn.Module,
    order: dict[str, None],
    rows: list[dict[str, Any]],
    tensors: Mapping[str, tuple[Tensor, bool]],
) -> None:
    """Puts modules and tensors at their paths, in the order in which the graph names them."""
    leaves: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
    for row in rows:
        path = row.get("name")
        if not isinstance(path, str) or path in leaves:
            raise FrozenFileError(f"the module {short(path)} is there twice, or has no name")
        leaves[path] = row, {}
    for path, (t, _) in tensors.items():
        owner, _, name = path.rpartition(".")
        if path in leaves:
            raise FrozenFileError(f"{short(path)} is there twice")
        if owner in leaves:
            leaves[owner][1][name] = t
        elif path not in order:
            raise FrozenFileError(f"the graph does not use its tensor {short(path)}")
    if not set(leaves) <= set(order):
        raise FrozenFileError(f"the graph does not use its modules {short(sorted(set(leaves) - set(order)))}")
    for path in order:
        if path in leaves:
            put(network, path, _leaf(*leaves[path]))
        elif path in tensors and path.rpartition(".")[0] not in leaves:
            put(network, path, *tensors[path])


def _leaf(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module around its tensors: the very objects, for whoever shares them."""
    settings = Decoder()(row.get("settings"))
    try:
        module = leaf_from_json(row.get("class"), settings, tensors)
        for name, t in tensors.items():
            if (name in module._parameters) is not isinstance(t, nn.Parameter):
                raise FrozenFileError(f"its {name} is of the wrong kind")
            setattr(module, name, t)
        settle(module, settings)
    except FrozenFileError as error:
        raise FrozenFileError(f"module {short(row['name'])}: {error}") from error
    return module


def _nodes_from_json(
    rows: list[dict[str, Any]],
    network: nn.Module,
    modules: set[str],
    tensors: set[str],
    moved: Mapping[torch.device, torch.device],
) -> fx.Graph:
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    decode = Decoder(known, moved)
    inputs = True  # so far
    for i, row in enumerate(rows):
        op, name, target = row.get("op"), row.get("name"), row.get("target")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name) or name == "self":
            raise FrozenFileError(f"{short(name)} is no name of a node")
        try:
            args, kwargs = _arguments(row, decode)
            inputs = inputs and op == "placeholder"
            if inputs and not args and not kwargs:
                node = graph.create_node("placeholder", name, name=name)
            elif op == "output" and i == len(rows) - 1 and len(args) == 1 and isinstance(args[0], tuple) and not kwargs:
                node = graph.create_node("output", "output", args, name=name)
            elif op == "get_attr" and isinstance(target, str) and target in tensors and not args and not kwargs:
                node = graph.create_node("get_attr", target, name=name)
            elif op == "call_module" and isinstance(target, str) and target in modules:
                inspect.signature(network.get_submodule(target).forward).bind(*args, **kwargs)
                node = graph.create_node("call_module", target, args, kwargs, name=name)
            elif op == "call_function":
                function = target_from_json(target, args, kwargs)
                node = graph.create_node("call_function", function, args, kwargs, name=name)
            else:
                raise FrozenFileError(f"a {short(op)} of {short(target)} at this place makes no sense")
        except (FrozenFileError, TypeError) as error:
            raise FrozenFileError(f"node {name}: {error}") from error
        if node.name != name:
            raise FrozenFileError(f"{short(name)} is the name of two nodes, or of a builtin")
        known[name] = node
    if not rows or rows[-1].get("op") != "output":
        raise FrozenFileError("its graph has no output at its end")
    return graph


def _arguments(row: Mapping[str, Any], decode: Decoder) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = row.get("args", []), row.get("kwargs", {})
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise FrozenFileError("its arguments are no list and no object")
    return tuple(decode(a) for a in args), {name: decode(value) for name, value in kwargs.items()}
