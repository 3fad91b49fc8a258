"""Figures of the results, drawn with matplotlib's object interface: no display, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres.lab.errors import require
from fastres.lab.results import write_atomically

OURS, THEIRS, FAILED = "#1f6fb4", "#9aa3ab", "#c8452f"


@dataclass(frozen=True)
class Bar:
    name: str
    images_per_s: float
    label: str  # written at the bar's end, such as "1.31x"
    ours: bool
    passed: bool = True  # False: the answers were wrong, and the bar shows it


def new_figure(width: float, height: float, dpi: int) -> Any:
    """An empty figure of width x height inches; raises MissingExtra where matplotlib is not installed."""
    figure = require("matplotlib.figure", "the figure", "viz").Figure((width, height), dpi, layout="constrained")
    require("matplotlib.backends.backend_agg", "the figure", "viz").FigureCanvasAgg(figure)
    return figure


def save_png(figure: Any, path: Path, footnote: str = "") -> None:
    """Write the figure, with a footnote, as a PNG; raises OutputError where `path` cannot be written."""
    if footnote:
        figure.supxlabel(footnote, x=0.01, ha="left", fontsize=8, color="#555555")
    write_atomically(path, lambda file: figure.savefig(file, format="png", metadata={"Software": "fastres"}))


def style(axes: Any, title: str, grid: str = "both", size: float = 10) -> None:
    """The common look of all axes: title on the left, a light grid behind the data, no box."""
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold")
    axes.grid(True, axis=grid, color="#e0e0e0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def throughput_chart(bars: Sequence[Bar], path: Path, title: str, footnote: str = "") -> None:
    """Write a horizontal bar chart of images/s, first row on top, as a PNG at `path`.

    Raises MissingExtra where matplotlib is not installed, OutputError where `path` cannot be written, ValueError for no
    bars.
    """
    if not bars:
        raise ValueError("bars: got none, expected at least one")
    figure = new_figure(8, 1.5 + 0.55 * len(bars), dpi=150)
    axes = figure.add_subplot()
    style(axes, title, grid="x")
    longest = max(bar.images_per_s for bar in bars)
    for place, bar in enumerate(bars):
        color = FAILED if not bar.passed else OURS if bar.ours else THEIRS
        axes.barh(place, bar.images_per_s, height=0.66, color=color, hatch=None if bar.passed else "//")
        axes.text(bar.images_per_s + 0.012 * longest, place, bar.label, va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.34 * longest)  # room for the labels
    axes.set_xlabel("images/s (longer is faster)")
    axes.tick_params(axis="y", length=0)
    save_png(figure, path, footnote)
