"""Plain values as JSON and back: what a saved network's graph, settings and report are made of.

None, bools, integers, finite floats, strings and lists are themselves; everything else is an object with one key that
names its kind::

    {"slot": 3}  {"tuple": [1, 2]}  {"size": [1, 2]}  {"dict": [["k", 1]]}  {"slice": [0, null, 1]}  {"float": "inf"}
    {"dtype": "float32"}  {"device": "cpu"}  {"layout": "strided"}  {"memory_format": "channels_last"}

Nothing else is written and nothing else is read: no class, no module and no attribute is looked up by a name from a
file.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import torch

from fastres.graph.steps import Slot

MAX_DEPTH = 32
_REPR = reprlib.Repr()
_REPR.maxstring = 80
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:[0-9]{1,3})?", re.ASCII)


def _by_name(*values: Any) -> dict[str, Any]:
    return {str(value).removeprefix("torch."): value for value in values}


DTYPES = _by_name(
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_NAMED: dict[str, dict[str, Any]] = {
    "dtype": DTYPES,
    "layout": _by_name(torch.strided),
    "memory_format": _by_name(
        torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format
    ),
    "float": _by_name(math.inf, -math.inf, math.nan),
}


class FrozenFileError(ValueError):
    """A file that is not a frozen network, or a damaged, tampered or newer one; or a network that no file can hold."""


class Values:
    """Plain values to JSON and back.

    Args:
        moved: a device in the file -> the device to use instead.
    """

    def __init__(self, moved: Mapping[torch.device, torch.device] | None = None) -> None:
        self.moved = moved or {}

    def encode(self, value: Any, depth: int = 0) -> Any:
        """The JSON of a value. Raises FrozenFileError for one that is not plain, or nested too deep."""
        _check_depth(depth)
        kind = type(value)
        if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
            return value
        if kind is list:
            return [self.encode(v, depth + 1) for v in value]
        if kind is tuple or kind is torch.Size:
            return {"tuple" if kind is tuple else "size": [self.encode(v, depth + 1) for v in value]}
        if kind is dict:
            return {"dict": [[self.encode(k, depth + 1), self.encode(v, depth + 1)] for k, v in value.items()]}
        if kind is slice:
            return {"slice": [self.encode(v, depth + 1) for v in (value.start, value.stop, value.step)]}
        if kind is Slot:
            return {"slot": value.index}
        if kind is torch.device and _DEVICE.fullmatch(str(value)):
            return {"device": str(value)}
        for word, table in _NAMED.items():
            if kind is type(next(iter(table.values()))) and (name := str(value).removeprefix("torch.")) in table:
                return {word: name}
        return self.encode_other(value, depth)

    def encode_other(self, value: Any, depth: int) -> Any:
        """The JSON of a value of another kind: here there is none."""
        kind = type(value)
        raise FrozenFileError(f"{short(value)} of type {kind.__module__}.{kind.__qualname__} is no plain value")

    def decode(self, data: Any, depth: int = 0) -> Any:
        """The value of JSON. Raises FrozenFileError for JSON that ``encode`` does not write."""
        _check_depth(depth)
        if data is None or isinstance(data, bool | int | float | str):
            return data
        if isinstance(data, list):
            return [self.decode(v, depth + 1) for v in data]
        word, content = next(iter(data.items())) if len(data) == 1 else ("", None)
        if isinstance(content, list):
            if word == "tuple" or word == "size":
                return (tuple if word == "tuple" else torch.Size)(self.decode(v, depth + 1) for v in content)
            if word == "dict":
                return {self.decode(k, depth + 1): self.decode(v, depth + 1) for k, v in content}
            if word == "slice":
                return slice(*(self.decode(v, depth + 1) for v in content))
        if word == "slot" and type(content) is int:
            return Slot(content)
        if isinstance(content, str):
            if word == "device" and _DEVICE.fullmatch(content):
                return self.moved.get(torch.device(content), torch.device(content))
            if content in _NAMED.get(word, ()):
                return _NAMED[word][content]
        return self.decode_other(word, content, depth)

    def decode_other(self, word: str, content: Any, depth: int) -> Any:
        """The value of another kind: here there is none."""
        raise FrozenFileError(f"{short({word: content})} is no plain value")


def is_plain(value: Any) -> bool:
    """Tell whether a file can hold the value."""
    try:
        Values().encode(value)
    except FrozenFileError:
        return False
    return True


def dump(document: Any) -> str:
    """JSON text of encoded data: ASCII, without spaces."""
    return json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def parse(text: str) -> dict[str, Any]:
    """The object that is JSON text.

    Raises:
        FrozenFileError: not JSON, or no object; a key twice in an object; nested too deep for Python's parser.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise FrozenFileError("its JSON is nested too deep") from error
    except json.JSONDecodeError as error:
        raise FrozenFileError(f"its JSON is damaged: {error}") from error
    if not isinstance(document, dict):
        raise FrozenFileError("its JSON describes no network")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FrozenFileError("its JSON has a key twice in one object")
    return found


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FrozenFileError(f"a value is nested more than {MAX_DEPTH} deep")


def short(value: Any) -> str:
    """A few words of a value from a file, for a message: however large or deep it is."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
