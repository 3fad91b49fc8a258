"""CUDA graphs of a frozen model, one for each input signature asked for: the launches are recorded once and replayed.

A replay writes into the recorded outputs, so a copy of them is returned; inputs are copied in. Weights are read where
they are: ``refresh()`` writes into the same tensors, and moving the model drops the graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Graphs:
    """The recorded graphs. A deep copy or a pickle of it is empty: graphs belong to one model's tensors."""

    def __init__(self) -> None:
        self._recorded: dict[Any, tuple[Any, list[Tensor], list[Any]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return Graphs()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def __len__(self) -> int:
        return len(self._recorded)

    def record(self, run: Callable[..., list[Any]], inputs: Sequence[Tensor]) -> None:
        """Record ``run(*inputs)`` for inputs of this signature, after three runs on a side stream."""
        static = [t.clone() for t in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                run(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            outputs = run(*static)
        self._recorded[_signature(inputs)] = graph, static, outputs

    def replay(self, inputs: Sequence[Tensor]) -> tuple[bool, Any]:
        """(True, outputs) when there is a graph for these inputs, else (False, None)."""
        recorded = self._recorded.get(_signature(inputs))
        if recorded is None:
            return False, None
        graph, static, outputs = recorded
        for t, given in zip(static, inputs, strict=True):
            t.copy_(given)
        graph.replay()
        return True, [t.clone() if isinstance(t, Tensor) else t for t in outputs]


def _signature(inputs: Sequence[Tensor]) -> Any:
    """The signature that a graph is good for: shapes, strides, dtypes and devices."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
