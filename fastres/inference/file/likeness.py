"""What a frozen model shows of its source (fastres/inference/hub.py), in a file."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from fastres.inference.file.values import FrozenFileError, is_plain, short


def likeness_to_plain(names: Iterable[str], model: Any, hub_class: str) -> dict[str, Any]:
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


def likeness_from_plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """What `hub.give_likeness` takes, of the plain data of `likeness_to_plain`.

    Raises:
        FrozenFileError: its class has no name, or its configuration needs a transformers that is not here.
    """
    name, config = data.get("class"), data.get("config")
    if not all(isinstance(n, str) for n in data["attributes"]) or not str(name).isidentifier():
        raise FrozenFileError(f"its source's attributes or class have no names: {short(data)}")
    if config is None:
        return dict(data)
    kind, values = config
    try:
        known = importlib.import_module("transformers").CONFIG_MAPPING
        return {**data, "config": known[kind].from_dict(values)}
    except Exception as error:  # a kind of model that the transformers here lacks, or values that it refuses
        what = f"the configuration of its source, a {short(kind)} of transformers"
        raise FrozenFileError(f"{what}, cannot be made here: {short(str(error))}") from error
