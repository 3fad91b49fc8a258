"""Interleaved, paired timing.

Machines drift: clocks, caches and neighbors change from one second to the next. So candidates are not timed one after
the other but in rounds: a round calls every candidate once, and the order rotates so that none always follows the same
one. With t_a[i] and t_b[i] the times of a and b in round i, the speedup of b over a is

    ratio[i] = t_a[i] / t_b[i]          paired: whatever slowed the round down divides out
    ratio    = median(ratio[i])
    interval = [ratio_(k+1), ratio_(n-k)]   order statistics of the n ratios; exact for any distribution:
    coverage = 1 - 2 P(Binomial(n, 1/2) <= k),  with the largest k that keeps it at 95 % or more

Fewer than six rounds cannot reach 95 %: the interval is then the range, and `coverage` says how much it covers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

Function = Callable[[], object]
Timer = Callable[[Function], float]  # runs the function once, returns its seconds


@dataclass(frozen=True)
class Ratio:
    """The speedup of b over a: the median of the paired ratios, and an interval around it."""

    median: float
    low: float
    high: float
    n: int  # pairs
    coverage: float  # the probability that [low, high] covers the true median; at least 0.95 with six or more pairs

    def __str__(self) -> str:
        """1.31x [1.24, 1.40]; the interval only if it covers 95 %."""
        interval = f"[{self.low:.2f}, {self.high:.2f}]" if self.coverage >= 0.95 else "(too few rounds)"
        return f"{self.median:.2f}x {interval}"

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def wall_timer(clock: Callable[[], float] = time.perf_counter) -> Timer:
    """A timer that reads a clock: right wherever the work is done when the call returns, as on a CPU."""

    def seconds(function: Function) -> float:
        start = clock()
        function()
        return clock() - start

    return seconds


def event_timer(device: torch.device, before: Function | None = None) -> Timer:
    """A timer that uses CUDA events on the device's current stream; the GPU starts idle, so launch gaps count.

    `before` runs ahead of each call, untimed, for example to flush the L2 cache. Its work on the GPU continues while
    the call is being launched, and hides launch gaps for as long as it lasts.
    """

    def seconds(function: Function) -> float:
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            if before is not None:
                before()
            start.record()
            function()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

    return seconds


def timer_for(device: torch.device | str) -> Timer:
    """A timer for the device: CUDA events on a GPU, the wall clock elsewhere."""
    device = torch.device(device)
    return event_timer(device) if device.type == "cuda" else wall_timer()


def interleave(
    fns: Mapping[str, Function],
    rounds: int,
    warmup: int = 1,
    budget_s: float | Mapping[str, float] = math.inf,
    *,
    min_rounds: int = 3,
    timer: Timer | None = None,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Time the functions in interleaved rounds.

    Args:
        fns: what to time, by name.
        rounds: the most rounds to run.
        warmup: untimed calls of each function, to keep planning, compiling and page faults out of the samples.
        budget_s: seconds of timed calls for each function, one number or one per name. A function that has used its
            budget up drops out of the later rounds; `min_rounds` are run whatever they cost.
        timer: how one call is timed (default: the wall clock; see `timer_for` for a GPU).
        on_round: called after every round with the number of rounds done.

    Returns seconds, by name. Entry i is round i for every function, so lists of different lengths still pair up.

    >>> samples = interleave({"a": lambda: sum(range(9)), "b": lambda: sum(range(99))}, rounds=7)
    >>> len(samples["a"]), paired_ratio(samples["a"], samples["b"]).n
    (7, 7)
    """
    if rounds < 1 or warmup < 0 or min_rounds < 1:
        raise ValueError(f"got rounds={rounds}, warmup={warmup}, min_rounds={min_rounds}; expected >= 1, >= 0, >= 1")
    timer = timer or wall_timer()
    names = list(fns)
    budget = {name: budget_s[name] if isinstance(budget_s, Mapping) else budget_s for name in names}
    for name in names:
        for _ in range(warmup):
            timer(fns[name])
    samples: dict[str, list[float]] = {name: [] for name in names}
    active = names
    for done in range(rounds):
        active = [name for name in active if done < min_rounds or sum(samples[name]) < budget[name]]
        if not active:
            break
        first = done % len(active)
        for name in active[first:] + active[:first]:
            samples[name].append(timer(fns[name]))
        if on_round is not None:
            on_round(done + 1)
    return samples


def paired_ratio(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Ratio:
    """The speedup of b over a, from two lists of times that `interleave` returned: above 1 if b is faster.

    The lists may differ in length: entry i of both belongs to round i, and only rounds that both took part in count.

    >>> paired_ratio([2.0, 2.2, 4.0, 2.0, 2.0, 2.0], [1.0, 1.1, 2.0, 1.0, 1.0, 1.0])
    Ratio(median=2.0, low=2.0, high=2.0, n=6, coverage=0.96875)
    """
    ratios = sorted(x / y for x, y in zip(a, b, strict=False))
    n = len(ratios)
    if n == 0:
        raise ValueError(f"got {len(a)} and {len(b)} samples; expected at least one pair")
    low, coverage = 0, _coverage(n, 0)
    while 2 * (low + 1) < n and _coverage(n, low + 1) >= confidence:
        low, coverage = low + 1, _coverage(n, low + 1)
    return Ratio(statistics.median(ratios), ratios[low], ratios[n - 1 - low], n, coverage)


def _coverage(n: int, k: int) -> float:
    """The probability that the (k+1)-th smallest and the (k+1)-th largest of n samples enclose the median."""
    return 1.0 - 2.0 * sum(math.comb(n, j) for j in range(k + 1)) / 2.0**n
