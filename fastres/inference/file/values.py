"""Plain values as JSON and back: what a saved network's graph, settings and report are made of.

None, bools, integers of 64 bits, finite floats, strings and lists are themselves; everything else is an object with one
key that names its kind::

    {"slot": 3}  {"tuple": [1, 2]}  {"dict": [["k", 1]]}  {"slice": [0, null, 1]}  {"float": "inf"}
    {"dtype": "float32"}  {"device": "cpu"}  {"layout": "strided"}  {"memory_format": "channels_last"}

Nothing else is written and nothing else is read: no class, no module and no attribute is looked up by a name from a
file. ``parse`` is a strict reader of JSON: no duplicate keys, no NaN, no endless nesting.
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

INT64 = 2**63
MAX_DEPTH = 32
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:[0-9]{1,3})?", re.ASCII)

DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_LAYOUTS = {"strided": torch.strided}
_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
}
_WORDS: dict[str, tuple[type, Mapping[str, Any]]] = {
    "dtype": (torch.dtype, DTYPES),
    "layout": (torch.layout, _LAYOUTS),
    "memory_format": (torch.memory_format, _FORMATS),
    "float": (float, {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}),
}


class FrozenFileError(ValueError):
    """A file that is not a frozen network, or a damaged, tampered or newer one; or a network that no file can hold."""


def encode(value: Any, depth: int = 0) -> Any:
    """The JSON of a plain value, nested as it likes up to MAX_DEPTH.

    Raises:
        FrozenFileError: a value of another kind.
    """
    if depth > MAX_DEPTH:
        raise FrozenFileError(f"a value is nested more than {MAX_DEPTH} deep")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int and -INT64 <= value < INT64:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is Slot:
        return {"slot": value.index}
    if kind is list:
        return [encode(v, depth + 1) for v in value]
    if kind is tuple or kind is torch.Size:
        return {"tuple": [encode(v, depth + 1) for v in value]}
    if kind is dict:
        return {"dict": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]}
    if kind is slice:
        return {"slice": [encode(v, depth + 1) for v in (value.start, value.stop, value.step)]}
    if kind is torch.device and _DEVICE.fullmatch(str(value)):
        return {"device": str(value)}
    for word, (its_kind, _) in _WORDS.items():
        if kind is its_kind and its_kind is not float:
            name = str(value).removeprefix("torch.")
            if name in _WORDS[word][1]:
                return {word: name}
    raise FrozenFileError(f"{short(value)} of type {kind.__module__}.{kind.__qualname__} is no plain value")


class Decoder:
    """Plain values from JSON.

    Args:
        slots: how many slots values may refer to.
        moved: a device in the file -> the device to use instead.
    """

    def __init__(self, slots: int = 0, moved: Mapping[torch.device, torch.device] | None = None) -> None:
        self.slots = slots
        self.moved = moved or {}

    def __call__(self, data: Any, depth: int = 0) -> Any:
        """The value. Raises FrozenFileError for JSON that ``encode`` does not write."""
        if depth > MAX_DEPTH:
            raise FrozenFileError(f"a value is nested more than {MAX_DEPTH} deep")
        if data is None or isinstance(data, bool | int | float | str):
            return data
        if isinstance(data, list):
            return [self(v, depth + 1) for v in data]
        if not isinstance(data, dict) or len(data) != 1:
            raise FrozenFileError(f"{short(data)} is no plain value")
        ((word, content),) = data.items()
        if word == "slot":
            if type(content) is not int or not 0 <= content < self.slots:
                raise FrozenFileError(f"{short(content)} is no slot")
            return Slot(content)
        if word == "tuple" and isinstance(content, list):
            return tuple(self(v, depth + 1) for v in content)
        if word == "dict" and isinstance(content, list):
            return self._dict(content, depth)
        if word == "slice" and isinstance(content, list) and len(content) == 3:
            return slice(*(self(v, depth + 1) for v in content))
        if word == "device":
            device = device_of(content)
            return self.moved.get(device, device)
        if word in _WORDS and isinstance(content, str) and content in _WORDS[word][1]:
            return _WORDS[word][1][content]
        raise FrozenFileError(f"{short(data)} is no plain value")

    def _dict(self, content: list[Any], depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for pair in content:
            if not isinstance(pair, list) or len(pair) != 2:
                raise FrozenFileError(f"{short(pair)} is no key and value")
            key, value = (self(v, depth + 1) for v in pair)
            if not isinstance(key, str | int | float | bool | None):
                raise FrozenFileError(f"{short(key)} is no key")
            found[key] = value
        return found


def device_of(name: Any) -> torch.device:
    """The device of this name, such as "cuda:0"; one that this machine lacks has one too."""
    if not isinstance(name, str) or not _DEVICE.fullmatch(name):
        raise FrozenFileError(f"{short(name)} is no device")
    return torch.device(name)


def dump(document: Any) -> str:
    """JSON text of encoded data: ASCII, without spaces."""
    return json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def parse(text: str) -> Any:
    """The data of JSON text, read strictly.

    Raises:
        FrozenFileError: not JSON; a key twice in an object; NaN, infinity or an integer beyond 64 bits; nested too
            deep for Python's parser.
    """
    try:
        return json.loads(text, parse_int=_int, parse_float=_float, parse_constant=_constant, object_pairs_hook=_unique)
    except FrozenFileError:
        raise
    except RecursionError as error:
        raise FrozenFileError("its JSON is nested too deep") from error
    except ValueError as error:
        raise FrozenFileError(f"its JSON is damaged: {error}") from error


def _int(text: str) -> int:
    if len(text) > 20 or not -INT64 <= (number := int(text)) < INT64:
        raise FrozenFileError(f"the integer {text[:24]} in its JSON is beyond 64 bits")
    return number


def _float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise FrozenFileError(f"the number {text[:24]} in its JSON is infinite")
    return number


def _constant(text: str) -> float:
    raise FrozenFileError(f"{text} in its JSON is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FrozenFileError("its JSON has a key twice in one object")
    return found


def short(value: Any) -> str:
    """A few words of a value from a file, for a message: however large or deep it is."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
