"""Planned memory: outputs of a plan's calls in one piece of memory, each place taken again after its last reader.

What the system hands out anew it has to clear, and what the threads of a service allocate in changing sizes leaves
holes between: 1.3 GB, of ResNet-18 at changing batch and image sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_ALIGNED = 256  # bytes
_KEPT = 512 << 20  # bytes of the memory that a network keeps between calls


class Wish(NamedTuple):
    """An output that wants a place: its tensor's meta data, the first step that it must not change in, and the last."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    first: int
    last: int

    @property
    def bytes(self) -> int:
        """What a dense tensor of that size takes."""
        return -(-torch.Size(self.size).numel() * self.dtype.itemsize // _ALIGNED) * _ALIGNED


def place(wishes: Sequence[Wish]) -> tuple[list[int], int]:
    """The offset of each and the size of all, in bytes: the largest first, each where it is free long enough."""
    offsets = [0] * len(wishes)
    placed: list[int] = []
    for i in sorted(range(len(wishes)), key=lambda i: -wishes[i].bytes):
        wish, offset = wishes[i], 0
        for j in sorted(placed, key=lambda j: offsets[j]):
            other = wishes[j]
            apart = other.last < wish.first or wish.last < other.first
            if not apart and offset + wish.bytes > offsets[j]:
                offset = max(offset, offsets[j] + other.bytes)
        offsets[i] = offset
        placed.append(i)
    return offsets, max((offsets[i] + wishes[i].bytes for i in placed), default=0)


class Places(NamedTuple):
    """The outputs of a plan that have a place, and the bytes that they take."""

    wishes: tuple[Wish, ...]
    offsets: tuple[int, ...]
    size: int

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors, in a one-dimensional tensor of bytes."""
        return [
            memory[at : at + w.bytes].view(w.dtype).as_strided(w.size, w.stride, at // w.dtype.itemsize)
            for w, at in zip(self.wishes, self.offsets, strict=True)
        ]


class _Arena:
    def __init__(self, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8)
        self.views: WeakKeyDictionary[Any, list[Tensor]] = WeakKeyDictionary()


class Arenas:
    """The memory of an executor's calls: one piece for each call at a time, kept for the next up to a bound."""

    def __init__(self) -> None:
        self._free: list[_Arena] = []
        self._largest = 0  # bytes: all are as large as any call needed, so that few are made anew

    def take(self, plan: Any, places: Places) -> tuple[_Arena, list[Tensor]]:
        """A piece of memory for a call by `plan`, and the tensors in it; give it back when the call is over."""
        try:
            arena = self._free.pop()  # one operation: other threads take theirs
        except IndexError:
            arena = None
        views = None if arena is None else arena.views.get(plan)
        if arena is None or views is None:
            with torch.inference_mode(False):
                if arena is None or arena.memory.numel() < places.size:
                    del arena  # before there is another
                    self._largest = max(self._largest, places.size)
                    arena = _Arena(self._largest)
                views = arena.views[plan] = places.views(arena.memory)
        return arena, views

    def give_back(self, arena: _Arena) -> None:
        """Keep it for the next call, unless too much is kept."""
        if arena.memory.numel() + sum(other.memory.numel() for other in list(self._free)) <= _KEPT:
            self._free.append(arena)
