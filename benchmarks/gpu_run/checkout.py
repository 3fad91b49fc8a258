"""Make `import fastres` work from the sources, without an install, in child processes and in theirs.

`fastres.kernels` is the folder `kernels`, which an install maps and a bare PYTHONPATH does not. So a folder on the path
gets a small package `fastres` that loads the real one in its place, with an additional folder to search for submodules;
that folder has a link to `kernels`. `fastres.__file__` remains the one of the sources.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
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
    """SHA-256 of everything that a measurement depends on; identifies the sources where there is no git."""
    found = hashlib.sha256()
    folders = ("fastres", "kernels", "csrc", "benchmarks")
    paths = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in SOURCES]
    for path in sorted([*paths, *root.glob("setup.py")]):
        if "results" not in path.parts:
            data = path.read_bytes()
            found.update(f"{path.relative_to(root)} {len(data)}\n".encode() + data)
    return found.hexdigest()


def commit(root: Path) -> str | None:
    """The commit of the sources, with "+" if files differ from it; None without git."""
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def import_path(build: Path, root: Path = ROOT) -> Path:
    """Create the folder to put on PYTHONPATH, under `build`."""
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
    """The environment of the programs that a run starts: fastres of these sources, with nothing disabled."""
    found = {name: value for name, value in os.environ.items() if name not in DROPPED}
    path = [str(import_path(build, root)), str(root / "benchmarks"), found.get("PYTHONPATH", "")]
    found["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    # otherwise `python -m` puts the current folder first, and with it a fastres without kernels
    found["PYTHONSAFEPATH"] = "1"
    found["PYTHONUNBUFFERED"] = "1"
    return found | dict(more)
