"""CUDA graphs of a frozen model, one for each input signature asked for: the launches are recorded once and replayed.

A replay writes into the recorded outputs, so a copy of them is returned; inputs are copied in. Weights are read where
they
are: ``refresh()`` writes into the same tensors, and moving the model drops the graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres.verify.runs import map_tensors, named_tensors

Signature = tuple[Any, ...]


def signature(inputs: Any) -> Signature:
    """What a graph is good for: names, shapes, strides, dtypes and devices of the tensors."""
    tensors = named_tensors(inputs, "")
    return tuple((name, t.shape, t.stride(), t.dtype, t.device) for name, t in tensors.items())


class Graphs:
    """The recorded graphs. A deep copy or a pickle of it is empty: graphs belong to one model's tensors."""

    def __init__(self) -> None:
        self._recorded: dict[Signature, tuple[Any, Any, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return Graphs()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def __len__(self) -> int:
        return len(self._recorded)

    def record(self, run: Callable[..., Any], inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """Record ``run(*args, **kwargs)`` for inputs of this signature, after three runs on a side stream."""
        static = map_tensors(inputs, lambda _, t: t.clone(), "")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                run(*static[0], **static[1])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            output = run(*static[0], **static[1])
        self._recorded[signature(inputs)] = graph, static, output

    def replay(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[bool, Any]:
        """(True, outputs) when there is a graph for these inputs, else (False, None)."""
        recorded = self._recorded.get(signature(inputs))
        if recorded is None:
            return False, None
        graph, static, output = recorded
        given: dict[str, Tensor] = named_tensors(inputs, "")
        for name, t in named_tensors(static, "").items():
            t.copy_(given[name])
        graph.replay()
        return True, map_tensors(output, lambda _, t: t.clone(), "")
