"""Results of several seeds as curves, values and tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fastres.lab.loop_state import RunResult
from fastres.lab.paper.tables import Curve


def over_seeds(results: Sequence[RunResult], value: str, label: str, colour: int, style: str = "solid") -> Curve:
    """`value`, a column of the log, against the iteration: mean, least and largest of the seeds."""
    rows: dict[int, list[float]] = {}
    for result in results:
        for point in result.history:
            found = getattr(point, value)
            if found is not None:
                rows.setdefault(point.iteration, []).append(found)
    x = [at for at, found in sorted(rows.items()) if len(found) == len(results)]
    return Curve(
        label,
        tuple(float(at) for at in x),
        tuple(statistics.fmean(rows[at]) for at in x),
        tuple(min(rows[at]) for at in x),
        tuple(max(rows[at]) for at in x),
        style,
        colour,
    )


def by_depth(groups: Sequence[tuple[int, Sequence[float]]], label: str, colour: int, style: str = "solid") -> Curve:
    """A value against the depth: mean, least and largest of the seeds."""
    return Curve(
        label,
        tuple(float(depth) for depth, _ in groups),
        tuple(statistics.fmean(values) for _, values in groups),
        tuple(min(values) for _, values in groups),
        tuple(max(values) for _, values in groups),
        style,
        colour,
    )


def test_errors(results: Sequence[RunResult]) -> list[float]:
    """At the end of each run; the last, not the best (section 4.2 tests once)."""
    return [float(r.test_error) for r in results if r.test_error is not None]


def train_errors(results: Sequence[RunResult]) -> list[float]:
    """Of the last tenth of each run's points, on the augmented batches as they came."""
    return [_tail(r, "train_error") for r in results]


def train_losses(results: Sequence[RunResult]) -> list[float]:
    return [_tail(r, "train_loss") for r in results]


def gradient_norms(results: Sequence[RunResult], first: float = 0.0, last: float = 1.0) -> list[float]:
    """The median of each run's gradient norms, from `first` to `last` of its iterations."""
    norms = []
    for r in results:
        end = r.history[-1].iteration
        found = [p.gradient_norm for p in r.history if first * end <= p.iteration <= last * end]
        norms.append(statistics.median(norm for norm in found if norm is not None))
    return norms


def _tail(result: RunResult, value: str) -> float:
    history = result.history[-max(1, len(result.history) // 10) :]
    return statistics.fmean(getattr(point, value) for point in history)
