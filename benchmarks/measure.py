"""Measure one case: build its peers, judge their answers, warm them up, and time them in interleaved rounds.

    warm-up     every peer is called once or twice, untimed, for compilation, page faults and caches
    estimate    the shorter of the warm calls
    iterations  calls per sample, the same for every peer, so that the fastest one's sample lasts `sample_s` or more
    rounds      as many as the budget pays for, at least 6 (fewer have no 95 % interval), at most --rounds
    ratio       fastres.lab.timing.paired_ratio of the samples, round by round

The garbage collector is off while the clock runs. On a GPU a sample is the time between two events. pytest-benchmark
gets the samples through Replay.
"""

from __future__ import annotations

import gc
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.profiler import ProfilerActivity, profile

from fastres.lab.timing import Function, Ratio, Timer, interleave, paired_ratio, timer_for
from roofline import Work

COMPILE = "compile"  # the names of torch.compile's peers begin with it


class Absent(Exception):
    """An optional peer cannot run here. The message says what is missing and the command that installs it."""


@dataclass(frozen=True)
class Effort:
    budget_s: float  # timed seconds for a case of weight 1, all peers together
    rounds: int  # at most
    min_rounds: int = 6
    sample_s: float = 2e-3  # the shortest sample


TINY = Effort(0.0, 2, min_rounds=2, sample_s=0.0)  # proves that everything runs and says nothing about speed
JUDGE_ONLY = Effort(0.0, 0, min_rounds=0, sample_s=0.0)


@dataclass(frozen=True)
class Verdict:
    """The referee's judgment of a peer. `error_ratio` is its error over eager's; at most 2 passes."""

    passed: bool
    error_ratio: float | None = None
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        ratio = self.error_ratio
        finite = ratio is not None and math.isfinite(ratio)
        return {"passed": self.passed, "error_ratio": ratio if finite else None, "message": self.message}


@dataclass
class Prepared:
    """A case with its tensors: the calls to time and how to judge their results.

    Peers that may fail to build are in `build` instead of `calls`. If an optional one fails, it is left out and the
    reason is recorded.
    """

    calls: dict[str, Callable[[], Any]]
    judge: Callable[[Mapping[str, Any]], dict[str, Verdict]]  # results of one call by peer -> verdicts by peer
    backend: str | None = None  # the backend that fastres chooses
    timer: Timer | None = None
    build: dict[str, Callable[[], Callable[[], Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case(ABC):
    what: ClassVar[str]
    weight: ClassVar[float] = 1.0  # how many budgets it may use
    baselines: ClassVar[tuple[str, ...]] = ("eager",)  # speed-ups are over the fastest of these
    ours: ClassVar[tuple[str, ...]] = ("fastres",)
    compiled: ClassVar[tuple[str, ...]] = (COMPILE,)
    runtimes: ClassVar[tuple[str, ...]] = ()  # other engines, left out with --peers eager
    alone: ClassVar[tuple[str, ...]] = ()  # timed in the same rounds and compared with nothing
    backends: ClassVar[tuple[str, ...]] = ()  # an operator's backends to request by name, in addition to the chosen one
    threads: ClassVar[int | None] = None  # None keeps torch's setting
    weighed: ClassVar[bool] = False  # measure its memory on a CPU too

    @property
    @abstractmethod
    def id(self) -> str: ...

    @property
    @abstractmethod
    def mode(self) -> str: ...

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The case as plain data: shape, layout, dtype, and what else names it."""

    @abstractmethod
    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared: ...

    def quick(self) -> bool:
        """True for a case that runs torch.compile at --peers quick."""
        return False

    def peers(self, level: str) -> tuple[str, ...]:
        compiled = self.compiled if level == "all" or (level == "quick" and self.quick()) else ()
        runtimes = self.runtimes if level != "eager" else ()
        return (*self.baselines, *self.ours, *self.backends, *runtimes, *compiled, *self.alone)

    @property
    def optional(self) -> tuple[str, ...]:
        """Peers that may fail: they are then left out, with the reason."""
        return (*self.backends, *self.runtimes, *self.compiled)

    def absent(self, level: str) -> dict[str, str]:
        """Peers that this level leaves out, with the reason to print."""
        return {}

    def bytes_moved(self) -> int | None:
        """Bytes that the fused kernels must move in one call when every pass reads its tensors from memory."""
        return None

    def work(self) -> list[Work]:
        """The kernels of one call, for the roofline's bound; empty where there is none."""
        moved = self.bytes_moved()
        return [Work(self.what, moved)] if moved else []

    def images(self) -> int | None:
        return None

    @property
    def title(self) -> str:
        return f"{self.what}: {self.id}"


@dataclass
class Result:
    """The measurements of a case. A sample is the seconds of `iterations` calls; entry i of every list is round i."""

    case: Case
    iterations: int = 1
    backend: str | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # peak bytes, minus those in use before

    def seconds(self, peer: str) -> float:
        """The median time of one call, in seconds."""
        return statistics.median(self.samples[peer]) / self.iterations

    @property
    def baseline(self) -> str:
        """The fastest of the case's baselines."""
        return min((name for name in self.case.baselines if name in self.samples), key=self.seconds)

    def speedup(self, peer: str, over: str | None = None) -> Ratio:
        """The speed-up of `peer` over `over`, by default over the baseline."""
        return paired_ratio(self.samples[over or self.baseline], self.samples[peer])


class Replay:
    """A timer that replays measured samples to pytest-benchmark: 0 at a round's start, the sample at its end."""

    __name__ = "interleaved"

    def load(self, samples: list[float]) -> None:
        self._readings = [reading for sample in reversed(samples) for reading in (sample, 0.0)]

    def __call__(self) -> float:
        return self._readings.pop()


def measure(
    case: Case, device: torch.device, effort: Effort, peers: tuple[str, ...], timer: Timer | None = None
) -> Result:
    """Judge and time the peers of a case. Another engine or backend that raises is left out.

    The default timer is the case's own, or else the device's.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    try:
        return _measure(case, device, effort, peers, timer)
    finally:
        torch.set_num_threads(threads)


def _measure(case: Case, device: torch.device, effort: Effort, peers: tuple[str, ...], timer: Timer | None) -> Result:
    torch.manual_seed(0)
    # Free one block of 31 MiB: glibc returns freed memory to the system above a threshold that grows with the largest
    # block freed so far. Below it, it is luck who pays to fault the memory back in: up to twice the time at 3 MB.
    torch.empty(31 << 20, dtype=torch.uint8)
    prepared = case.prepare(device, peers)
    result, results = Result(case, backend=prepared.backend), {}
    for name in peers:
        try:
            if name in prepared.build:
                prepared.calls[name] = prepared.build.pop(name)()
            results[name] = prepared.calls[name]()
        except Exception as error:
            if name in (*case.baselines, *case.ours, *case.alone):
                raise
            result.left_out[name] = one_line(error).removeprefix("Absent: ")[:300]
    result.verdicts = prepared.judge(results)
    calls = {name: prepared.calls[name] for name in results}
    results.clear()
    if effort.rounds:
        timer = timer or prepared.timer or timer_for(device)
        with _no_gc():
            estimates = {name: _estimate(call, timer) for name, call in calls.items()}
            n = result.iterations = max(1, math.ceil(effort.sample_s / max(min(estimates.values()), 1e-9)))
            rounds = int(effort.budget_s * case.weight / (n * sum(estimates.values())))
            rounds = min(max(rounds, effort.min_rounds), effort.rounds)
            looped = {name: _repeat(call, n) for name, call in calls.items()}
            result.samples = interleave(looped, rounds, warmup=0, timer=timer)
        if device.type == "cuda" or case.weighed:
            for name, call in calls.items():
                meter = Meter(device)
                call()
                result.memory[name] = meter.end()[1]
    del calls, prepared
    if any(name.startswith(COMPILE) for name in peers):
        torch.compiler.reset()
    gc.collect()
    return result


def one_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _estimate(call: Function, timer: Timer) -> float:
    seconds = timer(call)
    return min(seconds, timer(call)) if seconds < 0.1 else seconds


def _repeat(call: Function, iterations: int) -> Function:
    def loop() -> None:
        for _ in range(iterations):
            call()

    return call if iterations == 1 else loop


class Meter:
    """Bytes that torch's allocator hands out between construction and `end`; exact on CPUs and GPUs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            self._profile.__enter__()

    def end(self) -> tuple[int, int]:
        """Bytes in use now and at the peak, minus those in use at the start."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            now, most = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
            return now - self._before, most - self._before
        self._profile.__exit__(None, None, None)
        assert self._profile.profiler is not None
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return now, most


@contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def cuda_graph(call: Callable[[], Any], device: torch.device, warmup: int = 1) -> Callable[[], Any]:
    """The call as one CUDA graph, so that kernels are timed and not Python; on a CPU the call itself.

    Warm-up calls run outside the capture, where cuDNN may choose its algorithms. A replay returns the captured outputs.
    """
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay
