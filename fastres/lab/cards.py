"""What a network's library says about its images and classes: the transform before it, and the classes' names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastres.lab.errors import LabError
from fastres.lab.named_models import Named
from fastres.pipelines.images import Transform


@dataclass(frozen=True)
class Card:
    """None where the library says nothing."""

    transform: Transform | None = None
    labels: list[str] | None = None


def card(named: Named, weights: Path | None) -> Card:
    """The card of a network that ``named_models.build`` made.

    torchvision: of the published weights, if the file has their name, such as resnet50-11ad3fa6.pth. timm: the
    network's configuration. Hugging Face: the folder's preprocessor_config.json, and the labels in its config.json.
    """
    library, _, name = named.name.partition(":")
    return _CARDS[library](named, name, weights) if library in _CARDS else Card()


def read_labels(path: Path) -> list[str]:
    """The lines of a file, a class each. Raises LabError."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8"
        raise LabError(f"--labels {path}: cannot be read: {reason}; expected a text file, a class a line") from error


def _torchvision(named: Named, name: str, weights: Path | None) -> Card:
    from torchvision.models import get_model_weights

    for known in get_model_weights(name):
        if weights is not None and known.url.rpartition("/")[2] == weights.name:
            return Card(known.transforms(), known.meta.get("categories"))
    return Card()


def _timm(named: Named, name: str, weights: Path | None) -> Card:
    data: Any = importlib.import_module("timm.data")
    model: Any = named.model
    made = data.create_transform(**data.resolve_data_config({}, model=model))
    return Card(made, list((model.pretrained_cfg or {}).get("label_names") or ()) or None)


def _hugging_face(named: Named, name: str, weights: Path | None) -> Card:
    processors: Any = importlib.import_module("transformers").AutoImageProcessor
    names = dict(getattr(named.model.config, "id2label", {}))
    labels = [str(names.get(place, place)) for place in range(len(names))]
    if all(label == f"LABEL_{place}" for place, label in enumerate(labels)):
        labels = []  # transformers' own, where the configuration has none
    folder = Path(name).expanduser()
    folder = folder.parent if folder.name == "config.json" else folder
    if not (folder / "preprocessor_config.json").is_file():
        return Card(None, labels or None)
    try:
        return Card(Processor(processors.from_pretrained(folder, local_files_only=True)), labels or None)
    except (OSError, ValueError, ImportError) as error:
        raise LabError(f"model: hf:{name}: preprocessor_config.json cannot be used: {error}") from error


class Processor:
    """A Hugging Face image processor as a transform."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        made: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return made

    def __repr__(self) -> str:
        return repr(self.processor)


_CARDS = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}
