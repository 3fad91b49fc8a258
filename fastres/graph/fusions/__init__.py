"""Fusions: patterns of a normalized graph, each rewritten as one call of a fused operator.

A fusion is one file of this folder, which is all that names it: the file holds `FUSION`, a Fusion. Its `match` looks at
a node and whatever is around it, users and operands, and returns what it found or None; its `write` puts the new nodes
in place of those and adds a row to the report. Fusions are tried one after another, by `order`, over all nodes.

The weights are either the caller's for good (freeze: folded in float64 and kept as new constants) or read in every call
(torch.compile: nothing is made of them, scale and shift are computed in the graph); see `Weights`.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fastres.graph.constants import Constants
from fastres.graph.cost import operator_name, step_cost
from fastres.graph.normalize import aten
from fastres.graph.rows import FreezeRow


@dataclass(frozen=True)
class Fusion:
    """One pattern.

    Attributes:
        name: of its file.
        order: smaller ones are tried first; a convolution takes what it can before a BN or a sum stands alone.
        match: a node and the weights -> what was found around it, or None. Changes nothing.
        write: what was found and the weights -> rewrites the graph around it.
    """

    name: str
    order: int
    match: Callable[[fx.Node, Weights], Any]
    write: Callable[[Any, Weights], None]


class Weights:
    """The constants of a graph, and what fusions may make of them.

    Args:
        graph: normalized; `meta["shape"]`, `meta["dtype"]` and `meta["size"]` on its nodes.
        tensors: of its `get_attr` nodes, by name.
        dtype_of: what a floating node is computed in.
        dtype: what most of the network computes in.
        folds: make new constants; False: read the tensors in every call.
        shared: constants of another graph of the same source, with what they are made of: taken where they are equal.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, Tensor],
        dtype_of: Callable[[fx.Node], torch.dtype],
        dtype: torch.dtype,
        folds: bool,
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.graph, self.folds, self.dtype, self.dtype_of = graph, folds, dtype, dtype_of
        self.constants = Constants(graph, tensors)
        self.rows: dict[fx.Node, FreezeRow] = {}  # by the node that stands for the step
        self.made: dict[str, Tensor] = {}  # the constants of the finished graph, by name
        self.made_of: dict[str, str] = {}
        self._names: dict[str, str] = {}  # what a constant is made of -> its name
        self._shared = shared or {}

    def has(self, made_of: str) -> bool:
        """Tell whether there is such a constant already, here or in the graph to share with."""
        return made_of in self._names or made_of in self._shared

    def put(self, name: str, made_of: str, make: Callable[[], Tensor]) -> fx.Node:
        """A `get_attr` node of a new constant at the graph's insertion point; an equal one is made once.

        Args:
            name: a dotted name; where another constant has it, a number follows.
            made_of: equal lines stand for equal values.
        """
        if made_of not in self._names:
            unique = self._unique(name)
            self.made[unique] = self._shared[made_of] if made_of in self._shared else make()
            self._names[made_of], self.made_of[unique] = unique, made_of
        node = self.graph.get_attr(self._names[made_of])
        t = self.made[self._names[made_of]]
        node.meta = {"shape": tuple(t.shape), "size": tuple(t.shape), "dtype": t.dtype}
        self.constants.finish(node)
        return node

    def kept(self, node: Any, name: str, dtype: torch.dtype) -> Any:
        """A constant as a new one in `dtype`, where constants are made; else the node itself. None is None."""
        if node is None or not self.folds:
            return node
        return self.put(name, f"{self.constants.key(node)} {dtype}", lambda: self.constants.rounded(node, dtype))

    def replace(self, nodes: list[fx.Node], new: fx.Node, row: FreezeRow) -> None:
        """`new` takes the place of a pattern's nodes, whose last one gave its output; the row gets the costs."""
        last = nodes[-1]
        flops, moved, weights = step_cost(nodes, self.dtype, self.constants.nodes)
        tensor = {key: last.meta[key] for key in ("shape", "size", "dtype", "where") if key in last.meta}
        new.meta |= tensor | {"name": row.name, "row": True}
        self.rows[new] = replace(row, flops=flops, bytes=moved, weights=row.weights or weights)
        if new is last:
            return
        last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        for node in reversed(nodes):
            if node is not new and not node.users:
                self.graph.erase_node(node)

    def materialize(self) -> None:
        """Constants that the remaining operators read become new ones, computed once where that is not much larger."""
        in_norms = {n for node in self.graph.nodes if node.target is aten.batch_norm.default for n in node.args[1:5]}
        recomputed: set[fx.Node] = set()  # too large to keep: computed in every call
        for node in reversed([node for node in self.graph.nodes if node in self.constants.nodes]):
            readers = [user for user in node.users if user not in self.constants.nodes or user in recomputed]
            if self.constants.is_finished(node) or not readers:
                continue
            if not self.constants.is_worth_keeping(node):
                recomputed.add(node)
                continue
            dtype = self.dtype_of(node)
            if node in in_norms and dtype is not torch.float64:
                dtype = torch.float32
            name = str(node.target) if node.op == "get_attr" else "constant"
            with self.graph.inserting_before(node):
                new = self.kept(node, name, dtype)
            node.replace_all_uses_with(new, delete_user_cb=readers.__contains__)
        self.graph.eliminate_dead_code()

    def all_rows(self, batch: int) -> list[FreezeRow]:
        """The rows in the order of the steps, then one for each kind of operator that stays; costs for one image."""
        rows = [self.rows[node] for node in self.graph.nodes if node in self.rows]
        others: dict[str, list[tuple[int, int, int]]] = {}
        for node in self.graph.nodes:
            stays = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
            if stays and node not in self.constants.nodes and "row" not in node.meta and "size" in node.meta:
                cost = step_cost([node], self.dtype, self.constants.nodes)
                others.setdefault(operator_name(node), []).append(cost)
        for name, costs in others.items():
            flops, moved, weights = (sum(cost[i] for cost in costs) for i in range(3))
            rows.append(FreezeRow(name, "other", f"{len(costs)} call(s)", "", "", (), flops, moved, weights))
        return [replace(row, flops=row.flops // batch, bytes=row.bytes // batch) for row in rows]

    def _unique(self, name: str) -> str:
        """A dotted name that is no other constant's, and lies neither above nor within another's."""
        candidate = name = name or "constant"
        for count in itertools.count(2):
            within = any(candidate.startswith(f"{taken}.") for taken in self.made)
            if not within and not any(taken == candidate or taken.startswith(f"{candidate}.") for taken in self.made):
                break
            path, dot, leaf = name.rpartition(".")
            candidate = f"{path}_{count}.{leaf}" if dot else f"{name}_{count}"
        return candidate


def _find() -> list[Fusion]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return sorted((module.FUSION for module in modules), key=lambda fusion: fusion.order)


def fuse(weights: Weights) -> None:
    """Rewrite the graph of `weights` by every fusion, in place."""
    for fusion in _find():
        for node in list(weights.graph.nodes):
            if node.op == "call_function" and not node._erased and node not in weights.constants.nodes:
                found = fusion.match(node, weights)
                if found is not None:
                    fusion.write(found, weights)
