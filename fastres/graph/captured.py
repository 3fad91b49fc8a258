"""Captured: one call of a network as a graph, with what a call must be like to be answered by it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastres.graph.questions import hold, terms_of
from fastres.graph.signature import Call

_WORD = re.compile(r"[A-Za-z_]\w*")
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
        questions: about the sizes that vary, see questions.py; a call with another answer to one needs another graph.
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
    questions: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self._batches = {dims[0] for dims, _ in self.inputs if dims}
        names = {dim for dims, _ in self.inputs for dim in dims if isinstance(dim, str)}
        self._terms = terms_of(self.questions, names)
        self._answered: dict[tuple[int, ...], bool] = {}  # sizes that vary -> whether the questions hold

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
        # an image of one pixel is another network's: it broadcasts; a batch of one was compared with the source's
        return all([size > 1 for dim, size in sizes.items() if dim not in self._batches]) and self._answers(sizes)

    def _answers(self, sizes: dict[str, int]) -> bool:
        """Tell whether the code's questions have the same answers for these sizes."""
        if not self._terms:
            return True
        asked = tuple(sizes.values())
        if torch.compiler.is_dynamo_compiling() or not all(type(size) is int for size in asked):
            return hold(self._terms, sizes)
        known = self._answered.get(asked)
        if known is None:
            known = hold(self._terms, sizes)
            self._answered = {**dict([*self._answered.items()][-999:]), asked: known}  # replaced: threads read it
        return known

    def describe(self) -> str:
        """The sizes that it takes: `[N, 3, H, W]`, and what is asked of them."""
        batches = dict.fromkeys(dims[0] for dims, _ in self.inputs if dims and isinstance(dims[0], str))
        others = [dim for dims, _ in self.inputs for dim in dims if isinstance(dim, str) and dim not in batches]
        letters: dict[Any, str] = dict(zip(batches, "NMKLJ", strict=False))
        letters |= dict(zip(dict.fromkeys(others), "HWDEFGIJPQ", strict=False))
        shapes = ", ".join("[" + ", ".join(str(letters.get(d, d)) for d in dims) + "]" for dims, _ in self.inputs)
        asked = ", ".join(_WORD.sub(lambda m: letters.get(m[0], m[0]), question) for question in self.questions[:4])
        return f"{shapes} where {asked}" if asked else shapes

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        return self  # never written to

    def __getstate__(self) -> dict[str, Any]:
        """Without the graph, which does not pickle and serves the source alone, and pickles have none."""
        trees = {name: _structure(spec) for name, spec in (("tree", self.tree), ("outputs", self.outputs))}
        return {**self.__dict__, **trees, "graph": None, "constants": {}, "_answered": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        trees = {name: tree_flatten(state[name])[1] for name in ("tree", "outputs")}
        self.__dict__.update({**state, **trees, "graph": fx.Graph()})


def _structure(spec: TreeSpec) -> Any:
    """A structure that `tree_flatten` makes that tree of: a TreeSpec itself does not pickle without a warning."""
    return tree_unflatten(list(range(spec.num_leaves)), spec)
