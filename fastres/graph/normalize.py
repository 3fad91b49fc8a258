"""One way to write each thing: what regions look for has a single form here, and what computes nothing is gone.

    aten.conv2d.default(x, w, b, [sh, sw], [ph, pw], [dh, dw], groups)          every plain 2-D convolution
    aten.batch_norm.default(x, w, b, mean, var, False, m, eps, False)           every BN by running statistics
    aten.add.Tensor(x, y)                                                       a residual, whatever was written
    aten.relu / hardtanh(0, 6) / hardswish / silu .default(x)                   see `activation`
    aten.reshape.default                                                        every view

Views become reshapes: in a functional graph nobody can tell, and they exist in every memory layout.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import fx

from fastres.graph.functionalize import passes
from fastres.graph.questions import same_shape

aten = torch.ops.aten
_SAME = {
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
}
_LAYOUTS = {aten.clone.default, aten.contiguous.default}
# They read memory as it lies: where one is, copies and layouts stay as they are written.
_BY_MEMORY = {aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype}
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default}
_CHECKS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg}
_MOMENTUM = 0.1
_NEUTRAL: dict[Any, int] = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar), 0),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar), 1),
}


def normalize(graph: fx.Graph, keep: frozenset[Any] = frozenset()) -> None:
    """Rewrite a functional ATen graph, in place, into the forms above; dead nodes go.

    Args:
        keep: operators that stay although they compute nothing: copies, where somebody may write to an output.
    """
    nodes = list(graph.nodes)
    by_memory = any(node.target in _BY_MEMORY for node in nodes)
    for node in nodes:
        if node.op != "call_function":
            continue
        if node.target in _CHECKS:
            graph.erase_node(node)
        elif by_memory and node.target in _LAYOUTS:
            continue
        elif node.target in _SAME or passes(node):
            if node.target not in keep:
                _hand_on(graph, node)
        elif (node.target is aten.slice.Tensor and _is_whole(node)) or _is_nothing(node):
            _hand_on(graph, node)
        elif node.target is aten.pad.default or node.target is aten.constant_pad_nd.default:
            _pad(graph, node)
        elif node.target in _VIEWS:
            node.target, node.args = aten.reshape.default, node.args[:2]
        elif node.target in (aten.add_.Tensor, aten.add.Tensor):
            node.target = aten.add.Tensor
        elif node.target is aten.mul.Tensor:
            _gate(graph, node)
        elif node.target is aten.convolution.default:
            _convolution(node)
        elif node.target is aten.conv2d.padding:
            _padding(node)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _native_norm(graph, node)
        elif node.target in _OURS:
            _OURS[node.target](graph, node)
        if node.target is aten.conv2d.default:
            _spell_out(node)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _writes(node))


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _hand_on(graph: fx.Graph, node: fx.Node) -> None:
    """`node` is its input; but an output must stay a copy, of a tensor given to the network or of another output."""
    source: Any = node.args[0]
    if any(user.op == "output" for user in node.users):
        if source.op in ("placeholder", "get_attr") or node.target is aten.clone.default:
            return
    node.replace_all_uses_with(source)
    graph.erase_node(node)


_GATES = {aten.sigmoid.default: aten.silu.default, aten.hardsigmoid.default: aten.hardswish.default}


def _gate(graph: fx.Graph, node: fx.Node) -> None:
    """x * sigmoid(x) is SiLU, x * hardsigmoid(x) is Hardswish, if nothing else reads the gate."""
    for x, gate in (node.args[:2], node.args[1::-1]):
        if isinstance(gate, fx.Node) and gate.target in _GATES and gate.args[0] is x and list(gate.users) == [node]:
            node.target, node.args = _GATES[gate.target], (x,)
            graph.erase_node(gate)
            return


def _is_whole(node: fx.Node) -> bool:
    """Tell whether a slice takes everything."""
    a = arguments(node)
    size = node.args[0].meta.get("shape", ())[a["dim"]]  # type: ignore[union-attr]
    end = a["end"] is None or a["end"] == sys.maxsize or (isinstance(size, int) and a["end"] == size)
    return a["start"] in (0, None) and end and a["step"] == 1


def _is_nothing(node: fx.Node) -> bool:
    """Tell whether this adds 0 or multiplies by 1, as sums over branches begin and as absent scales are written."""
    value, x = node.args[1] if len(node.args) > 1 else None, node.args[0] if node.args else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(x, fx.Node):
        return False
    same = same_shape(x.meta.get("shape"), node.meta.get("shape")) and x.meta["dtype"] == node.meta["dtype"]
    return same and value == _NEUTRAL.get(node.target)


def _pad(graph: fx.Graph, node: fx.Node) -> None:
    """A padding by nothing goes; one by as many zeros on both sides becomes that of the convolutions that read it."""
    a = arguments(node)
    zeros = a.get("mode", "constant") == "constant" and a.get("value") in (0, None)
    if zeros and len(a["pad"]) <= 4 and all(isinstance(p, int) for p in a["pad"]):
        left, right, top, bottom = ([*a["pad"], 0, 0, 0, 0])[:4]
        readers = list(node.users)
        for reader in readers:
            if reader.target is aten.convolution.default:
                _convolution(reader)
            elif reader.target is aten.conv2d.padding:
                _padding(reader)
        if left == right >= 0 and top == bottom >= 0 and all(_convolves(reader, node) for reader in readers):
            for reader in readers:
                b = arguments(reader)
                h, w = pair(b["padding"])
                _set_conv(reader, b["weight"], b | {"input": a["self"]}, [h + top, w + left])
            graph.erase_node(node)
            return
    if a.get("mode", "constant") == "constant" and not any(a["pad"]):
        _hand_on(graph, node)


def _convolves(node: fx.Node, x: fx.Node) -> bool:
    return node.target is aten.conv2d.default and node.args[0] is x and x not in node.args[1:]


def arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the schema's names, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    return found | dict(node.kwargs)


def pair(value: Any) -> list[Any]:
    """[h, w] of one number or two, as convolutions take them."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    return items * 2 if len(items) == 1 else items


def _set_conv(node: fx.Node, weight: Any, a: dict[str, Any], padding: Any) -> None:
    node.target = aten.conv2d.default
    where = pair(a["stride"]), pair(padding), pair(a["dilation"])
    node.args = (a["input"], weight, a["bias"], *where, a["groups"])
    node.kwargs = {}


def _spell_out(node: fx.Node) -> None:
    a = arguments(node)
    _set_conv(node, a["weight"], a, a["padding"])


def _convolution(node: fx.Node) -> None:
    a = arguments(node)
    if not a["transposed"] and len(a["stride"]) == 2 and len(node.meta.get("shape", ())) == 4:
        _set_conv(node, a["weight"], a, a["padding"])


def _padding(node: fx.Node) -> None:
    """'valid', and 'same' where it is the same on both sides."""
    a = arguments(node)
    kernel = a["weight"].meta["shape"][2:]
    if a["padding"] == "valid":
        _set_conv(node, a["weight"], a, [0, 0])
    elif a["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(pair(a["dilation"]), kernel, strict=True)]
        if all(t % 2 == 0 for t in total):
            _set_conv(node, a["weight"], a, [t // 2 for t in total])


def _native_norm(graph: fx.Graph, node: fx.Node) -> None:
    a = arguments(node)
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            affine = a["weight"], a["bias"], a["running_mean"], a["running_var"]
            user.target = aten.batch_norm.default
            user.args = (a["input"], *affine, False, a["momentum"], a["eps"], False)


def _insert(graph: fx.Graph, before: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    node.meta = dict(before.meta)
    return node


def _tail(graph: fx.Graph, node: fx.Node, y: fx.Node, residual: Any, act: str, out: fx.Node) -> None:
    """`out` becomes act(y [+ residual]): an operator of ours taken apart again, so that what is around it can join."""
    tensor = {key: out.meta[key] for key in ("shape", "dtype", "size")}
    y.meta |= tensor
    if residual is not None:
        y = _insert(graph, node, aten.add.Tensor, (y, residual))
        y.meta |= tensor
    if act != "none":
        y = _insert(graph, node, _ACTS[act][0], (y, *_ACTS[act][1]))
        y.meta |= tensor
    out.replace_all_uses_with(y)


def _our_norm(graph: fx.Graph, node: fx.Node) -> None:
    a = arguments(node)
    outs = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if a["training"] or len(outs) != 1 or any(user not in outs and user.users for user in node.users):
        return
    affine = a["weight"], a["bias"], a["running_mean"], a["running_var"]
    norm = _insert(graph, node, aten.batch_norm.default, (a["x"], *affine, False, _MOMENTUM, a["eps"], False))
    _tail(graph, node, norm, a["residual"], a["act"], outs[0])


def _our_conv(graph: fx.Graph, node: fx.Node) -> None:
    a = arguments(node)
    if a["scale"] is not None:
        return
    where = pair(a["stride"]), pair(a["padding"]), pair(a["dilation"]), a["groups"]
    conv = _insert(graph, node, aten.conv2d.default, (a["x"], a["weight"], a["bias"], *where))
    _tail(graph, node, conv, a["residual"], a["act"], node)


def _our_add(graph: fx.Graph, node: fx.Node) -> None:
    a = arguments(node)
    y = _insert(graph, node, aten.add.Tensor, (a["x"], a["residual"]))
    _tail(graph, node, y, None, "relu", node)


_OURS: dict[Any, Any] = {
    torch.ops.fastres.bn_act.default: _our_norm,
    torch.ops.fastres.conv_act.default: _our_conv,
    torch.ops.fastres.add_relu.default: _our_add,
}
_ACTS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "relu": (aten.relu.default, ()),
    "relu6": (aten.hardtanh.default, (0.0, 6.0)),
    "hardswish": (aten.hardswish.default, ()),
    "silu": (aten.silu.default, ()),
}


def activation(node: fx.Node) -> str | None:
    """`conv_act`'s name for this activation; None for any other node."""
    target, args = node.target, node.args[1:]
    if target is aten.relu.default:
        return "relu"
    if target is aten.hardswish.default:
        return "hardswish"
    if target is aten.silu.default:
        return "silu"
    if target is aten.relu6.default or (target in (aten.hardtanh.default, aten.clamp.default) and args == (0, 6)):
        return "relu6"
    if (target is aten.clamp_min.default and args == (0,)) or (target is aten.clamp.default and args == (0,)):
        return "relu"
    if target is aten.threshold.default and args == (0, 0):
        return "relu"
    return None
