"""What a frozen model shows of its source (fastres/inference/hub.py), in a file."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from fastres.inference.file.values import FrozenFileError, encode, short


def likeness_to_json(names: Iterable[str], model: Any, hub_class: str) -> dict[str, Any]:
    """The likeness as plain data; a configuration of a class that is not transformers' own stays behind.

    Args:
        names: of the attributes that the model has of its source.
        hub_class: the source's class, if that is transformers'; else empty.
    """
    found = {name: getattr(model, name) for name in names}
    config = found.pop("config", None)
    data: dict[str, Any] = {"attributes": found}
    if hub_class:
        data["class"] = hub_class
        if type(config).__module__.startswith("transformers."):
            data["config"] = [config.model_type, config.to_dict()]
    elif config is not None:
        found["config"] = config
    try:
        return {"likeness": encode(data)}
    except FrozenFileError:  # numbers of more than 64 bits, say: the network matters more
        return {}


def likeness_from_json(data: Any) -> dict[str, Any]:
    """What `hub.give_likeness` takes, of the plain data of `likeness_to_json`.

    Raises:
        FrozenFileError: it is something else, or needs a transformers that is not here.
    """
    if not isinstance(data, dict) or not isinstance(data.get("attributes"), dict):
        raise FrozenFileError("it does not say what its source was like")
    name, config = data.get("class"), data.get("config")
    names = [*data["attributes"], *([] if name is None else [name])]
    if not all(isinstance(n, str) and n.isidentifier() for n in names):
        raise FrozenFileError(f"{short(names)} are no names of attributes and a class")
    return {**data, "config": None if config is None else _config(config)}


def _config(data: Any) -> Any:
    if not isinstance(data, list) or len(data) != 2 or not isinstance(data[0], str) or not isinstance(data[1], dict):
        raise FrozenFileError(f"{short(data)} is no configuration")
    try:
        known = importlib.import_module("transformers").CONFIG_MAPPING
        return known[data[0]].from_dict(data[1])
    except Exception as error:  # a kind of model that the transformers here lacks, or values that it refuses
        what = f"the configuration of its source, a {short(data[0])} of transformers"
        raise FrozenFileError(f"{what}, cannot be made here: {short(str(error))}") from error
