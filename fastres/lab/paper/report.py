"""Result files of experiments, and one page with all that exist.

OUT/paper-NAME-PRESET.json   numbers, tables, findings, environment
OUT/paper-NAME-PRESET.md     tables and findings
OUT/paper-NAME-PRESET.png    the plot
OUT/report.md, report.html   all of them, in the paper's order
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from fastres.lab.errors import OutputError, require
from fastres.lab.paper.experiment import Experiment
from fastres.lab.paper.figures import draw
from fastres.lab.paper.presets import PaperError, Preset
from fastres.lab.paper.published import CLAIMS
from fastres.lab.paper.tables import Outcome, Table
from fastres.lab.results import write_atomically, write_json

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
    write_atomically(paths[1], lambda file: file.write((markdown(document, "#") + "\n").encode()))
    write_json(paths[0], document)  # last: if it exists, so do the others
    return paths


def machine(where: dict[str, Any]) -> str:
    """One line: device, version, commit, date."""
    device = where["gpu"]["name"] if where["gpu"] else where["cpu"]["model"]
    commit = where["commit"] or "unknown"
    return f"{device}; torch {where['versions']['torch']}; commit {commit[:10]}; {where['time'][:10]}"


def markdown(document: dict[str, Any], heading: str = "##") -> str:
    """One experiment as Markdown."""
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

    Raises:
        PaperError: there are none, or a file is damaged.
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

    Raises:
        PaperError: nothing to report, or an unknown kind; OutputError: the page cannot be written.
    """
    if kind not in ("md", "html"):
        raise PaperError(f"format: got {kind!r}, expected md or html")
    text = "\n".join([f"# {_TITLE}", "", f"{PAPER}.", "", *map(markdown, documents(out))])
    if kind == "html":
        text = _html(text, out)
    path = out / f"report.{kind}"
    write_atomically(path, lambda file: file.write(text.encode()))
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
