"""Weights files: read as tensors only, and checked against the model before anything in it changes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastres.lab.errors import CheckpointError, first_line


def load_checkpoint(path: Path, model: nn.Module, name: str) -> None:
    """Load a state_dict into `model`, also one wrapped as {"model": ...} or {"state_dict": ...}.

    Args:
        path: a `.safetensors` file, or one that `torch.save` wrote; no code in it runs.
        model: its names and shapes must be the file's; num_batches_tracked may be missing (PyTorch before 0.4.1).
        name: of the model in messages, such as "torchvision resnet50".

    Raises CheckpointError; the model is unchanged then.
    """
    wanted = f"expected a state_dict of {name}"
    state = _tensors(path, wanted)
    model_state = model.state_dict()
    missing = [key for key in model_state if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in model_state]
    if missing or unexpected:
        lists = (("missing", missing), ("unknown", unexpected))
        parts = [f"{len(keys)} {kind} such as {', '.join(map(repr, keys[:3]))}" for kind, keys in lists if keys]
        raise CheckpointError(f"weights {path}: got different names ({', '.join(parts)}), {wanted}")
    for key, tensor in state.items():
        if tensor.shape != model_state[key].shape:
            shapes = f"got shape {list(tensor.shape)} for {key!r}, expected {list(model_state[key].shape)}"
            raise CheckpointError(f"weights {path}: {shapes} of {name}")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
            raise CheckpointError(f"weights {path}: got a {tensor.layout} {tensor.dtype} tensor for {key!r}, {wanted}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"weights {path}: got NaN or infinity in {key!r}, expected finite values")
    model.load_state_dict(dict(state))


def read_file(what: str, path: Path, expected: str) -> Any:
    """The content of a `.safetensors` file or of one that `torch.save` wrote, tensors and plain data only.

    Raises CheckpointError, whose message begins with `what` and ends with `expected`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of damaged bytes
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        reason = first_line(error).removesuffix(".")
        if "Weights only load failed" in reason:
            reason = "objects other than tensors, or damaged bytes"
        raise CheckpointError(f"{what} {path}: cannot be read: got {reason}, {expected}") from error


def _tensors(path: Path, wanted: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(f"weights {path}: got {got}, {wanted}")
    content = read_file("weights", path, wanted)
    if isinstance(content, Mapping):
        inner = (content.get(wrapper) for wrapper in ("model", "state_dict"))
        content = next((found for found in inner if isinstance(found, Mapping)), content)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"weights {path}: got a {type(content).__name__}, {wanted}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"weights {path}: got a {type(value).__name__} under {key!r}, {wanted}")
    return content
