"""Result files: their schema, checked by `validate` and `load`, their pages, and what every page has."""

from __future__ import annotations

import json
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


SCHEMA_NAME, SCHEMA_VERSION = "fastres.benchmarks", 2  # 2: flops and the roofline

_RATIO = {"median": float, "low": float, "high": float, "n": int, "coverage": float}
_VERDICT = {"passed": bool, "error_ratio": (float, None), "message": str}
_PEER = {
    "samples": [float],  # seconds of `iterations` calls, round by round
    **dict.fromkeys(("median", "q1", "q3"), float),  # seconds of one call
    # of the bytes that the fused kernels must move, over the median; `of_bound` is of the roofline's bound
    **dict.fromkeys(("bytes_per_s", "of_bandwidth", "flops_per_s", "of_bound", "images_per_s"), (float, None)),
    "peak_bytes": (int, None),
    "verdict": (_VERDICT, None),  # None for a baseline
    "speedup": {str: _RATIO},  # over every peer that is not ours; the entry of the baseline is the headline
}
_CASE = {
    **dict.fromkeys(("id", "what", "mode", "baseline"), str),
    **dict.fromkeys(("layout", "dtype", "backend"), (str, None)),
    **dict.fromkeys(("threads", "iterations", "rounds"), int),
    **dict.fromkeys(("bytes_moved", "flops", "bound_s"), (float, None)),  # the roofline's, at this session's rates
    "ours": [str],
    "peers": {str: _PEER},
    "left_out": {str: str},
}
_BAR = {"name": str, "aim": str, "measured": str, "value": float, "n": int}
SCHEMA = {
    "schema": str,
    "schema_version": int,
    "environment": dict,
    "settings": {
        "budget_s": float,
        "rounds": int,
        "peers": str,
        "bandwidth_bytes_per_s": float,
        "flops_per_s": {str: float},  # by dtype
    },
    "cases": [_CASE],
    "bars": [_BAR],
}


def validate(data: Any, schema: Any = SCHEMA, where: str = "result") -> None:
    """Check data against a schema; more keys are allowed. Raises ValueError naming the place that does not conform."""
    if isinstance(schema, tuple):  # (schema, None): may be null
        if data is not None:
            validate(data, schema[0], where)
    elif isinstance(schema, list):
        _expect(isinstance(data, list), where, "a list", data)
        for i, entry in enumerate(data):
            validate(entry, schema[0], f"{where}[{i}]")
    elif isinstance(schema, dict) and str in schema:
        _expect(isinstance(data, dict), where, "an object", data)
        for key, entry in data.items():
            validate(entry, schema[str], f"{where}[{key!r}]")
    elif isinstance(schema, dict):
        _expect(isinstance(data, dict), where, "an object", data)
        for key, entry in schema.items():
            _expect(key in data, where, f"the key {key!r}", sorted(data))
            validate(data[key], entry, f"{where}.{key}")
    else:
        allowed = (int, float) if schema is float else schema
        right = isinstance(data, allowed) and not (isinstance(data, bool) and schema is not bool)
        _expect(right, where, f"{schema.__name__}", data)


def _expect(right: bool, where: str, expected: str, got: Any) -> None:
    if not right:
        raise ValueError(f"{where}: got {got!r}, expected {expected}")


def load(path: Path) -> dict[str, Any]:
    """Read a result file. Raises OSError if it cannot be read, ValueError if it is not a valid result."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and Unicode's are both
        raise ValueError(f"not a JSON file: {error}") from error
    return check(data)


def check(data: Any) -> dict[str, Any]:
    """Return the data of a result. Raises ValueError saying what is wrong with them."""
    got = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if got != SCHEMA_NAME:
        wanted = f"expected the key 'schema' to be {SCHEMA_NAME!r}"
        raise ValueError(f"not a result of these benchmarks: got the schema {got!r}, {wanted}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version: got {data.get('schema_version')!r}, expected {SCHEMA_VERSION}: the file was written by "
            "another version of the benchmarks; read it with the scripts of that version"
        )
    validate(data)
    return data
