"""Stamp: the answer to "was this tensor changed", the only one in fastres."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def version(t: Tensor) -> int:
    """The count of writes to a tensor; -1 for an inference tensor, which has none."""
    return -1 if t.is_inference() else t._version


class Stamp:
    """Tensors as they are now: their identities, addresses and versions. It keeps none of them alive.

    A write through ``.data`` moves no version: snapshots say so, and nothing else may rely on a stamp.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[Any, Tensor]) -> None:
        self._seen = {name: (weakref.ref(t), _address(t), version(t)) for name, t in tensors.items()}

    def holds(self, now: Mapping[Any, Tensor] | None = None) -> bool:
        """Tell whether no tensor was replaced, added, removed, moved or written to since.

        Args:
            now: the tensors that have the names today; None: the same ones, in a call that cannot take long.
        """
        if now is not None and now.keys() != self._seen.keys():
            return False
        for name, (reference, address, count) in self._seen.items():
            t = reference()
            if t is None or (now is not None and now[name] is not t):
                return False
            if (count >= 0 and t._version != count) or (address and t.data_ptr() != address):
                return False
        return True


def _address(t: Tensor) -> int:
    plain = t.layout is torch.strided and not t.is_meta and type(t) in (Tensor, torch.nn.Parameter)
    return t.data_ptr() if plain else 0
