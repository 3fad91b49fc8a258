"""Outcomes of experiments as data: tables, curves and comparisons of seeds, for terminal, files and report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from fastres.lab.loop_state import RunResult

Key = TypeVar("Key")
Results = Sequence[RunResult]  # of one network, one per seed


@dataclass(frozen=True)
class Table:
    """A title, a head, rows of text as long as the head, and notes below."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, title: str, columns: Mapping[str, Callable[[Key], str]], rows: Iterable[Key], *notes: str) -> Table:
        """A table from its columns, each a function from a row's key to the text of the cell."""
        return cls(title, tuple(columns), tuple(tuple(cell(key) for cell in columns.values()) for key in rows), notes)

    def markdown(self) -> str:
        """The table as GitHub's Markdown.

        >>> print(Table("Counts", ("net", "layers"), (("resnet20", "20"),)).markdown())
        ### Counts
        <BLANKLINE>
        | net | layers |
        | --- | --- |
        | resnet20 | 20 |
        """
        lines = [f"### {self.title}", "", _row(self.head), _row(["---"] * len(self.head)), *map(_row, self.rows)]
        return "\n".join([*lines, *(line for note in self.notes for line in ("", note))])

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Table:
        return cls(data["title"], tuple(data["head"]), tuple(map(tuple, data["rows"])), tuple(data["notes"]))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@dataclass(frozen=True)
class Curve:
    """A line of a plot: mean, minimum and maximum of the seeds at each x."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    style: str = "solid"  # or "dashed"
    color: int = 0  # curves of one color belong together


@dataclass(frozen=True)
class Panel:
    title: str
    xlabel: str
    ylabel: str
    curves: tuple[Curve, ...]
    percent: bool = False
    log: bool = False
    points: bool = False  # markers at the values, where they are few


@dataclass(frozen=True)
class Outcome:
    """The results of an experiment: its tables, one line for each claim of the paper, and its plot."""

    tables: tuple[Table, ...]
    findings: tuple[str, ...]
    panels: tuple[Panel, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)  # the underlying numbers, for the JSON

    def to_dict(self) -> dict[str, Any]:
        return {
            "tables": [asdict(table) for table in self.tables],
            "findings": list(self.findings),
            "data": self.data,
        }


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as percent; a dash for None."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def spread(values: Sequence[float], scale: float = 100.0, digits: int = 2) -> str:
    """Mean ± sample standard deviation, scaled; a single value stands by itself.

    >>> spread([0.08, 0.10])
    '9.00 ± 1.41'
    """
    if not values:
        return "-"
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


@dataclass(frozen=True)
class Comparison:
    """The means of two samples of a value, `b` against `a`; the difference is clear beyond two standard errors.

    >>> print(Comparison("plain-20", (0.01, 0.01), "plain-56", (0.05, 0.05)))
    plain-56 5.00 % against plain-20 1.00 %: higher
    >>> print(Comparison("A", (0.01, 0.03), "B", (0.03, 0.02)))
    B 2.50 % against A 2.00 %: higher, within two standard errors
    """

    name_a: str
    a: Sequence[float]
    name_b: str
    b: Sequence[float]
    scale: float = 100.0

    @property
    def difference(self) -> float:
        return statistics.fmean(self.b) - statistics.fmean(self.a)

    @property
    def clear(self) -> bool:
        """True if the difference exceeds two of its standard errors; for single values, if there is any."""
        error = 0.0
        if len(self.a) > 1 and len(self.b) > 1:
            error = math.sqrt(sum(statistics.variance(each) / len(each) for each in (self.a, self.b)))
        return abs(self.difference) > 2 * error

    def holds(self, higher: bool) -> str:
        """The answer to "is `b` higher?" (or lower): "yes", "no", or "not decided" within two standard errors."""
        if not self.clear:
            return "not decided"
        return "yes" if (self.difference > 0) == higher else "no"

    def finding(self, claim: str, higher: bool) -> str:
        """One line: the claim, the answer, and the two means."""
        return f"{claim} - {self.holds(higher)}: {self}"

    def __str__(self) -> str:
        word = "higher" if self.difference > 0 else "lower" if self.difference < 0 else "equal"
        near = "" if self.clear or not self.difference else ", within two standard errors"
        unit, digits = (" %", 2) if self.scale == 100 else ("", 3)
        values = [f"{self.scale * statistics.fmean(each):.{digits}f}{unit}" for each in (self.a, self.b)]
        return f"{self.name_b} {values[1]} against {self.name_a} {values[0]}: {word}{near}"


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


def per_seed(results: Results, value: str) -> list[float]:
    """One number for each run.

    test_error                 at the end of the run: the last, not the best (section 4.2 tests once)
    train_error, train_loss    the mean over the last tenth of the points, on the augmented batches as they came
    gradient_norm              the median over the last nine tenths of the iterations
    """
    return [_of_run(result, value) for result in results]


def _of_run(result: RunResult, value: str) -> float:
    history = result.history
    if value == "test_error":
        assert result.test_error is not None  # of a finished run
        return result.test_error
    if value == "gradient_norm":
        late = [point for point in history if point.iteration >= 0.1 * history[-1].iteration]
        return statistics.median(point.gradient_norm for point in late if point.gradient_norm is not None)
    return statistics.fmean(getattr(point, value) for point in history[-max(1, len(history) // 10) :])


_COLUMNS = {  # title -> value, scale, digits
    "training error %": ("train_error", 100.0, 2),
    "training loss": ("train_loss", 1.0, 4),
    "test error %": ("test_error", 100.0, 2),
    "gradient": ("gradient_norm", 1.0, 2),
}


def columns(found: Mapping[Key, Results], *titles: str) -> dict[str, Callable[[Key], str]]:
    """The columns of these titles for a table whose rows are the keys of `found`."""

    def column(title: str) -> Callable[[Key], str]:
        if title == "parameters":
            return lambda key: f"{found[key][0].parameters:,}"
        value, scale, digits = _COLUMNS[title]
        return lambda key: spread(per_seed(found[key], value), scale, digits)

    return {title: column(title) for title in titles}
