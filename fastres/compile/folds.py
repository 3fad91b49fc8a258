"""The tensors that a graph makes of weights, for whichever weights it is called on, made again when those change.

Blocks of one class share a compiled graph, so there is a set of made tensors for each set of weights. A set is used
while its weights are the same objects, at the same addresses, with the same version counters. A write through ``.data``
moves no counter: on a CPU one element of each weight is compared as well, which no step of an optimizer and no moving
average leaves as it was; on a GPU that would wait for the device in every call, and is not done.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Make = Callable[[Sequence[Tensor]], "list[Tensor] | None"]


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(t: Tensor) -> Tensor:
    """The element in the middle, [1], as an integer, so that NaN equals itself; a view."""
    return t.detach()[tuple(n // 2 for n in t.shape)].view(1).view(_BITS[t.itemsize])


class Made:
    """Made tensors, and what they were made of."""

    def __init__(self, weights: Sequence[Tensor], tensors: list[Tensor] | None) -> None:
        self.tensors = tensors
        self.network: Any = None  # what runs on them
        self.references: list[Any] = []
        self.look(weights)

    def look(self, weights: Sequence[Tensor]) -> None:
        """Remember the weights as they are."""
        self.counted = [not t.is_inference() for t in weights]
        self.state = self._state(weights)
        probes = [_bits(t) for t in weights if t.is_cpu and t.numel() and t.itemsize in _BITS]
        self.probes = [[p for p in probes if p.dtype is dtype] for dtype in {p.dtype for p in probes}]
        self.values = [torch.cat(probes) for probes in self.probes]

    def _state(self, weights: Sequence[Tensor]) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t._version if counted else -1) for t, counted in zip(weights, self.counted, strict=True)]

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether nothing was written to the weights since."""
        if self._state(weights) != self.state:
            return False
        return all(
            torch.equal(torch.cat(probes), values) for probes, values in zip(self.probes, self.values, strict=True)
        )


class Folds:
    """Sets of made tensors by the weights that they are made of; a set goes with its weights.

    Args:
        places: of the weights among a call's arguments.
        make: the tensors for some weights, or None where they cannot be made.
    """

    def __init__(self, places: Sequence[int], make: Make) -> None:
        self.places, self.make = tuple(places), make
        self._sets: dict[tuple[int, ...], Made] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sets)

    def of(self, arguments: Sequence[Any]) -> Made:
        """The set for a call with these arguments; its tensors are None where they cannot be made."""
        weights = [arguments[place] for place in self.places]
        key = tuple(map(id, weights))
        found = self._sets.get(key)
        if found is not None and found.holds(weights):
            return found
        with self._lock, torch.inference_mode(False), torch.no_grad():
            found = self._sets.get(key)
            if found is None:
                return self.put(weights, self.make(weights))
            if not found.holds(weights):
                _refill(found, self.make(weights))
                found.network = None
                found.look(weights)
            return found

    def put(self, weights: Sequence[Tensor], tensors: list[Tensor] | None) -> Made:
        """Keep these tensors for these weights; not under inference mode."""
        key = tuple(map(id, weights))
        sets = weakref.ref(self)

        def drop(_: Any) -> None:
            owner = sets()
            if owner is not None:
                owner._sets.pop(key, None)

        found = Made(weights, tensors)
        found.references = [weakref.ref(t, drop) for t in weights]
        self._sets[key] = found
        return found


def _refill(found: Made, tensors: list[Tensor] | None) -> None:
    """New values in the old memory: CUDA graphs know it by its address."""
    if tensors is None or found.tensors is None:
        found.tensors = tensors
        return
    for t, value in zip(found.tensors, tensors, strict=True):
        t.copy_(value)
