"""The files of a run: at most eight, each whole at any moment, so that a run that is killed leaves what it finished."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SUMMARY, RUN, TESTS, BENCH, TUNED, CONVS, PLOT, LOG = (
    "summary.md",
    "run.json",
    "tests.xml",
    "bench.json",
    "tuned.json",
    "convs.json",
    "bench.png",
    "log.txt",
)
NAMES = (SUMMARY, RUN, TESTS, BENCH, TUNED, CONVS, PLOT, LOG)
MOST = 16 << 20  # bytes of a file
RUN_SCHEMA, RUN_VERSION = "fastres.gpu_run", 1


def program_options(name: str, doc: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a program that writes one of these files: where to, in how many seconds, and whether dry."""
    parser = argparse.ArgumentParser(prog=f"gpu_run.{name}", description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args(arguments)


def write(path: Path, text: str) -> None:
    """Writes beside `path` and renames: readers see the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # renamed already
            temporary.unlink()


def write_json(path: Path, data: dict[str, Any]) -> None:
    write(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that is being written is left for the next time."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def prepare(folder: Path) -> None:
    """Makes the folder and clears it of an earlier run's files. Raises OSError where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)
    write(folder / LOG, "")


class Log:
    """Everything that the phases print. It ends where a file would become too large, and says so."""

    def __init__(self, path: Path, most: int = MOST * 3 // 4) -> None:
        self._file = open(path, "ab")  # noqa: SIM115  (open as long as the run)
        self._left = most

    def write(self, data: bytes) -> None:
        if self._left <= 0:
            return
        self._left -= len(data)
        self._file.write(data if self._left > 0 else b"\n[the log ends here: it is full]\n")
        self._file.flush()


def junit(tests: list[dict[str, Any]]) -> str:
    """Records of tests as JUnit XML."""
    kinds = {"failed": "failure", "error": "error", "skipped": "skipped"}
    counts = {key: str(sum(t["outcome"] == name for t in tests)) for name, key in _ATTRIBUTES.items()}
    seconds = f"{sum(t['seconds'] for t in tests):.3f}"
    suite = ElementTree.Element("testsuite", name="gpu", tests=str(len(tests)), time=seconds, **counts)
    for test in tests:
        file, _, name = test["test"].partition("::")
        case = ElementTree.SubElement(
            suite, "testcase", classname=file, name=name or file, time=f"{test['seconds']:.3f}"
        )
        if test["outcome"] in kinds:
            message = _printable(test["message"])
            ElementTree.SubElement(case, kinds[test["outcome"]], message=message[:500]).text = message
    root = ElementTree.Element("testsuites")
    root.append(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


_ATTRIBUTES = {"failed": "failures", "error": "errors", "skipped": "skipped"}


def _printable(text: str) -> str:
    """XML has no place for most control characters."""
    return "".join(c for c in text if c in "\t\n" or ord(c) >= 32)
