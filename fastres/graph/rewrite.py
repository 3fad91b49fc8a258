"""A captured call and the source's tensors become a Graph: normalized, fused, constants in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx

import fastres.ops  # noqa: F401  the operators that fusions write
from fastres.graph.captured import Captured
from fastres.graph.fusions import Weights, fuse
from fastres.graph.normalize import normalize
from fastres.graph.rows import FreezeRow
from fastres.graph.steps import Graph, of_fx


class Rewritten(NamedTuple):
    graph: Graph
    constants: dict[str, Tensor]  # in the graph's order
    rows: list[FreezeRow]  # what became of each layer


def rewrite(
    captured: Captured, tensors: Mapping[str, Tensor], dtype: torch.dtype, shared: Mapping[str, Tensor] | None = None
) -> Rewritten:
    """The network of `captured` with BN folded into convolutions in float64, and a row for each that was one.

    Args:
        captured: normalized in place on the first call, not changed otherwise.
        tensors: the source's parameters and buffers, and the capture's constants, by name.
        dtype: what the network computes in.
        shared: constants of another network of the same source, by what they are made of; taken where they are equal.
    """
    normalize(captured.graph)
    graph = fx.Graph()
    graph.output(graph.graph_copy(captured.graph, {}))

    def dtype_of(node: fx.Node) -> torch.dtype:
        own: torch.dtype = node.meta["dtype"]
        return dtype if own is captured.dtype else own

    weights = Weights(graph, tensors, dtype_of, dtype, folds=True, shared=shared)
    fuse(weights)
    rows = weights.all_rows(max(captured.batch, 1))
    weights.materialize()
    made = of_fx(graph, weights.made_of)
    return Rewritten(made, {name: weights.made[name] for name in made.constants}, rows)
