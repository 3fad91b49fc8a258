"""The folder of a run: its spec, log and result files, and the lock that keeps a second run out of it."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastres.lab.errors import LabError, OutputError, RunError
from fastres.lab.loop_state import Point, RunResult, RunSpec
from fastres.lab.processes import Place
from fastres.lab.results import prepare_folder, write_json

RUN = "fastres.run/1"
_FILES = ["spec.json", "checkpoint.pt", "log.csv", "result.json"]


def result_in(folder: Path, spec: RunSpec) -> RunResult | None:
    """The result of the finished run in `folder`, None where it is not finished; writes nothing.

    Raises RunError where the folder holds a run other than `spec`, or a damaged one.
    """
    if not (folder / "spec.json").exists():
        return None
    differences = spec.differences(read_json(folder / "spec.json"))
    if differences:
        raise RunError(
            f"output folder {folder}: holds another run: {'; '.join(differences)}; use another, or delete it"
        )
    if not (folder / "result.json").exists():
        return None
    data = read_json(folder / "result.json")
    if data.get("schema") != RUN:
        raise RunError(f"output file {folder / 'result.json'}: got {data.get('schema')!r}, expected {RUN!r}")
    try:
        return RunResult.from_dict(data)
    except (KeyError, TypeError, AttributeError, LabError) as error:
        raise RunError(f"output file {folder / 'result.json'}: missing or wrong: {error}; expected a result") from error


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
    """log.csv and events.out.* in `folder`.

    Args:
        folder: of the run.
        history: the points so far, as the checkpoint has them: what a run logged after its last checkpoint is dropped.
        iteration: done so far.

    Raises:
        OutputError: the file cannot be written.
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
