"""The files of a run, at most eight. Each is whole at any moment, so a run that is killed leaves what it finished."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

NAMES = ("summary.md", "run.json", "tests.xml", "bench.json", "tuned.json", "convs.json", "bench.png", "log.txt")
SUMMARY, RUN, TESTS, BENCH, TUNED, CONVS, PLOT, LOG = NAMES
MOST = 16 << 20  # bytes of a file
RUN_SCHEMA, RUN_VERSION = "fastres.gpu_run", 1


def write(path: Path, text: str) -> None:
    """Write to a temporary file and rename it: readers see the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # already renamed
            temporary.unlink()


def write_json(path: Path, data: dict[str, Any]) -> None:
    write(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON lines, without a last line that is still being written."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def prepare(folder: Path) -> None:
    """Create the folder and delete an earlier run's files. Raises OSError if it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)
    write(folder / LOG, "")


def junit(tests: list[dict[str, Any]]) -> str:
    kinds = {"failed": "failure", "error": "error", "skipped": "skipped"}
    attributes = {"failed": "failures", "error": "errors", "skipped": "skipped"}
    counts = {key: str(sum(t["outcome"] == name for t in tests)) for name, key in attributes.items()}
    seconds = f"{sum(t['seconds'] for t in tests):.3f}"
    suite = ElementTree.Element("testsuite", name="gpu", tests=str(len(tests)), time=seconds, **counts)
    for test in tests:
        file, _, name = test["test"].partition("::")
        case = ElementTree.SubElement(
            suite, "testcase", classname=file, name=name or file, time=f"{test['seconds']:.3f}"
        )
        if test["outcome"] in kinds:
            message = "".join(c for c in test["message"] if c in "\t\n" or ord(c) >= 32)  # what XML allows
            ElementTree.SubElement(case, kinds[test["outcome"]], message=message[:500]).text = message
    root = ElementTree.Element("testsuites")
    root.append(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
