"""Figures of the results, drawn with matplotlib's object interface: no display, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastres.lab.errors import MissingExtra
from fastres.lab.results import write_atomically

OURS, THEIRS, FAILED = "#1f6fb4", "#9aa3ab", "#c8452f"


@dataclass(frozen=True)
class Bar:
    """One row of a throughput chart."""

    name: str
    images_per_s: float
    label: str  # written at the bar's end, such as "1.31x"
    ours: bool
    passed: bool = True  # False: the answers were wrong, and the bar is drawn so


def throughput_chart(bars: Sequence[Bar], path: Path, title: str, footnote: str = "") -> None:
    """Writes a horizontal bar chart of images/s, first row on top, as a PNG at `path`.

    Raises MissingExtra where matplotlib is not installed, OutputError where `path` cannot be written, ValueError for no
    bars.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingExtra('the chart needs matplotlib: pip install "fastres[viz]"') from missing
    if not bars:
        raise ValueError("bars: got none, expected at least one")

    figure = Figure(figsize=(8, 1.5 + 0.55 * len(bars)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = list(range(len(bars)))
    drawn = axes.barh(
        places,
        [bar.images_per_s for bar in bars],
        height=0.66,
        color=[FAILED if not bar.passed else OURS if bar.ours else THEIRS for bar in bars],
    )
    for rectangle, bar in zip(drawn, bars, strict=True):
        if not bar.passed:
            rectangle.set_hatch("//")
    longest = max(bar.images_per_s for bar in bars)
    for place, bar in zip(places, bars, strict=True):
        axes.text(bar.images_per_s + 0.012 * longest, place, bar.label, va="center", fontsize=9)
    axes.set_yticks(places, [bar.name for bar in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.34 * longest)  # room for the labels
    axes.set_xlabel("images/s (longer is faster)")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    if footnote:
        figure.supxlabel(footnote, x=0.01, ha="left", fontsize=7.5, color="#555555")
    write_atomically(path, lambda file: figure.savefig(file, format="png", metadata={"Software": "fastres"}))
