"""Result files of experiments (numbers, tables, findings, a plot), and one page with all that exist.

OUT/paper-NAME-PRESET.json, .md, .png; OUT/report.md, report.html: all of them, in the paper's order
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastres.lab.errors import OutputError, require
from fastres.lab.paper.presets import CLAIMS, PaperError, Preset
from fastres.lab.paper.runs import Experiment
from fastres.lab.paper.tables import Curve, Outcome, Panel, Table
from fastres.lab.results import new_figure, save_png, style, write_json, write_text

SCHEMA = "fastres.paper/1"
PAPER = "He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016"


def stem(experiment: str, preset: str) -> str:
    """The name of an experiment's files, without extension."""
    return f"paper-{experiment}-{preset}"


def write(
    experiment: Experiment, preset: Preset, outcome: Outcome, where: dict[str, Any], out: Path, plot: bool = True
) -> list[Path]:
    """Write JSON, Markdown and, with `plot` and something to draw, the PNG."""
    name = stem(experiment.name, preset.name)
    document = {
        "schema": SCHEMA,
        "experiment": experiment.name,
        "number": experiment.number,
        "title": experiment.title,
        "source": experiment.source,
        "preset": preset.name,
        "environment": where,
        "claims": list(CLAIMS.get(experiment.name, ())),
        "plot": f"{name}.png" if outcome.panels and plot else None,
        **outcome.to_dict(),
    }
    paths = [out / f"{name}.json", out / f"{name}.md"]
    if document["plot"]:
        paths.append(out / f"{name}.png")
        footnote = f"line: mean of the seeds, band: minimum to maximum. {machine(where)}"
        draw(outcome.panels, paths[-1], f"{experiment.title} ({experiment.source}) - {preset.title}", footnote)
    write_text(paths[1], markdown(document, "#") + "\n")
    write_json(paths[0], document)  # last: if it exists, so do the others
    return paths


def machine(where: dict[str, Any]) -> str:
    """One line: device, version, commit, date."""
    device = where["gpu"]["name"] if where["gpu"] else where["cpu"]["model"]
    commit = where["commit"] or "unknown"
    return f"{device}; torch {where['versions']['torch']}; commit {commit[:10]}; {where['time'][:10]}"


def markdown(document: dict[str, Any], heading: str = "##") -> str:
    lines = [f"{heading} {document['number']} {document['title']} ({document['source']})", ""]
    lines += [f"`{document['environment']['command']}`. {machine(document['environment'])}.", ""]
    if document["claims"]:
        lines += ["The paper says:", "", *(f"- {claim}" for claim in document["claims"]), ""]
    for table in document["tables"]:
        lines += [Table.from_dict(table).markdown(), ""]
    if document["findings"]:
        lines += ["Here:", "", *(f"- {finding}" for finding in document["findings"]), ""]
    if document["plot"]:
        lines += [f"![{document['title']}]({document['plot']})", ""]
    return "\n".join(lines).rstrip() + "\n"


def documents(out: Path) -> list[dict[str, Any]]:
    """The results in a folder, in the paper's order.

    Raises PaperError: there are none, or a file is damaged.
    """
    found = []
    for path in sorted(out.glob("paper-*.json")):
        try:
            document = json.loads(path.read_text())
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema {document['schema']!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PaperError(f"result {path}: got {error}, expected a result of fastres paper") from error
        found.append(document)
    if not found:
        raise PaperError(
            f"out: got {out}, without results; expected a folder that fastres paper EXPERIMENT has written to"
        )
    return sorted(found, key=lambda document: (document["number"], document["preset"]))


def page(out: Path, kind: str = "md") -> Path:
    """Write report.md or report.html, one page with all results in `out`; the HTML embeds its plots.

    Raises PaperError: nothing to report, or an unknown kind; OutputError: the page cannot be written.
    """
    if kind not in ("md", "html"):
        raise PaperError(f"format: got {kind!r}, expected md or html")
    text = "\n".join([f"# {_TITLE}", "", f"{PAPER}.", "", *map(markdown, documents(out))])
    if kind == "html":
        text = _html(text, out)
    path = out / f"report.{kind}"
    write_text(path, text)
    return path


def _html(text: str, out: Path) -> str:
    """Markdown as HTML, with its plots embedded."""

    def embed(plot: re.Match[str]) -> str:
        path = out / plot[1]
        try:
            return f"(data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"
        except OSError as error:
            raise OutputError(f"plot {path}: cannot be read: {error.strerror or error}") from error

    parser = require("markdown_it", "the HTML report", "cli").MarkdownIt("commonmark", {"html": False})
    body: str = parser.enable("table").render(re.sub(r"\((paper-[\w-]+\.png)\)", embed, text))
    return _STYLE.format(title=_TITLE, body=body)


_TITLE = "The paper's experiments"
_STYLE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; }}
img {{ max-width: 100%; }}
</style>
{body}
</html>
"""


COLORS = ("#1f6fb4", "#d1741f", "#3a8f4d", "#8a4fa3", "#c8452f", "#5b6570")


def draw(panels: Sequence[Panel], path: Path, title: str, footnote: str) -> None:
    """Write `panels`, two to a row, with the range of the seeds around each mean, as a PNG at `path`.

    Raises MissingExtra where matplotlib is not installed, OutputError, ValueError for no panels.
    """
    if not panels:
        raise ValueError("panels: got none, expected at least one")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(6.6 * columns, 1.2 + 4.0 * rows, dpi=120)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    shared = [p for p in panels if p.percent and not p.points]  # one scale, so that panels can be compared
    top = max((max(c.high or c.y, default=0.0) for p in shared for c in p.curves), default=0.0)
    for axes, panel in zip(grid, panels, strict=False):
        _panel(axes, panel)
        if panel in shared:
            axes.set_ylim(0, 103 * min(1.0, top))
    for axes in grid[len(panels) :]:
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
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # iterations and layers: there may be two
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
