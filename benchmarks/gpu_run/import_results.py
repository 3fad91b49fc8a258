"""`make gpu-import`: store the results of a run on a GPU in this checkout, or refuse all of them and change nothing.

bench.json   split into benchmarks/results/<what>-<mode>-<dtype>-<device>-<versions>.json, each with its page
summary.md   to benchmarks/results/gpu-<device>-<versions>.md
tuned.json   entries into kernels/tuned.json, replacing older ones, if the run's tests passed
convs.json   entries into fastres/ops/conv_measured.json, likewise

python -m gpu_run.import_results build/gpu/results
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fastres.kernels import configs, measured

import pages
import report
from fastres.lab.errors import MissingExtra
from fastres.ops import _conv_tiles
from gpu_run import files
from gpu_run.checkout import ROOT, commit, digest
from plot import draw

MODES = {
    "training, forward+backward": "train",
    "training, forward, grad on": "train-forward",
    "training, forward, no grad": "train-nograd",
    "forward+backward": "train",
    "forward, grad on": "train-forward",
    "eval, forward, no grad": "eval",
    "forward, no grad": "eval",
    "training step": "",  # the operator is called "train" already
}


TABLE = "fastres/ops/conv_measured.json"


class Refused(Exception):
    """The folder cannot be imported; the message says why."""


def read(folder: Path) -> dict[str, Any]:
    """Read the files of a run by name, JSON parsed. Raises Refused."""
    if not folder.is_dir():
        raise Refused("is not a folder")
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if name not in files.NAMES]
    if foreign:
        raise Refused(f"{', '.join(foreign)}: not a file of make gpu")
    if files.RUN not in names:
        raise Refused(f"has no {files.RUN}: not the results of make gpu")
    found: dict[str, Any] = {}
    for name in names:
        path = folder / name
        if path.stat().st_size > files.MOST:
            raise Refused(f"{name}: larger than {files.MOST >> 20} MB")
        try:
            if name.endswith(".json"):
                found[name] = json.loads(path.read_text(encoding="utf-8"))
            elif name.endswith(".xml"):
                found[name] = ElementTree.parse(path)
            elif name == files.SUMMARY:
                found[name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError, ElementTree.ParseError) as error:
            raise Refused(f"{name}: cannot be read: {error}") from error
    return found


_GPU = ({"name": str, "capability": str}, None)
_ENVIRONMENT = {"time": str, "commit": (str, None), "gpu": _GPU, "versions": {"torch": str}}
_RUN = {
    "dry_run": bool,
    "time": str,
    "commit": (str, None),
    "sources": str,
    "gpu": _GPU,
    "versions": dict,
    "phases": {str: {"status": str, "message": str}},
}


_TABLE = {"environment": _ENVIRONMENT, "dry_run": bool}
# How a file is checked, and what else it has.
MEASURED: dict[str, tuple[Callable[[Any], object], dict[str, Any]]] = {
    files.BENCH: (pages.check, {"environment": _ENVIRONMENT, "run": {"dry_run": bool}}),
    files.TUNED: (
        lambda data: measured.checked(data, configs.TABLE, files.TUNED),
        _TABLE | {"entries": [{"speedup": float}]},
    ),
    files.CONVS: (
        lambda data: _conv_tiles.checked(data, files.CONVS),
        _TABLE | {"entries": [{"conv": str, "beside": {str: float}}]},
    ),
}


def check(found: dict[str, Any]) -> None:
    """Raise Refused unless the files are valid, of one run, and of a GPU."""
    run = found[files.RUN]
    known = (files.RUN_SCHEMA, files.RUN_VERSION)
    if not isinstance(run, dict) or (run.get("schema"), run.get("schema_version")) != known:
        raise Refused(f"{files.RUN}: expected the schema {files.RUN_SCHEMA!r}, version {files.RUN_VERSION}")
    try:
        pages.validate(run, _RUN, files.RUN)
    except ValueError as error:
        raise Refused(str(error)) from error
    if run["dry_run"] or run["gpu"] is None:
        raise Refused("a dry run: its figures mean nothing")
    if not found.keys() & MEASURED.keys():
        raise Refused(f"has none of {', '.join(MEASURED)}: nothing was measured")
    for name in (name for name in MEASURED if name in found):
        try:
            valid, schema = MEASURED[name]
            valid(found[name])
            pages.validate(found[name], schema, name)
        except ValueError as error:
            raise Refused(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
        _same_run(name, found[name], run)


def _same_run(name: str, data: dict[str, Any], run: dict[str, Any]) -> None:
    """Raise Refused unless a file was measured by this run, on its GPU."""
    if data.get("dry_run") or data.get("run", {}).get("dry_run"):
        raise Refused(f"{name}: a dry run: its figures mean nothing")
    gpu, at = data["environment"]["gpu"], data["environment"]["commit"]
    if gpu is None or gpu["name"] != run["gpu"]["name"]:
        raise Refused(f"{name}: measured on {gpu['name'] if gpu else 'no GPU'}, the run was on {run['gpu']['name']}")
    if at != run["commit"]:
        raise Refused(f"{name}: of commit {at}, the run is of {run['commit']}")
    arch = int(run["gpu"]["capability"].replace(".", ""))
    strange = sorted({entry["arch"] for entry in data.get("entries", [])} - {arch})
    if strange:
        raise Refused(f"{name}: entries for sm_{strange[0]}, measured on sm_{arch}")


def settle_commit(found: dict[str, Any], root: Path) -> None:
    """Fill in this checkout's commit for a run without git, if the sources are the same. Raises Refused."""
    if found[files.RUN]["commit"] is not None:
        return
    if found[files.RUN]["sources"] != digest(root):
        raise Refused("the run did not know its commit, and its sources are not those of this checkout")
    for name in found.keys() & MEASURED.keys():
        found[name]["environment"]["commit"] = commit(root)


def place(data: dict[str, Any]) -> str:
    """<device>-<versions>, the end of the names of a run's files."""
    device = re.sub(r"[^A-Za-z0-9.]+", "_", data["environment"]["gpu"]["name"])
    return f"{device}-torch{data['environment']['versions']['torch'].partition('+')[0]}"


def split(bench: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One result per operator or kind of network, mode and dtype, by name without a suffix."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in bench["cases"]:
        mode = MODES.get(case["mode"], re.sub(r"[^a-z0-9]+", "-", case["mode"].lower()))
        name = "-".join(part for part in (case["what"], mode, case["dtype"], place(bench)) if part)
        groups.setdefault(name, []).append(case)
    run = {"dry_run": False}
    return {name: {**bench, "run": run, "cases": cases, "bars": report.bars(cases)} for name, cases in groups.items()}


@dataclass(frozen=True)
class Table:
    """A table of the package that a run's measurements are merged into."""

    file: str  # of the run
    phase: str  # that wrote the file
    path: str  # in a checkout
    keys: tuple[str, ...]  # identify the older entry to replace
    values: tuple[str, ...]

    def key(self, entry: dict[str, Any]) -> list[Any]:
        return [entry[name] for name in self.keys]

    def merged(self, data: dict[str, Any], path: Path) -> str:
        """The text of the file at `path` with this run's entries merged in, one entry per line."""
        where = data["environment"]
        versions = {name: where["versions"].get(name) for name in ("torch", "triton")}
        about = {"device": where["gpu"]["name"], "commit": where["commit"], "time": where["time"]} | versions
        if self.file == files.CONVS:
            about["cudnn"] = where["gpu"].get("cudnn")
        kept = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else []
        kept += [{name: entry[name] for name in (*self.keys, *self.values)} | about for entry in data["entries"]]
        last = {json.dumps(self.key(entry)): entry for entry in kept}
        lines = [json.dumps(entry, allow_nan=False) for entry in sorted(last.values(), key=self.key)]
        head = json.dumps({name: data[name] for name in ("schema", "schema_version")}).removesuffix("}")
        return head + ', "entries": [\n' + ",\n".join(lines) + "\n]}\n"


TABLES = (
    Table(files.TUNED, "tune", "kernels/tuned.json", ("kernel", "arch", "shape_class"), ("config", "speedup")),
    Table(files.CONVS, "convs", TABLE, ("arch", "dtype", "shape", "residual"), ("conv", "ms", "beside")),
)


def texts(found: dict[str, Any], root: Path) -> tuple[dict[Path, str], list[str]]:
    """The text of every file to write, and notes to print."""
    run, results, out, notes = found[files.RUN], root / "benchmarks" / "results", {}, []
    for name, phase in run["phases"].items():
        if phase["status"] not in ("passed", "skipped"):
            notes.append(f"note: the phase {name} {phase['status']}: {phase['message']}")
    if files.SUMMARY in found:
        where = next(found[name] for name in MEASURED if name in found)
        out[results / f"gpu-{place(where)}.md"] = found[files.SUMMARY]
    if files.BENCH in found:
        for name, data in split(found[files.BENCH]).items():
            pages.check(data)
            out[results / f"{name}.json"] = json.dumps(data, indent=1, allow_nan=False) + "\n"
            out[results / f"{name}.md"] = report.markdown(data)
    for table in TABLES:
        data = found.get(table.file)
        if data is None or not data["entries"]:
            continue
        tests, phase = (run["phases"].get(name, {"status": "not run"})["status"] for name in ("tests", table.phase))
        if tests == phase == "passed":
            out[root / table.path] = table.merged(data, root / table.path)
        else:
            notes.append(f"note: {table.path} is not changed: tests {tests}, {table.phase} {phase}")
    return out, notes


def write_all(out: dict[Path, str]) -> None:
    """Write all of the files or none: nothing is renamed until everything is written."""
    staged = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in out}
    try:
        for path, temporary in staged.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(out[path], encoding="utf-8")
        for path, temporary in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            with contextlib.suppress(OSError):  # already renamed, or never written
                temporary.unlink()


def pictures(out: dict[Path, str]) -> list[str]:
    """Plot each result of whole networks; returns lines to print."""
    lines = []
    for path in (p for p in out if p.suffix == ".json" and p.name.startswith("networks")):
        try:
            draw(pages.load(path), path.with_suffix(".png"))
        except MissingExtra as missing:
            return [f"note: no plot: {missing}"]
        lines.append(str(path.with_suffix(".png")))
    return lines


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="gpu_run.import_results", description="Import the results of make gpu.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="RESULTS folder of a run")
    options = parser.parse_args(arguments)
    try:
        found = read(options.folder)
        check(found)
        settle_commit(found, root)
        out, notes = texts(found, root)
        write_all(out)
    except (Refused, OSError) as error:
        print(f"make gpu-import: {options.folder}: {error}; nothing was changed", file=sys.stderr)
        return 1
    for line in [*(str(path) for path in out), *pictures(out), *notes]:
        print(line)
    if any(path.name == measured.PATH.name for path in out):
        print("run make test-full: it compiles every entry of the new table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
