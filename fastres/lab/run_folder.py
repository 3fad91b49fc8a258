"""The folder of a run: what it must hold before the run begins, and that one process at a time trains in it."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastres.lab.errors import RunError
from fastres.lab.loop_state import RunResult, RunSpec
from fastres.lab.processes import Place
from fastres.lab.results import prepare_folder, write_json

RUN = "fastres.run/1"
_FILES = ["spec.json", "checkpoint.pt", "log.csv", "result.json"]


def begin(spec: RunSpec, folder: Path, here: Place) -> RunResult | None:
    """Writes spec.json, or compares with the one that is there; the result of a run that is done."""
    if (folder / "spec.json").exists():
        differences = spec.differences(read_json(folder / "spec.json"))
        if differences:
            raise RunError(
                f"output folder {folder}: holds another run: {'; '.join(differences)}; give another folder, or delete"
                " this one"
            )
    here.wait()
    if here.first:
        write_json(folder / "spec.json", spec.to_dict())
    if (folder / "result.json").exists():
        data = read_json(folder / "result.json")
        if data.get("schema") == RUN:
            return RunResult.from_dict(data)
        raise RunError(f"output file {folder / 'result.json'}: got {data.get('schema')!r}, expected {RUN!r}")
    return None


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"run file {path}: cannot be read: {error}; expected what fastres train wrote") from error
    if not isinstance(data, dict):
        raise RunError(f"run file {path}: got a {type(data).__name__}, expected an object")
    return data


@contextmanager
def alone(folder: Path, here: Place) -> Iterator[None]:
    """The folder, made, and held against a second run in it; a killed run's data workers live on for some seconds."""
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
        here.wait()
        yield
