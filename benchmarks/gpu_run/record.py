"""A pytest plugin that appends each test's outcome to a file of JSON lines as soon as it is known.

pytest writes its own JUnit XML only at the end, so a run that is out of time would have none.

    pytest -p gpu_run.record --record outcomes.jsonl
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="append each test's outcome as a line of JSON")


def pytest_configure(config: Any) -> None:
    if config.option.record is not None:
        config.pluginmanager.register(Recorder(config.option.record, hasattr(config, "workerinput")))


class Recorder:
    """Writes outcomes; in a worker of xdist nothing but those of collection."""

    def __init__(self, path: Path, worker: bool) -> None:
        self.path, self.worker = path, worker

    def pytest_runtest_logreport(self, report: Any) -> None:
        if self.worker:  # the controller of xdist sees it too
            return
        if report.when == "call" or report.outcome != "passed":
            outcome = report.outcome
            if outcome == "failed" and report.when != "call":
                outcome = "error"
            if hasattr(report, "wasxfail"):
                outcome = "xfailed" if report.outcome == "skipped" else report.outcome
            self._write(report, outcome, report.duration)

    def pytest_collectreport(self, report: Any) -> None:
        # A module skipped as a whole is known only to the processes that collect; each of them reports it.
        if report.outcome != "passed":
            self._write(report, "error" if report.outcome == "failed" else "skipped", 0.0)

    def _write(self, report: Any, outcome: str, seconds: float) -> None:
        skipped = outcome == "skipped" and isinstance(report.longrepr, tuple)
        message = str(report.longrepr[2]).removeprefix("Skipped: ") if skipped else report.longreprtext
        line = {"test": report.nodeid, "outcome": outcome, "seconds": seconds, "message": message}
        data = (json.dumps(line) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, data)  # one call: lines of several processes do not mix
        finally:
            os.close(file)
