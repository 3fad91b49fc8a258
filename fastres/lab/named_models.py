"""Networks by name, for the command line: `torchvision:resnet50`, `timm:resnet50d`, `hf:FOLDER`, `net.py:make`.

Nothing is downloaded: weights are random (seed 0) unless a file or a local folder holds them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastres.lab.checkpoints import load_checkpoint
from fastres.lab.errors import CheckpointError, LabError, MissingExtra, did_you_mean, first_line

RANDOM = "random weights (seed 0); load others with --weights FILE"
_EXPECTED = "expected torchvision:NAME, timm:NAME, fastres:NAME, hf:FOLDER or FILE.py:FUNCTION"


class ModelError(LabError, ValueError):
    """An unknown network, or one that cannot be built."""


@dataclass
class Named:
    name: str  # as it was asked for
    model: nn.Module  # in eval mode
    weights: str  # where they are from


def build(name: str, weights: Path | None = None, channels: int | None = None) -> Named:
    """The network called `name`, in eval mode on the CPU.

    Args:
        name: `torchvision:NAME`, `timm:NAME` and `fastres:NAME`, with the library's own names (`fastres:cifar_resnet20`
            includes the depth); `hf:FOLDER` for a local folder with a config.json; `FILE.py:FUNCTION` for a function
            (or class) that takes no arguments and returns an nn.Module, or for a module object.
        weights: a file with the state_dict; None for random weights, or for `hf:` the folder's if it has any.
        channels: of the input, where the library lets one choose.

    Raises ModelError: an unknown name, with the nearest ones, or a network that cannot be built; MissingExtra;
    CheckpointError: `weights` do not fit this network.

    >>> build("fastres:cifar_resnet8").weights
    'random weights (seed 0); load others with --weights FILE'
    """
    kind, colon, rest = name.partition(":")
    if ".py:" in name:
        made = _from_file(name)
    elif colon and kind in _KINDS and rest:
        made = _KINDS[kind](rest, channels, weights is None)
    else:
        raise ModelError(f"model: got {name!r}, {_EXPECTED}")
    if weights is not None:
        load_checkpoint(weights, made.model, made.name)
        made.weights = f"weights of {weights}"
    made.model.eval()
    return made


# ---- each library --------------------------------------------------------------------------------------------------


def _torchvision(name: str, channels: int | None, _: bool) -> Named:
    models = _library("torchvision").models
    _known("torchvision", name, models.list_models())
    maker = models.get_model_builder(name)
    taken = inspect.signature(maker).parameters
    options = {key: None for key in ("weights", "weights_backbone") if key in taken}  # the second's default downloads
    return _random(f"torchvision:{name}", lambda: maker(**options))


def _timm(name: str, channels: int | None, _: bool) -> Named:
    timm = _library("timm")
    _known("timm", name.partition(".")[0], timm.list_models())
    options = {} if channels is None else {"in_chans": channels}
    return _random(f"timm:{name}", lambda: timm.create_model(name, pretrained=False, **options))


def _fastres(name: str, channels: int | None, _: bool) -> Named:
    models = importlib.import_module("fastres.models")
    makers = [maker for maker in models.__all__ if maker.startswith(("resnet", "plain", "cifar"))]
    cifar = re.fullmatch("(cifar_[a-z]+?)([0-9]+)", name)
    options = {} if channels is None else {"in_channels": channels}
    if cifar and cifar[1] in makers:
        return _random(f"fastres:{name}", lambda: getattr(models, cifar[1])(int(cifar[2]), **options))
    fixed = [maker for maker in makers if not maker.startswith("cifar")]
    _known("fastres", name, [*fixed, "cifar_resnet20", "cifar_plain20"])
    return _random(f"fastres:{name}", lambda: getattr(models, name)(**options))


def _hugging_face(name: str, channels: int | None, own_weights: bool) -> Named:
    transformers = _library("transformers")
    path = Path(name).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        got = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise ModelError(f"model: hf:{name}: got {got}, expected a local folder with one; nothing is downloaded")
    with _quiet(transformers):
        config = _checked(f"hf:{name}", lambda: transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
        if channels is not None:
            config.num_channels = channels
        kind = _hub_class(transformers, config)
        stored = any(file.name.startswith(_STORED) for file in folder.iterdir())
        if not stored or not own_weights:
            made = _random(f"hf:{name}", lambda: kind._from_config(config))
            made.weights = f"{RANDOM if not stored else made.weights} ({kind.__name__})"
            return made
        options = {"config": config, "local_files_only": True, "output_loading_info": True}
        net, found = _checked(f"hf:{name}", lambda: kind.from_pretrained(folder, **options))
    wrong = [f"{what} {_few(found[what])}" for what in ("missing_keys", "mismatched_keys") if found.get(what)]
    if wrong:
        raise CheckpointError(f"weights {folder}: got {'; '.join(wrong)}, expected those of {kind.__name__}")
    return Named(f"hf:{name}", net.float(), f"weights of {folder} ({kind.__name__})")


_STORED = ("model.safetensors", "pytorch_model.bin", "model-00001", "pytorch_model-00001")
_KINDS: dict[str, Callable[[str, int | None, bool], Named]]
_KINDS = {"torchvision": _torchvision, "timm": _timm, "fastres": _fastres, "hf": _hugging_face}


def _hub_class(transformers: Any, config: Any) -> Any:
    """The class that the configuration names, or else its class for image classification."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (transformers.AutoModelForImageClassification, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ModelError(f"model: got a configuration of {config.model_type!r}, for which transformers has no network")


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' tables and progress bars: our own messages report what matters."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _from_file(name: str) -> Named:
    file, _, function = name.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file() or not function.isidentifier():
        got = f"no such file {file}" if not path.is_file() else f"{function!r}, which is not a name,"
        raise ModelError(f"model: got {got} in {name!r}, expected FILE.py:FUNCTION")
    spec: Any = importlib.util.spec_from_file_location(f"_fastres_model_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # so that its classes can be pickled and inspected
    sys.path.insert(0, str(path.resolve().parent))  # as for a script, so that it can import its neighbors
    try:
        _checked(name, lambda: spec.loader.exec_module(module), path)
        maker = getattr(module, function, None)
        if not callable(maker):
            near = did_you_mean(function, [key for key, value in vars(module).items() if callable(value)])
            raise ModelError(f"model: {path} has no function {function!r}{near}")
        model = maker if isinstance(maker, nn.Module) else _checked(name, lambda: _seeded(maker), path)
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: {name} gave a {type(model).__name__}, expected an nn.Module")
    return Named(name, model, f"weights as {name} makes them")


# ---- shared --------------------------------------------------------------------------------------------------------


def _library(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        raise MissingExtra(f"model: {name} is not installed: pip install {name}")
    try:
        return importlib.import_module(name)
    except Exception as error:  # most often, a build for another torch
        raise MissingExtra(f"model: {name} cannot be imported: {_first_line(error)}") from error


def _known(library: str, name: str, names: list[str]) -> None:
    if name not in names:
        raise ModelError(f"model: {library} has no network {name!r}{did_you_mean(name, names)}")


def _random(name: str, maker: Callable[[], nn.Module]) -> Named:
    return Named(name, _checked(name, lambda: _seeded(maker)), RANDOM)


def _seeded(maker: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # googlenet's, about a future change of its initialization
        torch.manual_seed(0)
        return maker()


def _checked(name: str, action: Callable[[], Any], file: Path | None = None) -> Any:
    """Call `action`; report anything it raises as one line, with the line of `file` that it came from."""
    try:
        return action()
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if file is not None and frame.filename == str(file)]
        where = f" (line {lines[-1]})" if lines else ""
        raise ModelError(f"model: {name} cannot be built: {_first_line(error)}{where}") from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


def _few(keys: Any) -> str:
    keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
