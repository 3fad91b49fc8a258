"""The runs behind an experiment: cached, resumable, in parallel, with progress.

Every run has a folder of its own under ``OUT/runs``, named after its spec and a digest of it, so experiments share
runs: `responses`, `depth` and `skips` reuse what `degradation` trained. A run that was stopped resumes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from fastres.lab import loop
from fastres.lab.errors import LabError, RunError
from fastres.lab.loop_state import RunResult, RunSpec
from fastres.lab.paper.presets import Preset
from fastres.lab.paper.tables import Outcome

_PATIENCE_S = 60.0  # for a worker to write its checkpoint

Report = Callable[[int, int, str], None]  # (iterations done, of all runs, text)


@dataclass(frozen=True)
class Place:
    """The place and the manner in which runs execute."""

    out: Path  # the experiments' folder
    device: str = "auto"  # several runs at a time need "cpu"
    workers: int = 1  # runs at a time; with several, each uses one thread
    data_root: Path | None = None  # of data that is not bundled


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
    return (folder(out, spec) / "result.json").is_file()


def layers(network: str) -> int:
    """The depth in a network's name: 56 in "plain56"."""
    return int("".join(filter(str.isdigit, network.split("-v")[0])) or 1)


def cost(spec: RunSpec) -> int:
    """The cost of a run relative to others: iterations x layers."""
    return spec.recipe.iterations * layers(spec.network)


def execute(specs: Sequence[RunSpec], place: Place, report: Report | None = None) -> dict[RunSpec, RunResult]:
    """Execute the runs that are not done yet, longest first, and return all results.

    `report` is called in this process with the work done so far, in units of iterations x layers. After an interrupt, a
    second call resumes. Raises LabError, as `loop.run` does.
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


def _in_parallel(todo: list[RunSpec], place: Place, meter: _Meter) -> None:
    """Execute the runs in single-threaded processes, one for each run."""
    context = multiprocessing.get_context("spawn")
    busy: dict[Any, tuple[Any, RunSpec]] = {}  # by pipe
    try:
        while todo or busy:
            while todo and len(busy) < place.workers:
                spec = todo.pop(0)
                pipe, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, spec, place), daemon=True)
                process.start()
                theirs.close()
                busy[pipe] = process, spec
            ready: Any
            for ready in connection.wait(list(busy)):
                process, spec = busy[ready]
                try:
                    message = ready.recv()
                except EOFError:
                    process.join(_PATIENCE_S)
                    if process.exitcode != 0:
                        code = f"its process ended with exit code {process.exitcode}"
                        raise RunError(
                            f"run of {spec.network}: {code}, expected a result; run it again to resume"
                        ) from None
                    del busy[ready]
                    meter.end(spec)
                    continue
                if isinstance(message, BaseException):
                    raise message
                meter.at(spec, message)
    finally:
        for process, _ in busy.values():
            process.terminate()  # it writes its checkpoint and exits
        for process, _ in busy.values():
            process.join(_PATIENCE_S)
            if process.exitcode is None:
                process.kill()
                process.join()


def _work(pipe: Any, spec: RunSpec, place: Place) -> None:
    """A process's main function: execute one run; send its iterations, and its error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the loop handles it and writes its checkpoint
    torch.set_num_threads(1)
    try:
        _run(spec, place, _teller(spec, pipe.send))
    except (KeyboardInterrupt, BrokenPipeError):  # stopped, or the parent is gone
        sys.exit(1)
    except Exception as error:
        pipe.send(error if isinstance(error, LabError) else RunError(f"run of {spec.network}: {error!r}"))


@dataclass(frozen=True)
class Evaluation:
    """The network, weights and views of experiment 6."""

    network: str | None = None
    weights: Path | None = None
    shortcut: str | None = None
    views: tuple[str, ...] = ("1-crop", "10-crop", "multi-scale")


@dataclass(frozen=True)
class Context:
    """The input of an experiment's `outcome`: its preset and its finished runs."""

    preset: Preset
    place: Place
    results: dict[RunSpec, RunResult] = field(default_factory=dict)
    evaluation: Evaluation = Evaluation()
    tell: Callable[[str], None] = lambda text: None

    def of(self, network: str, **options: object) -> list[RunResult]:
        """The results of one network, one per seed."""
        return [self.results[self.preset.spec(network, seed, **options)] for seed in self.preset.seeds]


@dataclass(frozen=True)
class Experiment:
    number: int
    name: str
    title: str
    source: str  # tables and figures of the paper
    specs: Callable[[Preset], Sequence[RunSpec]]  # the runs it needs; none for experiments that train nothing
    outcome: Callable[[Context], Outcome]
    presets: tuple[str, ...] = ("ci", "digits", "cifar10")
    note: str = ""  # on its cost, for the list
