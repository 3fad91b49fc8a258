"""In-place calls of a graph undone, where nothing but the tensor's own later readers can see them.

`relu_(x)` becomes `relu(x)`, and what read x behind it reads the result. Where x has a view that is read behind the
call, or is a view of something that is, that would be wrong: `Impure` is raised, and PyTorch's own functionalization
(`run_decompositions`), several times slower, takes the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

# Off, in eval mode, they hand their input on, though their schemas do not say so.
PASS = {
    torch.ops.aten.dropout.default,
    torch.ops.aten.dropout_.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.feature_dropout_.default,
    torch.ops.aten.alpha_dropout.default,
    torch.ops.aten.alpha_dropout_.default,
    torch.ops.aten.feature_alpha_dropout.default,
    torch.ops.aten.feature_alpha_dropout_.default,
}
_MAY_PASS = {torch.ops.aten.type_as.default}  # where dtype and device are the same already
_CHANGE_MEMORY = {"resize_", "resize_as_", "set_"}
_TRUTHS = {"eq_", "ne_", "lt_", "le_", "gt_", "ge_", "logical_not_", "logical_and_", "logical_or_", "logical_xor_"}
_BATCH_NORM = torch.ops.aten.batch_norm.default
_NORM_STATISTICS = {_BATCH_NORM: (3, 5), torch.ops.aten.instance_norm.default: (3, 5)}


class Impure(Exception):
    """An in-place call that others can see."""


class Hidden(Exception):
    """One that others can see by memory that no schema tells of: PyTorch's functionalization does not see it either."""


def functionalize(graph: fx.Graph, lifted: set[str]) -> bool:
    """Undo every in-place call of ``graph``, or raise before anything is changed.

    Args:
        graph: a `torch.export` graph, straight from tracing.
        lifted: the placeholders that are the source's tensors.

    Returns:
        Whether one of the calls writes to an input.

    Raises:
        Impure: PyTorch's own functionalization is needed.
        Hidden: it would not do either.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    shares: dict[fx.Node, set[fx.Node]] = {}  # a node -> all that may share its memory, itself included
    memory: dict[Any, fx.Node] = {}  # the storage of a traced tensor -> the first node that has it
    written: list[tuple[fx.Node, fx.Node]] = []
    hidden: set[fx.Node] = set()
    for node in graph.nodes:
        shares[node] = {node}
        if node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):
            for argument in node.all_input_nodes:  # getitem of a list of views
                _join(shares, node, argument)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            _join_memory(shares, node, memory)
            continue
        values = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
        for argument in node.target._schema.arguments:
            value = values.get(argument.name)
            if argument.alias_info is not None or passes(node) or node.target in _MAY_PASS:
                for source in [value] if isinstance(value, fx.Node) else _nodes(value):
                    _join(shares, node, source)
            if argument.alias_info is not None and argument.alias_info.is_write and not passes(node):
                if node.target is torch.ops.aten.detach_.default:
                    continue
                if _name(node) in _CHANGE_MEMORY:
                    raise Hidden(f"{node} changes the memory of {value}")
                written += [(node, target) for target in ([value] if isinstance(value, fx.Node) else _nodes(value))]
        if _join_memory(shares, node, memory) or passes(node):
            hidden.add(node)
        training = _NORM_STATISTICS.get(node.target)
        if training is not None and node.args[training[1]] and node.args[training[0]] is not None:
            raise Impure("a norm that moves its statistics")
    for node, target in written:
        reason = _why_impure(node, target, shares, order, written, lifted)
        if reason and shares[target] & hidden:
            raise Hidden(f"{reason}, and {min(shares[target] & hidden, key=order.__getitem__).target} hands it on")
        if reason:
            raise Impure(reason)
    to_input = any(other.op == "placeholder" for _, target in written for other in shares[target])
    for node, _ in written:
        _replace(node, order)
    return to_input


def _why_impure(
    node: fx.Node,
    target: fx.Node,
    shares: dict[fx.Node, set[fx.Node]],
    order: dict[fx.Node, int],
    written: list[tuple[fx.Node, fx.Node]],
    lifted: set[str],
) -> str:
    """Say why it takes more than other readers to undo that ``node`` writes to ``target``; empty where it does not."""
    for other in shares[target] - {node, target}:
        if order[other] > order[node] or _is_chained(other, node, written):
            continue  # a view taken later: what it is taken of is replaced
        if any(order[user] > order[node] for user in other.users):
            return f"{node} writes to memory that {other} shares"
    if any(other.name in lifted for other in shares[target]) or _pure(node) is None:
        return f"{node} writes to {target}"
    return "" if _keeps_dtype(node, target) else f"{node} casts what it writes"


def passes(node: fx.Node) -> bool:
    """Tell whether this is a dropout that is off: it hands its input on."""
    return node.target in PASS and not (node.args[2] if len(node.args) > 2 else node.kwargs["train"])


def _join(shares: dict[fx.Node, set[fx.Node]], node: fx.Node, source: fx.Node) -> None:
    joined = shares[node] | shares[source]
    for member in joined:
        shares[member] = joined


def _traced(node: fx.Node) -> list[Tensor]:
    """The tensors that a node was when it was traced: one, or those of a list."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [t for t in values if isinstance(t, Tensor) and t.layout is torch.strided]


def _join_memory(shares: dict[fx.Node, set[fx.Node]], node: fx.Node, memory: dict[Any, fx.Node]) -> bool:
    """Joins what has the same storage; whether that says something new."""
    news = False
    for t in _traced(node):  # views that no schema tells of: of einsum, say
        if node.target is torch.ops.aten.lift_fresh_copy.default:  # traced without copying
            memory.pop(t.untyped_storage()._cdata, None)
        first = memory.setdefault(t.untyped_storage()._cdata, node)
        news |= first not in shares[node]
        _join(shares, node, first)
    return news


def _nodes(value: Any) -> list[fx.Node]:
    return [item for item in value if isinstance(item, fx.Node)] if isinstance(value, list | tuple) else []


def _base(target: fx.Node, written: list[tuple[fx.Node, fx.Node]]) -> fx.Node:
    """The node that a chain of in-place calls began with."""
    sources = dict(written)
    while target in sources:
        target = sources[target]
    return target


def _is_chained(other: fx.Node, node: fx.Node, written: list[tuple[fx.Node, fx.Node]]) -> bool:
    """Tell whether `other` is the same tensor as `node`'s, through in-place calls alone: all its readers are known."""
    return _base(other, written) is _base(node, written)


def _name(node: fx.Node) -> str:
    """add_ of aten.add_.Tensor."""
    return str(node.target).split(".")[1]


def _pure(node: fx.Node) -> Any:
    """The operator that computes what this one writes; None where there is none with the same arguments."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    namespace, _, name = schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = getattr(packet, schema.overload_name or "default", None)
    if not name.endswith("_") or overload is None:
        return None
    if len([a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]) != 1:
        return None
    same = [a.name for a in overload._schema.arguments] == [a.name for a in schema.arguments]
    return overload if same and len(schema.returns) == 1 and not overload._schema.is_mutable else None


def _keeps_dtype(node: fx.Node, target: fx.Node) -> bool:
    """Tell whether the operator out of place gives the dtype of its target, to which the one in place casts."""
    own = target.meta["val"].dtype
    if own is not torch.bool and _name(node) in _TRUTHS:
        return False
    return all(torch.promote_types(own, t.dtype) == own for source in node.all_input_nodes for t in _traced(source))


def _replace(node: fx.Node, order: dict[fx.Node, int]) -> None:
    """``node`` computes out of place, and whatever read its target behind it reads it."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    place = next(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
    target: Any = node.args[place]  # an earlier call of the same chain may have taken its place
    node.target = _pure(node)
    target.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])
