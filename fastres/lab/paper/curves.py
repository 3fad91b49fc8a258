"""Results of several seeds as values, table columns, curves and panels."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from fastres.lab.loop_state import RunResult
from fastres.lab.paper.tables import Curve, Panel, spread

Key = TypeVar("Key")
Results = Sequence[RunResult]  # of one network, one per seed


def over_seeds(results: Results, value: str, label: str, color: int, style: str = "solid") -> Curve:
    """`value`, a column of the log, against the iteration."""
    rows: dict[int, list[float]] = {}
    for result in results:
        for point in result.history:
            found = getattr(point, value)
            if found is not None:
                rows.setdefault(point.iteration, []).append(found)
    return curve(((at, v) for at, v in sorted(rows.items()) if len(v) == len(results)), label, color, style)


def curve(groups: Iterable[tuple[int, Sequence[float]]], label: str, color: int, style: str = "solid") -> Curve:
    """The mean, the least and the largest of the seeds' values at each x."""
    points = [(float(x), statistics.fmean(values), min(values), max(values)) for x, values in groups]
    x, mean, low, high = zip(*points, strict=True) if points else ((), (), (), ())
    return Curve(label, x, mean, low, high, style, color)


def error_panel(title: str, curves: Iterable[Curve], by_depth: bool = False) -> Panel:
    """Errors in percent, by iteration or by depth."""
    xlabel = "layers" if by_depth else "iteration"
    return Panel(title, xlabel, "error %", tuple(curves), percent=True, points=by_depth)


def loss_panel(title: str, curves: Iterable[Curve]) -> Panel:
    """Training losses by iteration, on a log scale."""
    return Panel(title, "iteration", "cross-entropy", tuple(curves), log=True)


def test_errors(results: Results) -> list[float]:
    """The test error at the end of each run: the last, not the best (section 4.2 tests once)."""
    return [float(r.test_error) for r in results if r.test_error is not None]


def train_errors(results: Results) -> list[float]:
    """The training error over the last tenth of each run's points, on the augmented batches as they came."""
    return [_tail(r, "train_error") for r in results]


def train_losses(results: Results) -> list[float]:
    """The training loss over the last tenth of each run's points."""
    return [_tail(r, "train_loss") for r in results]


def gradient_norms(results: Results, first: float = 0.0, last: float = 1.0) -> list[float]:
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


COLUMNS: dict[str, Callable[[Results], str]] = {
    "parameters": lambda results: f"{results[0].parameters:,}",
    "training error %": lambda results: spread(train_errors(results)),
    "training loss": lambda results: spread(train_losses(results), 1, 4),
    "test error %": lambda results: spread(test_errors(results)),
    "gradient": lambda results: spread(gradient_norms(results, 0.1), 1, 2),
}


def columns(found: Mapping[Key, Results], *names: str) -> dict[str, Callable[[Key], str]]:
    """The columns of that name for a table whose rows are the keys of `found`."""

    def column(cell: Callable[[Results], str]) -> Callable[[Key], str]:
        return lambda key: cell(found[key])

    return {name: column(COLUMNS[name]) for name in names}
