"""A training run as data: its spec, log, result, and checkpoint, written whole or not at all and checked before use."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from fastres.lab.checkpoints import read_file
from fastres.lab.devices import Place
from fastres.lab.errors import CheckpointError, LabError, OutputError, RunError
from fastres.lab.recipes import TrainRecipe
from fastres.lab.results import prepare_folder, write_atomically, write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKPOINT = "fastres.checkpoint/2"


@dataclass(frozen=True)
class RunSpec:
    """One training run. Two runs of equal specs on one CPU process have equal weights, bit for bit.

    Raises RunError: an unknown dtype.

    >>> from fastres.lab.recipes import recipe
    >>> spec = RunSpec("resnet20", "digits", recipe("digits"), options=(("shortcut", "B"),))
    >>> RunSpec.from_dict(spec.to_dict()) == spec
    True
    """

    network: str  # and options: for fastres.lab.networks.build, such as ("resnet20", (("shortcut", "B"),))
    data: str  # for fastres.lab.datasets.load
    recipe: TrainRecipe
    seed: int = 0  # of the initial weights, the order and the augmentation
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "fp32"  # or autocast's "bf16" or "fp16" (with a gradient scaler)
    channels_last: bool = True
    swap: bool = True  # fused blocks; False runs stock BN, addition and ReLU

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RunError(f"dtype: got {self.dtype!r}, expected {', '.join(DTYPES)}")

    def to_dict(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {**made, "options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunSpec:
        recipe = TrainRecipe(**{**data["recipe"], "milestones": tuple(data["recipe"]["milestones"])})
        return cls(**{**data, "recipe": recipe, "options": tuple(data["options"].items())})

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """The fields in which `other`, a spec as a dict, differs, such as "seed 1, not 0": its value first."""
        mine, theirs = _flat(self.to_dict()), _flat(other)
        return [f"{n} {theirs.get(n)}, not {mine.get(n)}" for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]


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
    """The outcome of a run; `iterations` is less than the recipe's where it was stopped early."""

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
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "spec": self.spec.to_dict(), "history": [asdict(point) for point in self.history]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunResult:
        """The inverse of :meth:`to_dict`; other keys, such as a result file's environment, are ignored."""
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        history = [Point(**point) for point in data["history"]]
        return cls(**{**fields, "spec": RunSpec.from_dict(data["spec"]), "history": history})


@dataclass(frozen=True)
class Step:
    """One iteration, as `on_step` is told about it."""

    epoch: int  # from 1
    epochs: int
    step: int  # from 1
    steps: int
    images: int  # trained on so far
    loss: float  # of this batch
    seconds: float  # of training so far, over all resumed parts


@dataclass
class Progress:
    """The part of a run's state that is neither network nor optimizer."""

    iteration: int = 0  # done so far
    warmed_up: bool = False
    seconds: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # loss, errors, images since the last point
    history: list[Point] = field(default_factory=list)


def write_checkpoint(path: Path, spec: RunSpec, progress: Progress, parts: Mapping[str, Any]) -> None:
    """Write `progress` and the state of `parts`, such as {"model": model, "optimizer": optimizer}, atomically."""
    content = {"schema": CHECKPOINT, "spec": spec.to_dict(), "progress": asdict(progress)}
    content |= {name: part.state_dict() for name, part in parts.items()}
    write_atomically(path, lambda file: torch.save(content, file))


def read_checkpoint(path: Path, spec: RunSpec, parts: Mapping[str, Any]) -> Progress:
    """Load the states of a checkpoint that `write_checkpoint` made of `spec` into `parts`; return its progress.

    Raises CheckpointError for a file that cannot be read or does not fit; the parts are unusable then.
    """
    expected = f"expected a checkpoint of {spec.network} as fastres train writes; delete the folder to start over"
    content = read_file("checkpoint", path, expected)
    schema = content.get("schema") if isinstance(content, dict) else type(content).__name__
    if schema != CHECKPOINT:
        raise CheckpointError(f"checkpoint {path}: got {schema!r}, expected the schema {CHECKPOINT!r}")
    try:
        if differences := spec.differences(content["spec"]):
            raise ValueError(f"another run's: {'; '.join(differences)}")
        progress = Progress(**content["progress"])
        progress.history = [Point(**point) for point in progress.history]  # type: ignore[arg-type]
        if not 0 <= progress.iteration <= spec.recipe.iterations or len(progress.sums) != 3:
            raise ValueError(f"iteration {progress.iteration} and {len(progress.sums)} sums")
        for name, part in parts.items():
            part.load_state_dict(content[name])
        for parameter, state in parts["optimizer"].state.items() if "optimizer" in parts else ():
            momentum = state["momentum_buffer"]
            if momentum is not None and momentum.shape != parameter.shape:
                raise ValueError(f"a momentum of shape {list(momentum.shape)}")
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # torch's are several lines, with the tensor's name in the second
        raise CheckpointError(f"checkpoint {path}: got {reason}, {expected}") from error
    return progress


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


RUN = "fastres.run/1"
_FILES = ["spec.json", "checkpoint.pt", "log.csv", "result.json"]


def result_in(folder: Path, spec: RunSpec) -> RunResult | None:
    """The result of the finished run in `folder`, None where it is not finished; writes nothing.

    Raises RunError where the folder holds a run other than `spec`, or a damaged one.
    """
    path = folder / "result.json"
    if not (folder / "spec.json").exists():
        return None
    if differences := "; ".join(spec.differences(read_json(folder / "spec.json"))):
        raise RunError(f"output folder {folder}: holds another run: {differences}; use another, or delete it")
    if not path.exists():
        return None
    data = read_json(path)
    if data.get("schema") != RUN:
        raise RunError(f"output file {path}: got {data.get('schema')!r}, expected {RUN!r}")
    try:
        return RunResult.from_dict(data)
    except (KeyError, TypeError, AttributeError, LabError) as error:
        raise RunError(f"output file {path}: missing or wrong: {error}; expected a result") from error


@contextmanager
def lock_run_folder(folder: Path, spec: RunSpec, here: Place) -> Iterator[None]:
    """Create the folder with spec.json in it, and hold its lock against a second run.

    Waits up to ten seconds for the lock: a killed run's data workers hold it a little longer than the run.

    Raises OutputError where it cannot be written, RunError where another process holds it or it holds another run.
    """
    if not here.first:
        here.wait()
        yield
        return
    prepare_folder(folder, _FILES)
    with open(folder / ".lock", "w") as lock:
        for attempt in range(100, -1, -1):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if attempt == 0:
                    raise RunError(f"output folder {folder}: another process is training in it") from error
                time.sleep(0.1)
        result_in(folder, spec)  # raises if another run has started here in the meantime
        write_json(folder / "spec.json", spec.to_dict())
        here.wait()
        yield


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run; raises RunError."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"run file {path}: cannot be read: {error}; expected what fastres train wrote") from error
    if not isinstance(data, dict):
        raise RunError(f"run file {path}: got a {type(data).__name__}, expected an object")
    return data


class Log:
    """log.csv and events.out.* in `folder`; raises OutputError where they cannot be written.

    `history` has the points so far, as the checkpoint has them: what a run logged after its last checkpoint is dropped.
    """

    def __init__(self, folder: Path, history: list[Point], iteration: int) -> None:
        path = folder / "log.csv"
        try:
            self._file: IO[str] = open(path, "w")  # noqa: SIM115 (closed by close)
            self._file.write(",".join(Point.COLUMNS) + "\n")
            self._file.writelines(map(_row, history))
            self._file.flush()
        except OSError as error:
            raise OutputError(f"output file {path}: cannot be written: {error.strerror or error}") from error
        self._events: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder), purge_step=iteration + 1)

    def add(self, point: Point, gradients: dict[str, float]) -> None:
        """Add a row; `gradients` are the norms of single layers, for TensorBoard."""
        self._file.write(_row(point))
        self._file.flush()
        if self._events is not None:
            for column in Point.COLUMNS[1:]:
                if (value := getattr(point, column)) is not None:
                    self._events.add_scalar(column, value, point.iteration)
            for name, norm in gradients.items():
                self._events.add_scalar(f"gradient_norm/{name}", norm, point.iteration)

    def flush(self) -> None:
        """Write TensorBoard's events to the disk, so that a checkpoint is never ahead of them."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _row(point: Point) -> str:
    values = (getattr(point, column) for column in Point.COLUMNS)
    return ",".join("" if value is None else repr(value) for value in values) + "\n"
