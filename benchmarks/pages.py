"""Output shared by every result: aligned columns, Markdown tables, the line about the machine, figures, and files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastres.lab.errors import MissingExtra
from fastres.lab.results import write_json, write_text

Cells = Sequence[str]


def aligned(table: Sequence[Cells]) -> list[str]:
    """Rows of equal length as lines, their columns aligned with spaces."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def markdown_table(header: Cells, rows: Iterable[Cells]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def machine(where: dict[str, Any], measured: str = "") -> str:
    """The device, its threads, what was measured of it, and the versions, from a result's environment."""
    device = where["gpu"]["name"] if where["gpu"] else f"{where['cpu']['model']}, {where['cpu']['isa']}"
    versions, commit = where["versions"], (where["commit"] or "unknown")[:10]
    threads = f"{where['threads']} thread{'' if where['threads'] == 1 else 's'}"
    return f"{device}, {threads}{measured}; torch {versions['torch']}, fastres {versions['fastres']}, commit {commit}"


def heading(title: str, where: dict[str, Any], measured: str = "") -> list[str]:
    """The first lines of a result's page: title, machine, time and command."""
    return [f"# {title}", "", f"{machine(where, measured)}. {where['time']}. Command: `{where['command']}`.", ""]


def torch_version() -> str:
    """torch's version without its build, as file names have it."""
    return torch.__version__.partition("+")[0]


def write_result(
    base: Path, data: dict[str, Any], page: str, draw: Callable[[dict[str, Any], Path], None] | None = None
) -> tuple[list[Path], str | None]:
    """Write BASE.json, BASE.md and, where matplotlib is installed, BASE.png.

    Returns the paths, and the reason why there is no picture.
    """
    json, text, picture = (base.with_name(f"{base.name}{suffix}") for suffix in (".json", ".md", ".png"))
    write_json(json, data)
    write_text(text, page)
    if draw is None:
        return [json, text], None
    try:
        draw(data, picture)
    except MissingExtra as missing:
        return [json, text], str(missing)
    return [json, text, picture], None
