"""The state that phases share: the run's files, the programs it starts, and the outcome of a phase."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_run import checkout, files
from gpu_run.needs import Gpu, Item, cuda_home

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
RUNNING, INTERRUPTED = "running", "interrupted"
GRACE_S = 8.0  # for a program that was asked to stop
LOG_MOST = files.MOST * 3 // 4  # bytes
TAIL = 1 << 20  # bytes of a program's output that are looked at


class Interrupted(Exception):
    """The run was told to stop; its files are written."""


@dataclass
class Outcome:
    """The outcome of a phase. `lines` go to the summary, the most important first."""

    status: str
    message: str
    lines: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # for run.json


@dataclass(frozen=True)
class Ended:
    """The end of a program: its exit status, the last lines it printed, and if it was stopped at its time limit."""

    code: int
    tail: list[str]
    out_of_time: bool

    @property
    def last(self) -> str:
        return next((line for line in reversed(self.tail) if line.strip()), "it printed nothing")


@dataclass
class Run:
    results: Path
    build: Path
    gpu: Gpu | None  # None: a dry run
    absent: list[Item]  # the optional ones
    seconds: float  # for the whole run
    root: Path = checkout.ROOT
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        files.prepare(self.results)
        self.work = self.build / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        more = {"TORCH_CUDA_ARCH_LIST": self.gpu.arch_list} if self.gpu else {"CUDA_VISIBLE_DEVICES": ""}
        more["PATH"] = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{cuda_home()}/bin"
        self.environment = checkout.environment(self.build, more, self.root)
        self.log = self.results / files.LOG
        self.deadline = self.started + self.seconds

    @property
    def dry(self) -> bool:
        return self.gpu is None

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def has(self, name: str) -> bool:
        return all(item.name != name for item in self.absent)

    def path(self, name: str) -> Path:
        """The path of a working file of the phases, deleted if it exists."""
        path = self.work / name
        path.unlink(missing_ok=True)
        return path

    def python(
        self,
        arguments: Sequence[str],
        limit_s: float,
        environment: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
        on_tick: Callable[[], None] | None = None,
    ) -> Ended:
        """Run this Python in the sources' folder; the output goes to the log.

        Args:
            arguments: of Python.
            limit_s: seconds after which the program is interrupted (SIGINT) and soon after killed.
            environment: additional variables.
            before: a program to run it under, with arguments.
            on_tick: called about once a second while it runs.
        """
        shown = shlex.join([*before, Path(sys.executable).name, *arguments])
        end, out_of_time = time.monotonic() + limit_s, False
        with open(self.log, "ab") as log:
            log.write(f"\n==== {shown}   (at most {limit_s:.0f} s)\n".encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                [*before, sys.executable, *arguments],
                cwd=self.root,
                env=self.environment | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children are stopped with it
            )
            try:
                while process.poll() is None and not out_of_time:
                    try:
                        process.wait(min(1.0, max(end - time.monotonic(), 0.01)))
                    except subprocess.TimeoutExpired:
                        out_of_time = time.monotonic() > end
                        if on_tick is not None:
                            on_tick()
            finally:
                stop(process)
        with open(self.log, "rb+") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(begin, size - TAIL))
            said = log.read()
            if size > LOG_MOST:
                log.seek(log.truncate(LOG_MOST))
                log.write(b"\n[the log of this program ends here: it is full]\n")
            log.write(f"==== exit status {process.returncode}{', out of time' if out_of_time else ''}\n".encode())
        return Ended(process.returncode, said.decode(errors="replace").splitlines()[-200:], out_of_time)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a program and everything it started that is still running."""
    if process.poll() is None:
        _signal(process, signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()
    _signal(process, signal.SIGKILL)  # its children


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, number)
