"""The values that a graph computes from the source's tensors alone: in float64, rounded once where it meets the input.

A weight that is standardized, a frozen batch norm written as arithmetic, a parametrized weight: all are constants in
inference, whatever their form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

_CASTS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype_layout}
# In float64 they would take another step than in the source's dtype, where its numbers lie on one.
_STEPS = {"floor", "ceil", "round", "trunc", "fix", "frac", "sign", "sgn", "heaviside", "fmod", "remainder"}
_STEPS |= {"floor_divide", "fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"}
_LARGE = 1 << 20  # elements; a constant that much larger than what it is made of stays computed


class Constants:
    """The constant nodes of a graph, and their values.

    Args:
        graph: functional; `meta["shape"]` on its nodes.
        tensors: by the names that its `get_attr` nodes have.
    """

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.nodes: set[fx.Node] = set()
        self._exact: dict[fx.Node, Tensor] = {}
        self._finished: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and self._is_computed(node)):
                self.nodes.add(node)

    def finish(self, node: fx.Node) -> None:
        """Mark a new `get_attr` node as a constant of the finished graph, which nothing more is made of."""
        self.nodes.add(node)
        self._finished.add(node)

    def is_finished(self, node: fx.Node) -> bool:
        """Tell whether `node` is a constant of the finished graph."""
        return node in self._finished

    def _is_computed(self, node: fx.Node) -> bool:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or "shape" not in node.meta:
            return False
        if not all(argument in self.nodes for argument in node.all_input_nodes):
            return False
        if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
            return False
        return all(isinstance(size, int) for size in node.meta["shape"])

    def key(self, node: fx.Node) -> str:
        """A line that says what the constant is made of: equal keys, equal values."""
        if node.op == "get_attr":
            return str(node.target)
        spell: Any = lambda n: _Text(self.key(n))  # noqa: E731
        parts = fx.map_arg((node.args, node.kwargs), spell)
        return f"{node.target}{parts!r}"

    def exact(self, node: Any) -> Tensor:
        """The value, floating ones in float64."""
        if node.op == "get_attr":
            t = self.tensors[str(node.target)].detach()
            return t.double() if t.is_floating_point() else t
        if node not in self._exact and _takes_steps(node):
            value = self._as_written(node)
            self._exact[node] = value.double() if value.is_floating_point() else value
        if node not in self._exact:
            args, kwargs = cast(Any, fx.map_arg((node.args, node.kwargs), self.exact))
            if node.target in _CASTS and _widens(node):
                self._exact[node] = args[0].double()  # rounded once, at the end
            else:
                with torch.no_grad():
                    value = node.target(*args, **kwargs)
                self._exact[node] = value.double() if value.is_floating_point() else value
        return self._exact[node]

    def _as_written(self, node: Any) -> Tensor:
        """The value as the source computes it, in its dtypes."""
        if node.op == "get_attr":
            return self.tensors[str(node.target)].detach().to(node.meta["dtype"])
        args, kwargs = cast(Any, fx.map_arg((node.args, node.kwargs), self._as_written))
        with torch.no_grad():
            return cast(Tensor, node.target(*args, **kwargs))

    def unrounded(self, node: Any) -> Tensor:
        """The value as the source has it, or, computed, in float64. Not to be written to."""
        return self.tensors[str(node.target)].detach() if node.op == "get_attr" else self.exact(node)

    def rounded(self, node: Any, dtype: torch.dtype) -> Tensor:
        """The value in memory of its own, floating ones in ``dtype``."""
        if node.op == "get_attr":
            t = self.tensors[str(node.target)].detach()
        else:
            t = self.exact(node)
            self._exact.pop(node, None)
        t = t.to(dtype, copy=True) if t.is_floating_point() else t.clone()
        return t.contiguous()

    def is_worth_keeping(self, node: fx.Node) -> bool:
        """Tell whether the value is not much larger than what it is made of."""
        if node.op == "get_attr":
            return True
        sources = sum(self.tensors[str(n.target)].numel() for n in self._leaves(node))
        size = 1
        for dim in node.meta["shape"]:
            size *= dim
        return size <= max(4 * sources, _LARGE)

    def _leaves(self, node: fx.Node) -> set[fx.Node]:
        if node.op == "get_attr":
            return {node}
        return set().union(*(self._leaves(n) for n in node.all_input_nodes)) if node.all_input_nodes else set()


def _takes_steps(node: fx.Node) -> bool:
    """Tell whether a little more or less of a floating argument can give something quite different."""
    floating = [n for n in node.all_input_nodes if n.meta["dtype"].is_floating_point]
    if not floating:
        return False
    target: Any = node.target
    name = target._schema.name.partition("::")[2]
    rounds = name in _STEPS or target is torch.ops.aten.div.Tensor_mode or target is torch.ops.aten.div.Scalar_mode
    return rounds or not (node.meta["dtype"].is_floating_point or node.meta["dtype"].is_complex)


def _widens(node: fx.Node) -> bool:
    """Tell whether a cast is to a floating dtype that holds all that is cast: one that rounds is meant to."""
    before: Any = node.args[0]
    source, target = before.meta["dtype"], node.meta["dtype"]
    return bool(target.is_floating_point) and torch.promote_types(source, target) is target


class _Text:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def per_channel(value: Any, constants: Constants, shape: tuple[Any, ...]) -> Any:
    """A node or number that broadcasts over `shape` [N, C, ...] as one number a channel, or one in all; else None."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, fx.Node) or value not in constants.nodes or not value.meta["dtype"].is_floating_point:
        return None
    dims = value.meta["shape"]
    if len(dims) > len(shape):
        return None
    padded = (1,) * (len(shape) - len(dims)) + tuple(dims)
    if padded[0] != 1 or any(size != 1 for size in padded[2:]) or padded[1] not in (1, shape[1]):
        return None
    return value


def as_channels(value: Any, constants: Constants, channels: int) -> Tensor | float:
    """A `per_channel` value as float64 [C], or a number."""
    if not isinstance(value, fx.Node):
        return float(value)
    return constants.exact(value).reshape(-1).expand(channels)
