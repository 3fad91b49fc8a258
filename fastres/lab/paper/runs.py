"""The runs behind an experiment: cached, resumable, in parallel, with progress.

Every run has a folder of its own under ``OUT/runs``, named after its spec and a digest of it, so experiments share
runs: `responses`, `depth` and `skips` reuse what `degradation` trained. A run that was stopped resumes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from fastres.lab import loop
from fastres.lab.errors import LabError, RunError
from fastres.lab.loop_state import RunResult, RunSpec

_PATIENCE_S = 60.0  # for a worker to write its checkpoint

Report = Callable[[int, int, str], None]  # (iterations done, of all runs, text)


@dataclass(frozen=True)
class Place:
    """The place and the manner in which runs execute.

    Args:
        out: the experiments' folder.
        device: for :func:`fastres.lab.loop.run`; several runs at a time need "cpu".
        workers: runs at a time; with several, each uses one thread.
        data_root: of data that is not bundled.
    """

    out: Path
    device: str = "auto"
    workers: int = 1
    data_root: Path | None = None


def folder(out: Path, spec: RunSpec) -> Path:
    """The folder of one run.

    >>> from fastres.lab.paper.presets import preset
    >>> folder(Path("out"), preset("digits").spec("plain20", seed=1)).name[:-9]
    'digits8-digits-640-plain20-s1'
    """
    options = "".join(f"-{key}={value}" for key, value in spec.options)
    digest = hashlib.sha256(json.dumps(spec.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    return out / "runs" / f"{spec.data}-{spec.recipe.name}-{spec.network}{options}-s{spec.seed}-{digest}"


def finished(out: Path, spec: RunSpec) -> bool:
    """True once the run is complete."""
    return (folder(out, spec) / "result.json").is_file()


def layers(network: str) -> int:
    """The depth in a network's name: 56 in "plain56"."""
    return int("".join(filter(str.isdigit, network.split("-v")[0])) or 1)


def cost(spec: RunSpec) -> int:
    """The cost of a run relative to others: iterations x layers."""
    return spec.recipe.iterations * layers(spec.network)


def execute(specs: Sequence[RunSpec], place: Place, report: Report | None = None) -> dict[RunSpec, RunResult]:
    """Execute the runs that are not done yet, longest first, and return all results.

    After an interrupt, a second call resumes.

    Args:
        specs: may contain duplicates.
        report: called in this process with the work done so far, in units of iterations x layers.

    Raises:
        LabError: what `loop.run` raises.
    """
    unique = list(dict.fromkeys(specs))
    todo = sorted((spec for spec in unique if not finished(place.out, spec)), key=cost, reverse=True)
    meter = _Meter(todo, len(unique), report or (lambda done, total, text: None))
    if place.workers > 1 and len(todo) > 1:
        _in_parallel(todo, place, meter)
    else:
        for spec in todo:
            tell = _teller(spec, lambda iteration, spec=spec: meter.at(spec, iteration))  # type: ignore[misc]
            _run(spec, place, tell)
            meter.end(spec)
    return {spec: _run(spec, place, None) for spec in unique}  # read from their files


def _run(spec: RunSpec, place: Place, on_step: Callable[[Any], None] | None) -> RunResult:
    return loop.run(spec, folder(place.out, spec), data_root=place.data_root, device=place.device, on_step=on_step)


class _Meter:
    """Sums up the progress of the runs."""

    def __init__(self, todo: Sequence[RunSpec], runs: int, report: Report) -> None:
        self.report, self.runs = report, runs
        self.total = sum(map(cost, todo))
        self.done = {spec: 0 for spec in todo}
        self.ended = runs - len(todo)

    def at(self, spec: RunSpec, iteration: int) -> None:
        self.done[spec] = iteration * layers(spec.network)
        self.report(sum(self.done.values()), self.total, f"{self.ended} of {self.runs} runs; {spec.network}")

    def end(self, spec: RunSpec) -> None:
        self.ended += 1
        self.at(spec, spec.recipe.iterations)


def _teller(spec: RunSpec, tell: Callable[[int], None]) -> Callable[[Any], None]:
    """An `on_step` that reports the iteration about once a second, except the last one."""
    last = time.monotonic()

    def on_step(step: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 1 and step.step < spec.recipe.iterations:
            last = now
            tell(step.step)

    return on_step


class _Worker:
    """A single-threaded process that executes one run after another, and its current run."""

    def __init__(self, context: Any, place: Place) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, place), daemon=True)
        self.process.start()
        theirs.close()
        self.spec: RunSpec | None = None

    def start_next(self, todo: list[RunSpec]) -> None:
        """Send the next run, or None if there is none."""
        self.spec = todo.pop(0) if todo else None
        self.pipe.send(self.spec)


def _in_parallel(todo: list[RunSpec], place: Place, meter: _Meter) -> None:
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        for _ in range(min(place.workers, len(todo))):
            workers.append(_Worker(context, place))
            workers[-1].start_next(todo)
        while busy := {worker.pipe: worker for worker in workers if worker.spec is not None}:
            for pipe in connection.wait(list(busy)):
                _receive(busy[pipe], todo, meter)
    finally:
        for worker in workers:
            if worker.spec is not None:  # in progress: it writes its checkpoint and exits
                worker.process.terminate()
        for worker in workers:
            worker.process.join(_PATIENCE_S)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()


def _receive(worker: _Worker, todo: list[RunSpec], meter: _Meter) -> None:
    assert worker.spec is not None
    try:
        message = worker.pipe.recv()
    except EOFError:
        worker.process.join(_PATIENCE_S)
        code, name = worker.process.exitcode, worker.spec.network
        raise RunError(
            f"run of {name}: its process ended with exit code {code}, expected a result; run it again to resume"
        ) from None
    if isinstance(message, BaseException):
        raise message
    if isinstance(message, int):
        meter.at(worker.spec, message)
    else:
        meter.end(worker.spec)
        worker.start_next(todo)


def _work(pipe: Any, place: Place) -> None:
    """A worker's main function: execute the runs that arrive on the pipe; send iterations, then None or the error."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # between two runs; within one, the loop handles it and writes its checkpoint
    torch.set_num_threads(1)
    try:
        while (spec := pipe.recv()) is not None:
            try:
                _run(spec, place, _teller(spec, pipe.send))
            except Exception as error:
                pipe.send(error if isinstance(error, LabError) else RunError(f"run of {spec.network}: {error!r}"))
                return
            pipe.send(None)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):  # stopped, or the parent is gone
        return
