"""The call of a network as JSON: its signature, and the structures that its inputs and outputs are nested in.

A structure is written as the value that it is, with a Slot for each tensor in it; next to the plain values there are::

    {"OrderedDict": [["k", 1]]}
    {"result": ["max", 1, 2]}                           of an operator with several results, such as torch.max
    {"namedtuple": [module, name, ["field", 1], ...]}   the class of that name if its module is loaded and it has these
                                                        fields, else a new one like it
    {"dataclass": [module, name, ["field", 1], ...]}    one that this process has registered as a pytree node

PyTorch's own ``treespec_loads`` is not used: it imports whatever module the JSON names. Here a class is only ever one
that this process has already. The outputs of Hugging Face's models are registered by importing one module, whose name
is a constant here; for other dataclasses the error says what to import.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import inspect
import sys
from typing import Any

from torch.utils import _pytree

from fastres.inference.file.values import FrozenFileError, Values, is_plain, short

_OUTPUTS = "transformers.modeling_outputs"
_RETURNS = "torch.return_types"


class Trees(Values):
    """Plain values and structures to JSON and back."""

    def encode_other(self, value: Any, depth: int) -> Any:
        """The JSON of a structure. Raises FrozenFileError for one that no file can hold."""
        cls, deeper = type(value), depth + 1
        if cls is collections.OrderedDict:
            return {"OrderedDict": [[self.encode(k, deeper), self.encode(v, deeper)] for k, v in value.items()]}
        if cls.__module__ == _RETURNS:
            return {"result": [cls.__name__, *(self.encode(v, deeper) for v in value)]}
        if isinstance(value, tuple) and hasattr(cls, "_fields"):
            word, fields = "namedtuple", dict(zip(cls._fields, value, strict=True))
        elif dataclasses.is_dataclass(cls) and cls in _pytree.SUPPORTED_NODES:
            word, fields = "dataclass", {f.name: getattr(value, f.name) for f in dataclasses.fields(cls)}
        else:
            return super().encode_other(value, depth)
        rows = [[name, self.encode(v, deeper)] for name, v in fields.items()]
        return {word: [cls.__module__, cls.__qualname__, *rows]}

    def decode_other(self, word: str, content: Any, depth: int) -> Any:
        """The structure. Raises FrozenFileError for none, or for a class that this process does not have."""
        if word not in ("OrderedDict", "result", "namedtuple", "dataclass") or not isinstance(content, list):
            return super().decode_other(word, content, depth)
        deeper = depth + 1
        if word == "OrderedDict":
            return collections.OrderedDict((self.decode(k, deeper), self.decode(v, deeper)) for k, v in content)
        if word == "result":
            return _class(_RETURNS, content[0])([self.decode(v, deeper) for v in content[1:]])
        module, name, *rows = content
        fields = {field: self.decode(v, deeper) for field, v in rows}
        if word == "namedtuple":
            return _named_tuple(module, name, list(fields))(*fields.values())
        return _class(module, name)(**fields)


def _class(module: str, name: str) -> Any:
    """The class of this name that is registered as a pytree node."""
    if module == _OUTPUTS and _registered(module, name) is None:
        try:
            importlib.import_module(_OUTPUTS)
        except Exception as error:  # whatever a broken installation raises
            text = f"its output is a {short(name)}: it needs transformers, which does not import here: {error}"
            raise FrozenFileError(text) from error
    found = _registered(module, name)
    if found is None:
        raise FrozenFileError(f"it needs the class {short(name)}: import {short(module)} before loading")
    return found


def _registered(module: str, name: str) -> Any:
    registered = (cls for cls in _pytree.SUPPORTED_NODES if (cls.__module__, cls.__qualname__) == (module, name))
    known = (cls for cls in registered if module == _RETURNS or dataclasses.is_dataclass(cls))
    return next(known, None)


def _named_tuple(module: str, name: str, names: list[str]) -> Any:
    """The loaded class of this name and these fields; else a new one. Looked up in the module's own dictionary: an
    attribute of a lazy module would be imported."""
    name = name.rpartition(".")[2]  # one that is defined in a function or a class is not found, and made again
    cls = getattr(sys.modules.get(module), "__dict__", {}).get(name)
    if isinstance(cls, type) and issubclass(cls, tuple) and getattr(cls, "_fields", None) == tuple(names):
        return cls
    return collections.namedtuple(name, names)  # refuses what is no name


class UnknownDefault:
    """Stands for a default value that is no plain data; no argument equals it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


Parameters = list[tuple[str, Any, Any]]  # name, kind, default


def signature_to_json(parameters: Parameters) -> list[list[Any]]:
    """A forward's parameters: name, kind and, where there is a default, it or how it reads."""
    rows = []
    for name, kind, default in parameters:
        row = [name, kind.name]
        if default is not inspect.Parameter.empty:
            row += ["default", Values().encode(default)] if is_plain(default) else ["unknown", short(default)]
        rows.append(row)
    return rows


def signature_from_json(data: list[list[Any]]) -> Parameters:
    """The parameters; a default that is no plain data is an UnknownDefault. Raises whatever a wrong one raises."""
    found = []
    for name, kind, *rest in data:
        default: Any = inspect.Parameter.empty
        if rest:
            word, value = rest
            default = Values().decode(value) if word == "default" else UnknownDefault(str(value))
        found.append(inspect.Parameter(name, inspect._ParameterKind[kind], default=default))
    return [(p.name, p.kind, p.default) for p in inspect.Signature(found).parameters.values()]
