"""The likeness of a frozen model to its source (fastres/inference/hub.py), in a file."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from fastres.inference.file.values import FrozenFileError, is_plain, short


def likeness_to_json(names: Iterable[str], model: Any, hub_class: str) -> dict[str, Any]:
    """The likeness as plain data; a configuration of a class that is not transformers' own stays behind.

    Args:
        names: of the attributes that the model has of its source.
        hub_class: the source's class, if that is transformers'; else empty.
    """
    found = {name: getattr(model, name) for name in names}
    config: Any = found.get("config")
    data: dict[str, Any] = {"attributes": {name: value for name, value in found.items() if is_plain(value)}}
    if hub_class:
        data["class"] = hub_class
        if type(config).__module__.startswith("transformers.") and is_plain(config.to_dict()):
            data["config"] = [config.model_type, config.to_dict()]
    return data


def likeness_from_json(data: Any) -> dict[str, Any]:
    """Return what `hub.give_likeness` takes, of the plain data of `likeness_to_json`.

    Raises:
        FrozenFileError: it is something else, or its configuration needs a transformers that is not here.
    """
    if not isinstance(data, dict) or not isinstance(data.get("attributes"), dict):
        raise FrozenFileError("it does not say what its source was like")
    names, config = [*data["attributes"], data.get("class") or "None"], data.get("config")
    if not all(isinstance(name, str) for name in names) or not names[-1].isidentifier():
        raise FrozenFileError(f"{short(names)} are no names of attributes and a class")
    if config is None:
        return data
    if not isinstance(config, list) or len(config) != 2:
        raise FrozenFileError(f"{short(config)} is no configuration")
    try:
        known = importlib.import_module("transformers").CONFIG_MAPPING
        return {**data, "config": known[config[0]].from_dict(config[1])}
    except Exception as error:  # a kind of model that the transformers here lacks, or values that it refuses
        what = f"the configuration of its source, a {short(config[0])} of transformers"
        raise FrozenFileError(f"{what}, cannot be made here: {short(str(error))}") from error
