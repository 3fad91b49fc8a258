"""`import fastres` from the sources, without an install, in this process's children and in theirs.

`fastres.kernels` is the folder `kernels`, which an install maps; a bare PYTHONPATH of the sources does not. So a folder
of the path gets a small package `fastres` that puts the real one in its own place, with one more folder to look for
submodules in: that folder holds `kernels` as a link. `fastres.__file__` stays that of the sources.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {".py", ".cpp", ".cu", ".h", ".cuh", ".json"}
DROPPED = ("FASTRES_BACKEND", "FASTRES_DISABLE", "TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTHONHOME")

_PACKAGE = """\
\"\"\"The fastres of {root}: written by `make gpu`.\"\"\"

import importlib.util
import sys

_folders = [{sources!r}, {parts!r}]
_spec = importlib.util.spec_from_file_location("fastres", {init!r}, submodule_search_locations=_folders)
_module = importlib.util.module_from_spec(_spec)
sys.modules["fastres"] = _module
_spec.loader.exec_module(_module)
"""


def digest(root: Path = ROOT) -> str:
    """SHA-256 of everything that a measurement depends on: says which sources they were where git cannot."""
    found = hashlib.sha256()
    folders = ("fastres", "kernels", "csrc", "benchmarks")
    paths = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in SOURCES]
    for path in sorted([*paths, *root.glob("setup.py")]):
        if "results" not in path.parts:
            data = path.read_bytes()
            found.update(f"{path.relative_to(root)} {len(data)}\n".encode() + data)
    return found.hexdigest()


def import_path(build: Path, root: Path = ROOT) -> Path:
    """Makes the folder to put on PYTHONPATH, under `build`."""
    path, parts = build.absolute() / "path", build.absolute() / "parts"
    (path / "fastres").mkdir(parents=True, exist_ok=True)
    parts.mkdir(exist_ok=True)
    link = parts / "kernels"
    if not link.is_symlink() or link.resolve() != root / "kernels":
        link.unlink(missing_ok=True)
        link.symlink_to(root / "kernels", target_is_directory=True)
    sources = root / "fastres"
    text = _PACKAGE.format(root=root, sources=str(sources), parts=str(parts), init=str(sources / "__init__.py"))
    (path / "fastres" / "__init__.py").write_text(text, encoding="utf-8")
    return path


def environment(build: Path, more: Mapping[str, str], root: Path = ROOT) -> dict[str, str]:
    """The environment of every program that the run starts: fastres of these sources, nothing switched off."""
    found = {name: value for name, value in os.environ.items() if name not in DROPPED}
    path = [str(import_path(build, root)), str(root / "benchmarks"), found.get("PYTHONPATH", "")]
    found["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    # `python -m` would put the current folder first, and with it a fastres that has no kernels
    found["PYTHONSAFEPATH"] = "1"
    found["PYTHONUNBUFFERED"] = "1"
    return found | dict(more)
