"""The folder of a run: what it must hold before the run begins, and that one process at a time trains in it."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastres.lab.errors import LabError, RunError
from fastres.lab.loop_state import RunResult, RunSpec
from fastres.lab.processes import Place
from fastres.lab.results import prepare_folder, write_json

RUN = "fastres.run/1"
_FILES = ["spec.json", "checkpoint.pt", "log.csv", "result.json"]


def result_in(folder: Path, spec: RunSpec) -> RunResult | None:
    """The result of a run that is done in `folder`, None for one that is not; reads alone.

    Raises RunError where the folder holds another run than `spec`, or a damaged one.
    """
    if not (folder / "spec.json").exists():
        return None
    differences = spec.differences(read_json(folder / "spec.json"))
    if differences:
        raise RunError(
            f"output folder {folder}: holds another run: {'; '.join(differences)}; give another folder, or delete this"
        )
    if not (folder / "result.json").exists():
        return None
    data = read_json(folder / "result.json")
    if data.get("schema") != RUN:
        raise RunError(f"output file {folder / 'result.json'}: got {data.get('schema')!r}, expected {RUN!r}")
    try:
        return RunResult.from_dict(data)
    except (KeyError, TypeError, AttributeError, LabError) as error:
        raise RunError(f"output file {folder / 'result.json'}: got no or other {error}, expected a result") from error


@contextmanager
def alone(folder: Path, spec: RunSpec, here: Place) -> Iterator[None]:
    """The folder, made, with spec.json in it, and held against a second run.

    A killed run's data workers hold it for some seconds more.

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
        result_in(folder, spec)  # nobody else has begun another run in the meantime
        write_json(folder / "spec.json", spec.to_dict())
        here.wait()
        yield


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of the run; raises RunError."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"run file {path}: cannot be read: {error}; expected what fastres train wrote") from error
    if not isinstance(data, dict):
        raise RunError(f"run file {path}: got a {type(data).__name__}, expected an object")
    return data
