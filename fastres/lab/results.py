"""Result files: written whole or not at all, and carrying what it takes to reproduce them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch
from torch.backends import cudnn

import fastres
from fastres import _files
from fastres._info import ENVIRONMENT, PACKAGES, cpu, gpu, load_average, version
from fastres.lab.errors import OutputError
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
