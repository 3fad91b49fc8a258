"""An experiment's plot: panels of curves, with the range of the seeds around each mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastres.lab.errors import require
from fastres.lab.figures import new_figure, save_png, style
from fastres.lab.paper.tables import Curve, Panel

COLORS = ("#1f6fb4", "#d1741f", "#3a8f4d", "#8a4fa3", "#c8452f", "#5b6570")


def draw(panels: Sequence[Panel], path: Path, title: str, footnote: str) -> None:
    """Write `panels`, two to a row, as a PNG at `path`.

    Raises:
        MissingExtra: matplotlib is not installed. OutputError: `path` cannot be written. ValueError: no panels.
    """
    if not panels:
        raise ValueError("panels: got none, expected at least one")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(6.6 * columns, 1.2 + 4.0 * rows, dpi=120)
    grid = figure.subplots(rows, columns, squeeze=False)
    shared = [p for p in panels if p.percent and not p.points]  # one scale, so that panels can be compared
    top = max((max(c.high or c.y, default=0.0) for p in shared for c in p.curves), default=0.0)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _panel(axes, panel)
        if panel in shared:
            axes.set_ylim(0, 103 * min(1.0, top))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    save_png(figure, path, footnote)


def _panel(axes: Any, panel: Panel) -> None:
    for curve in panel.curves:
        _curve(axes, curve, 100.0 if panel.percent else 1.0, panel.points)
    style(axes, panel.title)
    axes.set_xlabel(panel.xlabel, fontsize=9)
    axes.set_ylabel(panel.ylabel, fontsize=9)
    axes.tick_params(labelsize=8, which="both")
    axes.xaxis.get_major_locator().set_params(
        integer=True, min_n_ticks=1
    )  # iterations and layers, of which there may be two
    if panel.log:
        axes.set_yscale("log")
        _label_plainly(axes)
    elif not any(min(curve.low or curve.y, default=0.0) < 0 for curve in panel.curves):
        axes.set_ylim(bottom=0)
    if panel.points:
        axes.set_xticks(sorted({x for curve in panel.curves for x in curve.x}))
    axes.legend(fontsize=7.5, frameon=False, ncols=2 if len(panel.curves) > 4 else 1)


def _label_plainly(axes: Any) -> None:
    """Label a log axis 0.1 and 1, not by powers of 10, at the places where matplotlib labels it."""

    class Plain(require("matplotlib.ticker", "the figure", "viz").LogFormatter):  # type: ignore[misc]
        def __call__(self, value: float, place: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, place) else ""

    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain())


def _curve(axes: Any, curve: Curve, scale: float, points: bool) -> None:
    look: dict[str, Any] = {"color": COLORS[curve.color % len(COLORS)], "linestyle": curve.style, "markersize": 4}
    width = 1.6 * (0.6 if curve.style == "dashed" else 1.0)
    y = [scale * value for value in curve.y]
    axes.plot(curve.x, y, **look, linewidth=width, label=curve.label, marker="o" if points or len(y) == 1 else None)
    if curve.low and curve.low != curve.high:
        low, high = ([scale * value for value in values] for values in (curve.low, curve.high))
        axes.fill_between(curve.x, low, high, color=look["color"], alpha=0.13, linewidth=0)
