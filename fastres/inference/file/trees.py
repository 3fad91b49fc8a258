"""The shape of a call as JSON: a signature, and the trees that inputs and outputs are nested in (pytree's TreeSpec).

``torch.utils._pytree.treespec_loads`` is not used: it imports whatever module the JSON names (for an enum, and for a
defaultdict's factory). Here a class is only ever one that this process has registered as a pytree node already:

* tuple, list, dict, OrderedDict;
* a named tuple: the class of that name if its module is loaded and it has the same fields, else a new one like it;
* a registered dataclass with its fields, as Hugging Face's ModelOutput. Those of ``transformers.modeling_outputs`` are
  registered by importing that one module, whose name is a constant here; for others the error says what to import.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import inspect
import keyword
import re
import sys
from typing import Any

from torch.utils import _pytree
from torch.utils._pytree import TreeSpec

from fastres.inference.file.values import MAX_DEPTH, Decoder, FrozenFileError, encode, short

_BUILTIN: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": collections.OrderedDict}
_OUTPUTS = "transformers.modeling_outputs"
_RETURNS = "torch.return_types"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


class UnknownDefault:
    """Stands for a default value that is no plain data; no argument equals it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


Parameters = list[tuple[str, Any, Any]]  # name, kind, default


def signature_to_json(parameters: Parameters) -> list[dict[str, Any]]:
    """Names, kinds and defaults of a forward's parameters."""
    rows = []
    for name, kind, default in parameters:
        row: dict[str, Any] = {"name": name, "kind": kind.name}
        if default is not inspect.Parameter.empty:
            try:
                row["default"] = encode(default)
            except FrozenFileError:  # no plain data: only that there is one, and how it reads
                row["unknown"] = short(default)
        rows.append(row)
    return rows


def signature_from_json(data: Any) -> Parameters:
    """The parameters; a default that is no plain data is an UnknownDefault. Raises FrozenFileError."""
    if not isinstance(data, list):
        raise FrozenFileError("the signature is no list")
    kinds = {kind.name: kind for kind in inspect._ParameterKind}
    found: Parameters = []
    for row in data:
        if not isinstance(row, dict) or not {"name", "kind"} <= set(row) <= {"name", "kind", "default", "unknown"}:
            raise FrozenFileError(f"{short(row)} is no parameter of a signature")
        name, kind = row["name"], row["kind"]
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise FrozenFileError(f"{short(name)} is no name of a parameter")
        if not isinstance(kind, str) or kind not in kinds:
            raise FrozenFileError(f"{short(kind)} is no kind of parameter")
        default: Any = inspect.Parameter.empty
        if "default" in row:
            default = Decoder()(row["default"])
        elif "unknown" in row:
            default = UnknownDefault(str(row["unknown"]))
        found.append((name, kinds[kind], default))
    try:
        inspect.Signature([inspect.Parameter(name, kind, default=default) for name, kind, default in found])
    except ValueError as error:
        raise FrozenFileError(f"the signature cannot be: {error}") from error
    return found


def spec_to_json(spec: TreeSpec) -> Any:
    """The tree as nested objects; a leaf is null.

    Raises:
        FrozenFileError: a kind of node that no file can hold; the message names it.
    """
    if spec.type is None:
        return None
    cls: Any = spec.type
    children, context = spec._children, spec._context
    inner = [spec_to_json(child) for child in children]
    for name, builtin in _BUILTIN.items():
        if cls is builtin:
            return {"type": name, "keys": encode(context), "children": inner}
    if cls is collections.namedtuple:  # pytree's mark for all of them; the context is the class
        its_fields = list(context._fields)
        return {"type": "namedtuple", "class": _path(context), "keys": its_fields, "children": inner}
    if cls.__module__ == _RETURNS:
        return {"type": "result", "class": _path(cls), "children": inner}
    if dataclasses.is_dataclass(cls):
        return {"type": "dataclass", "class": _path(cls), "keys": encode(context), "children": inner}
    raise FrozenFileError(f"a {_path(cls)} in the inputs or outputs is a structure that no file can hold")


def spec_from_json(data: Any, depth: int = 0) -> TreeSpec:
    """The tree of nested objects.

    Raises:
        FrozenFileError: no tree, or a class that is not registered in this process: the message says what it needs.
    """
    if data is None:
        return _pytree.tree_structure(0)
    if depth > MAX_DEPTH or not isinstance(data, dict) or not isinstance(data.get("children"), list):
        raise FrozenFileError("the structure of the inputs or outputs is no tree")
    children = [spec_from_json(child, depth + 1) for child in data["children"]]
    kind, keys = data.get("type"), Decoder()(data.get("keys"))
    cls: Any
    if kind in ("tuple", "list"):
        if keys is not None:
            raise FrozenFileError(f"a {kind} of the structure has keys")
        return TreeSpec(_BUILTIN[kind], None, children)
    if kind not in ("dict", "OrderedDict", "namedtuple", "dataclass", "result"):
        raise FrozenFileError(f"{short(kind)} is no structure")
    if kind == "result":  # of an operator with several results, such as torch.max
        return TreeSpec(_result(data.get("class"), len(children)), None, children)
    names, absent = keys, []
    if kind == "dataclass" and isinstance(keys, list) and len(keys) == 2 and all(isinstance(k, list) for k in keys):
        names, absent = keys  # as torch.export.register_dataclass has them: the fields that are None apart
    if not isinstance(names, list) or len(names) != len(children):
        raise FrozenFileError(f"a {kind} of the structure has keys that do not fit")
    every = [*names, *absent]
    if not all(isinstance(key, str | int) for key in every) or len(set(every)) != len(every):
        raise FrozenFileError(f"a {kind} of the structure has a key twice, or one that is none")
    if kind in _BUILTIN:
        return TreeSpec(_BUILTIN[kind], names, children)
    module, name = _class_path(data.get("class"))
    if kind == "namedtuple":
        return TreeSpec(collections.namedtuple, _named_tuple(module, name, names), children)
    cls = _dataclass(module, name)
    if not set(every) <= {field.name for field in dataclasses.fields(cls)}:
        raise FrozenFileError(f"{module}.{name} of this installation has no such fields: {short(every)}")
    return TreeSpec(cls, keys, children)


def _path(cls: Any) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _class_path(path: Any) -> tuple[str, str]:
    module, colon, name = path.partition(":") if isinstance(path, str) and len(path) < 300 else ("", "", "")
    if not module or not name:
        raise FrozenFileError(f"{short(path)} is no class")
    return module, name


def _result(path: Any, count: int) -> Any:
    for cls in _pytree.SUPPORTED_NODES:
        if cls.__module__ == _RETURNS and _path(cls) == path and getattr(cls, "n_fields", None) == count:
            return cls
    raise FrozenFileError(f"{short(path)} is no result of {count} tensors in this torch")


def _named_tuple(module: str, name: str, names: list[Any]) -> Any:
    """The loaded class of this name and these fields; else a new one. Looked up in the module's own dictionary: an
    attribute of a lazy module would be imported."""
    if not all(isinstance(n, str) and _NAME.fullmatch(n) and not keyword.iskeyword(n) for n in names):
        raise FrozenFileError("a named tuple of the structure has fields that are no names")
    if any(n.startswith("_") for n in names):
        raise FrozenFileError("a named tuple of the structure has a field that begins with an underscore")
    name = name.rpartition(".")[2]  # one that is defined in a function or a class is not found, and made again
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise FrozenFileError(f"{short(name)} is no name of a named tuple")
    cls = getattr(sys.modules.get(module), "__dict__", {}).get(name)
    if isinstance(cls, type) and issubclass(cls, tuple) and getattr(cls, "_fields", None) == tuple(names):
        return cls
    return collections.namedtuple(name, names)


def _dataclass(module: str, name: str) -> Any:
    """The dataclass of this name that is registered as a pytree node."""
    found = _registered(module, name)
    if found is None and module == _OUTPUTS:
        try:
            importlib.import_module(_OUTPUTS)
        except Exception as error:  # whatever a broken installation raises
            raise FrozenFileError(
                f"its output is a {name}: it needs transformers, which does not import here: {error}"
            ) from error
        found = _registered(module, name)
        if found is None:
            raise FrozenFileError(f"its output is a {name}, which the transformers installed here does not have")
    if found is None:
        raise FrozenFileError(f"it needs the class {short(name)}: import {short(module)} before loading")
    return found


def _registered(module: str, name: str) -> Any:
    for cls in _pytree.SUPPORTED_NODES:
        if cls.__module__ == module and cls.__qualname__ == name and dataclasses.is_dataclass(cls):
            return cls
    return None
