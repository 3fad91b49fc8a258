"""The executor of one network: CUDA graphs where recorded, else programs, else its modules; and its exact twin."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import torch
from torch import Tensor, nn

from fastres.inference.capture import Captured
from fastres.inference.conv import frozen_convs
from fastres.inference.graphs import Graphs
from fastres.inference.program import Programs
from fastres.inference.recipe import source_tensors
from fastres.ops._autograd import is_plain_eager
from fastres.verify.runs import named_tensors

VARIANTS = 8  # other calls that a frozen model keeps a network for


class Engine:
    """Runs a network. A deep copy or a pickle of it is a new one: what it has recorded belongs to its own tensors."""

    def __init__(self) -> None:
        self.graphs = Graphs()
        self.programs = Programs()
        self._twin: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return Engine()

    def __reduce__(self) -> tuple[type[Engine], tuple[()]]:
        return Engine, ()

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``module(*args, **kwargs)`` without gradients."""
        with torch.no_grad():
            if _is_not_finite((args, kwargs)):
                return self.exact(module)(*args, **kwargs)
            if len(self.graphs):
                replayed, output = self.graphs.replay((args, kwargs))
                if replayed:
                    return output
            return self.programs.run(module, args, kwargs)

    def exact(self, module: nn.Module) -> nn.Module:
        """A twin that passes NaN on, as oneDNN's ReLU does not: it shares the tensors, made when first needed."""
        tensors = source_tensors(module)
        twin = self._twin
        if twin is None or any(t is not tensors[name] for name, t in source_tensors(twin).items()):
            twin = copy.deepcopy(module, {id(t): t for t in tensors.values()})
            for conv in frozen_convs(twin):
                conv.exact = True
            self._twin = twin
        return twin


def _is_not_finite(inputs: Any) -> bool:
    """Whether a tensor on a CPU is not finite: then its sum is not (nor is, rarely, that of a finite one: no harm)."""
    tensors = inputs[0] if not inputs[1] and all(isinstance(t, Tensor) for t in inputs[0]) else None
    for t in tensors if tensors is not None else named_tensors(inputs, "").values():
        if t.is_floating_point() and t.device.type == "cpu" and is_plain_eager(t):
            if not math.isfinite(float(t.detach().sum())):
                return True
    return False


class Variant:
    """The network of calls unlike the example: of another image size, or with other arguments."""

    def __init__(self, captured: Captured, module: nn.Module) -> None:
        self.captured, self.module, self.engine = captured, module, Engine()


class Variants:
    """A frozen model's other networks, newest last. A deep copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self.found: list[Variant] = []
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Variants:
        return Variants()

    def __reduce__(self) -> tuple[type[Variants], tuple[()]]:
        return Variants, ()

    def add(self, variant: Variant) -> None:
        self.found = [*self.found[-VARIANTS + 1 :], variant]
