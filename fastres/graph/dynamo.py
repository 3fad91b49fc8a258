"""A graph of Dynamo's as functional ATen operators, its weights as constants.

Dynamo hands parameters and buffers over as arguments of every call, marked as static. Those that nothing in the graph
writes to become `get_attr` nodes here, so that the rewriting in `fastres.graph` sees a network as freeze does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

aten = torch.ops.aten
_DEVICES = ("cpu", "cuda")  # that fold in float64 and have fused operators
# (x, weight, bias, mean, var, training, momentum, eps); what they write to in training their schemas do not say.
_NORMS = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}


class Unchanged(Exception):
    """The graph goes to Inductor as it is; the message says why."""


@dataclass
class Traced:
    """A graph of Dynamo's, traced.

    Attributes:
        graph: placeholders for the arguments that are no constants, `get_attr` of those that are by the names of
            Dynamo's placeholders and of tensors that the graph makes, ATen calls, an output of a flat tuple.
            `meta["shape"]` (sizes, or the names of those that vary), `meta["size"]`, `meta["dtype"]` of every tensor.
        static: the constant arguments, name -> place.
        tensors: the graph's own constants.
        fakes: the arguments as fake tensors and symbols.
        mode: what the fakes belong to.
        outputs: the outputs as fake tensors; None for one that is none.
        writes: whether the graph writes to an argument.
    """

    graph: fx.Graph
    static: dict[str, int]
    tensors: dict[str, Tensor]
    fakes: list[Any]
    mode: FakeTensorMode
    outputs: list[Any]
    writes: bool


def trace(module: fx.GraphModule, inputs: Sequence[Any]) -> Traced:
    """``module`` for calls like ``inputs``, by running it on fake tensors.

    Raises:
        Unchanged: it has regions or tensors that are not looked into, or writes to something else than an argument.
    """
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise Unchanged(f"it has a {node.target.name()} region")
        if node.op in ("get_attr", "call_module"):
            raise Unchanged(f"it has {node.target} of its own")
    mode = detect_fake_mode(inputs) or FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]
    with mode, torch.no_grad(), enable_python_dispatcher():
        traced = make_fx(torch.func.functionalize(module))(*fakes)
    given = module.graph.find_nodes(op="placeholder")
    names = [str(node.target) for node in given]
    sources = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    written = _written(traced.graph)
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    static: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    outputs: list[Any] = []
    for place, (node, source) in enumerate(sources.items()):
        if node not in written and is_weight(source, inputs[place]):
            static[names[place]] = place
            values[node] = graph.create_node("get_attr", names[place])
        else:
            values[node] = graph.placeholder(names[place])
        values[node].meta = _meta(node.meta.get("val"))
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            t = getattr(traced, str(node.target))
            if not isinstance(t, Tensor) or isinstance(t, FakeTensor) or t.device.type not in _DEVICES:
                raise Unchanged(f"it has {node.target} of its own")
            tensors[str(node.target)] = t
            values[node] = graph.create_node("get_attr", node.target)
            values[node].meta = _meta(t)
        elif node.op == "call_function" and _is_same_view(node):
            values[node] = values[node.args[0]]
        elif node.op == "call_function":
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise Unchanged(f"it has a {node.target.name()} region")
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = _meta(node.meta.get("val"))
            if node.target in _NORMS and not node.args[5]:
                values[node].target = aten._native_batch_norm_legit_no_training.default
                values[node].args = (*values[node].args[:5], *node.args[6:])
        elif node.op == "output":
            results = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
            if any(isinstance(result, tuple | list | dict) for result in results):
                raise Unchanged("its outputs are not flat")
            outputs = [result.meta.get("val") if isinstance(result, fx.Node) else None for result in results]
            graph.output(tuple(values[result] if isinstance(result, fx.Node) else result for result in results))
    return Traced(graph, static, tensors, fakes, mode, outputs, bool(written))


def is_weight(node: fx.Node, value: Any) -> bool:
    """Tell whether an argument is a parameter or buffer of a module, which calls share."""
    if type(value) not in (Tensor, nn.Parameter) or value.device.type not in _DEVICES or value.layout != torch.strided:
        return False
    if "_dynamo_static_input_type" not in node.meta.get("tensor_dict", {}):
        return False
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    name = name() if callable(name) else name  # a method in some versions
    return "._parameters[" in name or "._buffers[" in name


def _written(graph: fx.Graph) -> set[fx.Node]:
    """The placeholders that some call writes to."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.target in _NORMS and node.args[5]:
            written |= {t for t in node.args[3:5] if t is not None}
        if node.op != "call_function" or schema is None or not schema.is_mutable or _is_same_view(node):
            continue
        arguments = {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)} | node.kwargs
        for argument in schema.arguments:
            target = arguments.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write or target is None:
                continue
            if not isinstance(target, fx.Node) or target.op != "placeholder":
                raise Unchanged(f"{node.target} writes to something that is no argument")
            written.add(target)
    return written


def _is_same_view(node: fx.Node) -> bool:
    """Tell whether this only gives sizes of 1 other strides, as pooling to one pixel does in channels_last."""
    if node.target is not aten.as_strided_.default or len(node.args) != 3 or node.kwargs:
        return False
    source: Any = node.args[0]
    before, after = source.meta["val"], node.meta["val"]
    if source.op == "placeholder" or len(before.shape) != len(after.shape):
        return False
    return all(
        statically_known_true(a == b) and (statically_known_true(a == 1) or statically_known_true(s == t))
        for a, b, s, t in zip(before.shape, after.shape, before.stride(), after.stride(), strict=True)
    )


def _meta(value: Any) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {}
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    size = tuple(size if isinstance(size, int) else _hint(size) for size in value.shape)
    return {"shape": shape, "size": size, "dtype": value.dtype, "device": value.device}


def _hint(size: Any) -> int:
    hint = size.node.hint
    return 1 if hint is None else int(hint)
