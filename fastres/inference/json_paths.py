"""Dotted paths of a saved network's modules and tensors: which a file may use, and putting things there.

``torch.fx`` writes a path into its code as attributes of ``self``: each part of it must be a plain name, and must find
what was put there rather than what a module has of its own.
"""

from __future__ import annotations

import keyword
import re
from functools import lru_cache
from typing import Any

from torch import Tensor, fx, nn

from fastres.inference.json_values import FrozenFileError, short

_PART = re.compile(r"[A-Za-z0-9_-]{1,200}", re.ASCII)
_DEPTH = 64


@lru_cache(maxsize=2)
def _taken(root: bool) -> frozenset[str]:
    """The attributes that a network has of its own, or a module within it."""
    return frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()) if root else nn.Module()))


def _is_part(part: str, root: bool) -> bool:
    plain = _PART.fullmatch(part) is not None and not part.startswith("__")
    return plain and not keyword.iskeyword(part) and part not in _taken(root)


def parts(path: Any) -> list[str]:
    """The parts of a path. Raises FrozenFileError for one that no file may use."""
    found = path.split(".") if isinstance(path, str) else []
    if not 0 < len(found) <= _DEPTH or not all(_is_part(part, i == 0) for i, part in enumerate(found)):
        raise FrozenFileError(f"{short(path)} is no path of a tensor or module")
    return found


class Paths:
    """Paths of a network -> those that a file uses for them: the same, but for names that a file may not use."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}
        self._used: set[str] = set()

    def __getitem__(self, path: str) -> str:
        if path not in self._found:
            plain = (re.sub(r"[^A-Za-z0-9_-]", "_", part)[:200] for part in path.split("."))
            name = ".".join(part if _is_part(part, i == 0) else f"m_{part}" for i, part in enumerate(plain))
            while name in self._used:
                name += "_"
            self._used.add(name)
            self._found[path] = name
        return self._found[path]


def container(network: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The plain module that holds what this path names, made where it is not there, and its name in it, which is free.

    Raises:
        FrozenFileError: no path, one through something else, or one that is taken.
    """
    *above, name = parts(path)
    at = network
    for part in above:
        child = at._modules.get(part)
        if child is None:
            if part in at._buffers or part in at._parameters:
                raise FrozenFileError(f"{short(path)} lies within a tensor")
            child = nn.Module()
            at.add_module(part, child)
        if type(child) is not nn.Module:
            raise FrozenFileError(f"{short(path)} lies within a {type(child).__name__}")
        at = child
    if name in at._modules or name in at._buffers or name in at._parameters:
        raise FrozenFileError(f"{short(path)} is there twice")
    return at, name


def put(network: nn.Module, path: str, value: Tensor | nn.Module, persistent: bool = True) -> None:
    """A parameter, buffer or module at its path. Raises FrozenFileError as ``container``."""
    at, name = container(network, path)
    if isinstance(value, nn.Module):
        at.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        at.register_parameter(name, value)
    else:
        at.register_buffer(name, value, persistent=persistent)
