"""One case: its peers are built, judged, warmed up, and timed in interleaved rounds; pytest-benchmark gets the samples.

    warm-up     every peer is called once or twice, untimed: compilation, page faults, caches
    estimate    the least of the warm calls
    iterations  calls in one sample, the same for every peer: the fastest one's sample lasts `sample_s` or more
    rounds      what the budget pays for, at least 6 (fewer have no 95 % interval), at most --rounds
    ratio       fastres.lab.timing.paired_ratio of the samples, round by round

The garbage collector is off while the clock runs. On a GPU a sample is the time between two events.
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
    """An optional peer cannot run here: what is missing, and the command that brings it."""


@dataclass(frozen=True)
class Effort:
    """How long a case is measured."""

    budget_s: float  # timed seconds of a case of weight 1, all its peers together
    rounds: int  # the most
    min_rounds: int = 6
    sample_s: float = 2e-3  # the least one sample lasts


TINY = Effort(0.0, 2, min_rounds=2, sample_s=0.0)  # proves that everything runs; says nothing about speed
JUDGE_ONLY = Effort(0.0, 0, min_rounds=0, sample_s=0.0)


@dataclass(frozen=True)
class Verdict:
    """Whether a peer's answers are as good as eager's: `error_ratio` is its error over eager's, at most 2 passes."""

    passed: bool
    error_ratio: float | None = None
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        ratio = self.error_ratio
        finite = ratio is not None and math.isfinite(ratio)
        return {"passed": self.passed, "error_ratio": ratio if finite else None, "message": self.message}


@dataclass
class Prepared:
    """A case with its tensors: what is called, and how the results are judged.

    `build` holds what makes a call, for peers whose making may fail: an optional one is then left out, with the reason.
    """

    calls: dict[str, Callable[[], Any]]
    judge: Callable[[Mapping[str, Any]], dict[str, Verdict]]  # results of one call, by peer -> verdicts, by peer
    backend: str | None = None  # the backend that fastres' chooser takes
    timer: Timer | None = None
    build: dict[str, Callable[[], Callable[[], Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case(ABC):
    """One row of the benchmark; a subclass says what is measured."""

    what: ClassVar[str]
    weight: ClassVar[float] = 1.0  # how many budgets it may use
    baselines: ClassVar[tuple[str, ...]] = ("eager",)  # ratios are over the fastest of them
    ours: ClassVar[tuple[str, ...]] = ("fastres",)
    compiled: ClassVar[tuple[str, ...]] = (COMPILE,)
    runtimes: ClassVar[tuple[str, ...]] = ()  # other engines: beside it but with --peers eager
    alone: ClassVar[tuple[str, ...]] = ()  # timed in the same rounds, compared with nothing
    backends: ClassVar[tuple[str, ...]] = ()  # an operator's, each asked for by name beside what the chooser takes
    threads: ClassVar[int | None] = None  # None: torch's setting
    weighed: ClassVar[bool] = False  # whether its memory is measured on a CPU too

    @property
    @abstractmethod
    def id(self) -> str: ...

    @property
    @abstractmethod
    def mode(self) -> str: ...

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the case is, as plain data: shape, layout, dtype, and whatever names it."""

    @abstractmethod
    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared: ...

    def quick(self) -> bool:
        """Whether torch.compile stands beside it without --peers all."""
        return False

    def peers(self, level: str) -> tuple[str, ...]:
        compiled = self.compiled if level == "all" or (level == "quick" and self.quick()) else ()
        runtimes = self.runtimes if level != "eager" else ()
        return (*self.baselines, *self.ours, *self.backends, *runtimes, *compiled, *self.alone)

    @property
    def optional(self) -> tuple[str, ...]:
        """The peers that are left out, with the reason, where they cannot run."""
        return (*self.backends, *self.runtimes, *self.compiled)

    def absent(self, level: str) -> dict[str, str]:
        """Peers that only another --peers brings, with what to say of them."""
        return {}

    def bytes_moved(self) -> int | None:
        """The bytes that the fused kernels have to move in one call, each pass reading its tensors from memory."""
        return None

    def work(self) -> list[Work]:
        """The kernels of one call, for the roofline: what their bound is made of; empty where there is none."""
        moved = self.bytes_moved()
        return [Work(self.what, moved)] if moved else []

    def images(self) -> int | None:
        return None

    @property
    def title(self) -> str:
        return f"{self.what}: {self.id}"


@dataclass
class Result:
    """What was measured of a case. `samples` are seconds of `iterations` calls; entry i of every list is round i."""

    case: Case
    iterations: int = 1
    backend: str | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # peak bytes above what was there before

    def seconds(self, peer: str) -> float:
        """Median seconds of one call."""
        return statistics.median(self.samples[peer]) / self.iterations

    @property
    def baseline(self) -> str:
        """The fastest of the case's baselines."""
        return min((name for name in self.case.baselines if name in self.samples), key=self.seconds)

    def speedup(self, peer: str, over: str | None = None) -> Ratio:
        """How many times faster `peer` is than `over` (default: the baseline)."""
        return paired_ratio(self.samples[over or self.baseline], self.samples[peer])


class Replay:
    """A timer that gives pytest-benchmark samples measured before: 0 at a round's start, the sample at its end."""

    __name__ = "interleaved"

    def __init__(self) -> None:
        self._readings: list[float] = []

    def load(self, samples: list[float]) -> None:
        self._readings = [reading for sample in reversed(samples) for reading in (sample, 0.0)]

    def __call__(self) -> float:
        return self._readings.pop()


def measure(
    case: Case, device: torch.device, effort: Effort, peers: tuple[str, ...], timer: Timer | None = None
) -> Result:
    """Judges and times the peers of a case. An optional peer that raises is left out; any other's error is raised.

    `timer` is the case's own by default, or else the device's.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    try:
        return _measure(case, device, effort, peers, timer)
    finally:
        torch.set_num_threads(threads)


def settle_allocator() -> None:
    """Frees one block of 31 MiB, after which glibc keeps freed memory, as in any process that has trained for a while.

    Up to then it gives memory back to the system above a threshold that follows the largest block freed so far, and
    which peer then pays for faulting it in again is luck: up to twice the time of an activation of 3 MB.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _measure(case: Case, device: torch.device, effort: Effort, peers: tuple[str, ...], timer: Timer | None) -> Result:
    torch.manual_seed(0)
    settle_allocator()
    prepared = case.prepare(device, peers)
    result = Result(case, backend=prepared.backend)
    results: dict[str, Any] = {}
    for name in peers:
        try:
            if name in prepared.build:
                prepared.calls[name] = prepared.build.pop(name)()
            results[name] = prepared.calls[name]()
        except Exception as error:
            if name not in case.optional:
                raise
            result.left_out[name] = _reason(error)
    result.verdicts = prepared.judge(results)
    calls = {name: prepared.calls[name] for name in results}
    results.clear()
    if effort.rounds:
        timer = timer or prepared.timer or timer_for(device)
        with _no_gc():
            estimates = {name: _estimate(call, timer) for name, call in calls.items()}
            result.iterations = max(1, math.ceil(effort.sample_s / max(min(estimates.values()), 1e-9)))
            round_s = result.iterations * sum(estimates.values())
            rounds = int(effort.budget_s * case.weight / round_s)
            rounds = min(max(rounds, effort.min_rounds), effort.rounds)
            looped = {name: _repeat(call, result.iterations) for name, call in calls.items()}
            result.samples = interleave(looped, rounds, warmup=0, timer=timer)
    if effort.rounds and (device.type == "cuda" or case.weighed):
        result.memory = {name: _peak_memory(call, device) for name, call in calls.items()}
    del calls, prepared
    if any(name.startswith(COMPILE) for name in peers):
        torch.compiler.reset()
    gc.collect()
    return result


def _reason(error: Exception) -> str:
    """One line: an Absent says it all, any other error says its type too."""
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, Absent) else f"{type(error).__name__}: {first}"[:300]


def _estimate(call: Function, timer: Timer) -> float:
    seconds = timer(call)
    return min(seconds, timer(call)) if seconds < 0.1 else seconds


def _repeat(call: Function, iterations: int) -> Function:
    if iterations == 1:
        return call

    def loop() -> None:
        for _ in range(iterations):
            call()

    return loop


def _peak_memory(call: Function, device: torch.device) -> int:
    meter = Meter(device)
    call()
    return meter.end()[1]


class Meter:
    """Bytes that torch's allocator hands out from here to `end`, above what there was: exact, on a CPU as on a GPU."""

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
        """(in use now, the most at once)."""
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


def bandwidth(device: torch.device, elements: int = 1 << 25, repeats: int = 7) -> float:
    """Bytes/s of torch.add over fp32 tensors too large for any cache, two read and one written; the best of a few."""
    a, b, c = (torch.ones(elements, device=device) for _ in range(3))
    timer = timer_for(device)
    timer(lambda: torch.add(a, b, out=c))
    best = min(timer(lambda: torch.add(a, b, out=c)) for _ in range(repeats))
    return 3 * 4 * elements / best
