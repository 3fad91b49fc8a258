"""Result files, written whole or not at all, with what it takes to reproduce them; figures without a display."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch
from torch.backends import cudnn

import fastres
from fastres import _files
from fastres._info import ENVIRONMENT, PACKAGES, cpu, gpu, load_average, version
from fastres.lab.errors import OutputError, require
from fastres.ops._conv_backends import tf32_allowed


def prepare_folder(folder: Path, files: list[str]) -> None:
    """Create `folder` and prove that `files` can be written in it, before any work is done.

    Raises OutputError, naming the path and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"output folder {folder}: cannot be written: {error.strerror or error}") from error
    for name in files:
        if (folder / name).is_dir():
            raise OutputError(f"output file {folder / name}: got a folder, expected a file or nothing")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` on a file that takes the place of `path` once it is whole (fastres/_files.py).

    Raises OutputError.
    """
    try:
        _files.write_atomically(path, write)
    except OSError as error:
        raise OutputError(f"output file {path}: cannot be written: {error.strerror or error}") from error


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write strict JSON (no NaN), indented, atomically."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises OutputError."""
    write_atomically(path, lambda file: file.write(text.encode()))


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """The command, commit, versions, CPU, GPU, threads and flags behind a result."""
    return {
        "command": command,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {"fastres": fastres.__version__, **{name: version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "device": str(device),
        "cpu": cpu(),
        "gpu": {**gpu(device), "cuda": torch.version.cuda, "cudnn": cudnn.version()} if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "flags": {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn.allow_tf32": tf32_allowed(),
            "cudnn.benchmark": cudnn.benchmark,
            "cudnn.deterministic": cudnn.deterministic,
            "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        },
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _commit() -> str | None:
    """The checkout's commit, with "+" if files differ from it; None for an installed package."""
    root = Path(fastres.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    how: Any = {"capture_output": True, "text": True, "timeout": 10, "check": True, "cwd": root}
    try:
        head, changed = (
            subprocess.run(["git", *command], **how).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):  # no git: the result says None
        return None
    return f"{head}+" if changed else str(head)


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
