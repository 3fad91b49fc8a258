"""What a training run is, what it leaves, and its checkpoint: written whole or not at all, checked before use."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastres.lab.errors import CheckpointError, RunError
from fastres.lab.recipes import TrainRecipe
from fastres.lab.results import write_atomically

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKPOINT = "fastres.checkpoint/1"


@dataclass(frozen=True)
class RunSpec:
    """One training run. Two runs of equal specs on one CPU process have equal weights, bit for bit.

    Args:
        network, options: for :func:`fastres.lab.networks.build`, such as ("resnet20", (("shortcut", "B"),)).
        data: for :func:`fastres.lab.datasets.load`.
        recipe: how it is trained.
        seed: of the initial weights, the order and the augmentation.
        dtype: "fp32", or autocast's "bf16" or "fp16" (with a gradient scaler).
        channels_last: the layout of weights and activations.
        swap: fused blocks; False runs stock BN, addition and ReLU.

    Raises:
        RunError: an unknown dtype.

    Example:
        >>> from fastres.lab.recipes import recipe
        >>> spec = RunSpec("resnet20", "digits", recipe("digits"), options=(("shortcut", "B"),))
        >>> RunSpec.from_dict(spec.to_dict()) == spec
        True
    """

    network: str
    data: str
    recipe: TrainRecipe
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "fp32"
    channels_last: bool = True
    swap: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RunError(f"dtype: got {self.dtype!r}, expected {', '.join(DTYPES)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        made: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {**made, "options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunSpec:
        recipe = TrainRecipe(**{**data["recipe"], "milestones": tuple(data["recipe"]["milestones"])})
        return cls(**{**data, "recipe": recipe, "options": tuple(data["options"].items())})

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What `other`, a spec as a dict, has otherwise, as "seed 1, not 0": its value first."""
        mine, theirs = _flat(self.to_dict()), _flat(other)
        names = [*mine, *(name for name in theirs if name not in mine)]
        return [
            f"{name} {theirs.get(name)}, not {mine.get(name)}" for name in names if mine.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True)
class Point:
    """A row of the log. Losses and errors are means since the row before; errors are fractions."""

    iteration: int  # done so far
    lr: float  # of that iteration
    train_loss: float
    train_error: float  # on the augmented batches as they came, as in the paper's figures
    test_error: float | None  # None between tests
    gradient_norm: float | None  # of all parameters together, at that iteration; None where fp16 overflowed
    seconds: float  # of training and testing so far, over all resumed parts

    COLUMNS = ("iteration", "lr", "train_loss", "train_error", "test_error", "gradient_norm", "seconds")


@dataclass(frozen=True)
class RunResult:
    """What a run came to; `iterations` is less than the recipe's where it was stopped before its end."""

    spec: RunSpec
    iterations: int
    images: int
    seconds: float
    parameters: int
    test_error: float | None  # of the last test
    train_error: float | None  # of the last point
    best_test_error: float | None
    history: list[Point]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "spec": self.spec.to_dict(), "history": [asdict(point) for point in self.history]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunResult:
        """From :meth:`to_dict`'s; other keys, such as a result file's environment, are left out."""
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        history = [Point(**point) for point in data["history"]]
        return cls(**{**fields, "spec": RunSpec.from_dict(data["spec"]), "history": history})


@dataclass
class Progress:
    """What a run has to remember between two iterations, beside its network and optimizer."""

    iteration: int = 0  # done so far
    warmed_up: bool = False
    seconds: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # loss, errors, images since the last point
    log_bytes: int = 0  # length of log.csv


def write_checkpoint(path: Path, spec: RunSpec, progress: Progress, parts: Mapping[str, Any]) -> None:
    """Writes `progress` and the state of `parts`, such as {"model": model, "optimizer": optimizer}, atomically."""
    content = {
        "schema": CHECKPOINT,
        "spec": spec.to_dict(),
        "progress": asdict(progress),
        **{name: part.state_dict() for name, part in parts.items()},
    }
    write_atomically(path, lambda file: torch.save(content, file))


def read_checkpoint(path: Path, spec: RunSpec, model: nn.Module) -> tuple[Progress, dict[str, Any]]:
    """The progress and the states of a checkpoint that `write_checkpoint` made of `spec`; nothing is changed by it.

    Raises CheckpointError for a file that cannot be read or does not fit `spec` and `model`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of damaged bytes
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"checkpoint {path}: cannot be read: got {reason}; expected what fastres train wrote; delete the run's"
            " folder to begin anew"
        ) from error
    if not isinstance(content, dict) or content.get("schema") != CHECKPOINT:
        got = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"checkpoint {path}: got {got!r}, expected the schema {CHECKPOINT!r}")
    try:
        differences = spec.differences(content["spec"])
        progress = Progress(**content["progress"])
        states = {name: content[name] for name in ("model", "optimizer", "scaler")}
        fits = _same_shapes(states["model"], model.state_dict())
        fits = fits and 0 <= progress.iteration <= spec.recipe.iterations and len(progress.sums) == 3
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: got no or other {error}, expected a whole checkpoint") from error
    if differences:
        raise CheckpointError(f"checkpoint {path}: is of another run: {'; '.join(differences)}")
    if not fits:
        raise CheckpointError(f"checkpoint {path}: got other tensors or counts, expected those of {spec.network}")
    return progress, states


def restore(path: Path, states: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Puts the states that `read_checkpoint` gave into `parts`.

    Raises CheckpointError where the optimizer's or the scaler's does not fit; the parts are of no use then.
    """
    wanted = "expected the states of the run's network, optimizer and scaler"
    try:
        for name, part in parts.items():
            part.load_state_dict(states[name])
        optimizer = parts["optimizer"]
        for parameter, state in optimizer.state.items():
            if state["momentum_buffer"] is not None and state["momentum_buffer"].shape != parameter.shape:
                raise ValueError(f"a momentum of shape {list(state['momentum_buffer'].shape)}")
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"checkpoint {path}: got {reason}, {wanted}") from error


def _same_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].shape == t.shape and found[name].dtype == t.dtype for name, t in wanted.items()
    )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
