"""The likeness of a frozen model to its source, apart from its answers: plain data, and its class's name.

Code around a model reads such things: Hugging Face's pipelines its `config`, timm's transforms its `pretrained_cfg`. A
frozen model of a transformers model is of a subclass of FrozenModel with the name of the source's class, because
`pipeline(...)` looks that name up among the classes that its task knows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastres.inference.file.values import is_plain
from fastres.inference.frozen import FrozenModel

# What transformers' models keep on their classes and its pipelines read.
_HUB = ("main_input_name", "base_model_prefix", "input_modalities")
_CLASSES: dict[str, type[FrozenModel]] = {}


def take_likeness(frozen: FrozenModel, source: nn.Module) -> FrozenModel:
    """Give ``frozen`` copies of the plain data among the attributes of ``source``; a snapshot, as all of it is.

    Plain data is numbers, strings, None, dtypes and devices, tuples, lists and dicts of them, and the configuration of
    a transformers model. Names that begin with an underscore stay behind, and those that FrozenModel has itself.
    """
    found = {name: value for name, value in vars(source).items() if not name.startswith("_") and is_plain(value)}
    if not is_hub_model(source):
        return give_likeness(frozen, {"attributes": found})
    found |= {name: getattr(source, name) for name in _HUB if is_plain(getattr(source, name, None))}
    return give_likeness(frozen, {"attributes": found, "class": type(source).__name__, "config": source.config})


def give_likeness(frozen: FrozenModel, likeness: Mapping[str, Any]) -> FrozenModel:
    """Give ``frozen`` copies of these attributes, and the class's name and configuration of a transformers model."""
    found = dict(likeness["attributes"])
    if likeness.get("config") is not None:
        found["config"] = likeness["config"]
    names = [name for name in found if not name.startswith("_") and not hasattr(frozen, name)]
    for name in names:
        setattr(frozen, name, copy.deepcopy(found[name]))
    frozen._likeness = tuple(names)
    if likeness.get("class"):
        frozen.__class__ = hub_class(likeness["class"])
        frozen._hub_class = likeness["class"]
    return frozen


def is_hub_model(model: nn.Module) -> bool:
    """Tell whether it is a transformers model, asked without importing transformers."""
    bases = type(model).__mro__
    return any(base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.") for base in bases)


def hub_class(name: str) -> type[FrozenModel]:
    """The subclass of FrozenModel called ``name``, always the same one."""
    if name not in _CLASSES:
        _CLASSES[name] = type(name, (_HubModel,), {"__module__": __name__, "__doc__": FrozenModel.__doc__})
    return _CLASSES[name]


class _HubModel(FrozenModel):
    """The FrozenModel of a transformers model. Its classes are made when needed, so a pickle holds the name of one."""

    def can_generate(self) -> bool:
        """False: there is no ``generate`` here."""
        return False

    def _get_name(self) -> str:
        return f"FrozenModel of {type(self).__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        return _blank, (type(self).__name__,), *made[2:]


def _blank(name: str) -> FrozenModel:
    made = hub_class(name)
    return made.__new__(made)
