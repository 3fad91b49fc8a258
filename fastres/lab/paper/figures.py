"""An experiment's plot: panels of curves with the range of the seeds around each mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastres.lab.errors import MissingExtra
from fastres.lab.paper.tables import Curve, Panel
from fastres.lab.results import write_atomically

COLOURS = ("#1f6fb4", "#d1741f", "#3a8f4d", "#8a4fa3", "#c8452f", "#5b6570")


def draw(panels: Sequence[Panel], path: Path, title: str, footnote: str) -> None:
    """Writes `panels`, at most two beside each other, as a PNG at `path`.

    Raises:
        MissingExtra: matplotlib is not installed. OutputError: `path` cannot be written. ValueError: no panels.
    """
    if not panels:
        raise ValueError("panels: got none, expected at least one")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingExtra('the plot needs matplotlib, which is not installed: pip install "fastres[viz]"') from missing
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.6 * columns, 1.2 + 4.0 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _panel(axes, panel)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    top = max(
        (max(c.high or c.y, default=0.0) for p in panels if p.percent and not p.points for c in p.curves), default=0
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        if panel.percent and not panel.points:
            axes.set_ylim(0, 103 * min(1.0, top))  # alike, to compare panels
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(footnote, x=0.01, ha="left", fontsize=8, color="#555555")
    write_atomically(path, lambda file: figure.savefig(file, format="png", metadata={"Software": "fastres"}))


def _panel(axes: Any, panel: Panel) -> None:
    scale = 100.0 if panel.percent else 1.0
    for curve in panel.curves:
        _curve(axes, curve, scale, panel.points)
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(panel.xlabel, fontsize=9)
    axes.set_ylabel(panel.ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    if panel.log:
        axes.set_yscale("log")
    elif not any(min(curve.low or curve.y, default=0.0) < 0 for curve in panel.curves):
        axes.set_ylim(bottom=0)
    if panel.points:
        axes.set_xticks(sorted({x for curve in panel.curves for x in curve.x}))
    axes.grid(True, color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7.5, frameon=False, ncols=2 if len(panel.curves) > 4 else 1)


def _curve(axes: Any, curve: Curve, scale: float, points: bool) -> None:
    colour = COLOURS[curve.colour % len(COLOURS)]
    line = "--" if curve.style == "dashed" else "-"
    width = curve.width * (0.6 if curve.style == "dashed" else 1.0)
    y = [scale * value for value in curve.y]
    axes.plot(
        curve.x, y, line, color=colour, linewidth=width, label=curve.label, marker="o" if points else None, markersize=4
    )
    if curve.low and curve.low != curve.high:
        low, high = ([scale * value for value in values] for values in (curve.low, curve.high))
        axes.fill_between(curve.x, low, high, color=colour, alpha=0.13, linewidth=0)
