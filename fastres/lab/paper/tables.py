"""Tables and outcomes of experiments, as data: what the terminal, the result files and the report are made of."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """A title, a head, rows of text as long as the head, and notes below."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

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

    def html(self) -> str:
        """The table as HTML, every text escaped."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>\n" for row in self.rows)
        notes = "".join(f"<p class=note>{html.escape(note)}</p>\n" for note in self.notes)
        return f"<h3>{html.escape(self.title)}</h3>\n<table><tr>{head}</tr>\n{rows}</table>\n{notes}"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Table:
        return cls(data["title"], tuple(data["head"]), tuple(map(tuple, data["rows"])), tuple(data["notes"]))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@dataclass(frozen=True)
class Curve:
    """A line of a plot: mean, least and largest of the seeds at each x."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    style: str = "solid"  # or "dashed"
    colour: int = 0  # curves of one colour belong together
    width: float = 1.6


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    xlabel: str
    ylabel: str
    curves: tuple[Curve, ...]
    percent: bool = False
    log: bool = False
    points: bool = False  # markers at the values: few and far between


@dataclass(frozen=True)
class Outcome:
    """What an experiment found: its tables, one line for each claim of the paper, and what its plot shows."""

    tables: tuple[Table, ...]
    findings: tuple[str, ...]
    panels: tuple[Panel, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)  # the numbers behind, for the JSON

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
    """Mean +- sample standard deviation, scaled; the value alone where there is one.

    >>> spread([0.08, 0.10])
    '9.00 +- 1.41'
    """
    if not values:
        return "-"
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} +- {scale * statistics.stdev(values):.{digits}f}"


def compare(
    name_a: str, a: Sequence[float], name_b: str, b: Sequence[float], scale: float = 100.0, unit: str = " %"
) -> str:
    """One sentence: b against a, means and whether the difference is larger than its standard error times two.

    >>> compare("plain-20", [0.01, 0.01], "plain-56", [0.05, 0.05])
    'plain-56 5.00 % against plain-20 1.00 %: higher'
    """
    means = statistics.fmean(a), statistics.fmean(b)
    error = 0.0
    if len(a) > 1 and len(b) > 1:
        error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
    difference = means[1] - means[0]
    word = "higher" if difference > 0 else "lower" if difference < 0 else "equal"
    if difference and abs(difference) <= 2 * error:
        word += ", within two standard errors"
    digits = 2 if scale == 100 else 3
    return f"{name_b} {scale * means[1]:.{digits}f}{unit} against {name_a} {scale * means[0]:.{digits}f}{unit}: {word}"
