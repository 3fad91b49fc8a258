"""Captured: one call of a network as a graph, with what a call must be like to be answered by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastres.graph.signature import Call

Dims = tuple["int | str", ...]  # a size, or the name of one that may vary


@dataclass
class Captured:
    """A call as a graph.

    Attributes:
        graph: placeholders for the tensors of the call, `get_attr` of the source's tensors by name and of `constants`,
            ATen calls, an output of a flat tuple. `meta["shape"]` (Dims) and `meta["dtype"]` of every tensor,
            `meta["where"]` the module that made it.
        inputs: for every tensor of the call its dims and dtype.
        outputs: the tree that the flat outputs are leaves of.
        tree, plain: the call's other arguments, see `Call`.
        constants: tensors that the source's forward makes.
        batch: what the varying size was in the capture.
        notes: for the report.
        dtype: what the source was in; tensors of the graph in another floating dtype are so because its code says so.
    """

    graph: fx.Graph
    inputs: list[tuple[Dims, torch.dtype]]
    outputs: TreeSpec
    tree: TreeSpec
    plain: tuple[tuple[int, Any], ...]
    constants: dict[str, Tensor]
    batch: int
    notes: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    def takes(self, call: Call) -> bool:
        """Tell whether the graph is of calls like this one: the same tree and constants, tensors of these sizes."""
        if len(call.tensors) != len(self.inputs) or call.plain != self.plain:
            return False
        if call.tree is not self.tree and call.tree != self.tree:
            return False
        sizes: dict[str, int] = {}
        for t, (dims, dtype) in zip(call.tensors, self.inputs, strict=True):
            if t.ndim != len(dims) or (t.dtype != dtype and not (t.is_floating_point() and dtype.is_floating_point)):
                return False
            for size, dim in zip(t.shape, dims, strict=True):
                if size != (dim if isinstance(dim, int) else sizes.setdefault(dim, size)):
                    return False
        return True

    def describe(self) -> str:
        """The sizes that it takes: `[N, 3, 224, 224]`."""
        letters: dict[Any, str] = dict(zip(self._varying(), "NMKLJ", strict=False))
        return ", ".join("[" + ", ".join(str(letters.get(d, d)) for d in dims) + "]" for dims, _ in self.inputs)

    def _varying(self) -> list[str]:
        return list(dict.fromkeys(dim for dims, _ in self.inputs for dim in dims if isinstance(dim, str)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        return self  # never written to

    def __getstate__(self) -> dict[str, Any]:
        """Without the graph, which does not pickle and serves the source alone, and pickles have none."""
        trees = {name: _structure(spec) for name, spec in (("tree", self.tree), ("outputs", self.outputs))}
        return {**self.__dict__, **trees, "graph": None, "constants": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        trees = {name: tree_flatten(state[name])[1] for name in ("tree", "outputs")}
        self.__dict__.update({**state, **trees, "graph": fx.Graph()})


def _structure(spec: TreeSpec) -> Any:
    """A structure that `tree_flatten` makes that tree of: a TreeSpec itself does not pickle without a warning."""
    return tree_unflatten(list(range(spec.num_leaves)), spec)
