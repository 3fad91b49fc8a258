"""The phases that run pytest: all tests that need a GPU, and a few of them under compute-sanitizer.

This module is also a pytest plugin that appends each test's outcome to a file of JSON lines as soon as it is known:
pytest writes its own JUnit XML only at the end, so a run that is out of time would have none.

    pytest -p gpu_run.tests --record outcomes.jsonl
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_run import files
from gpu_run.run import FAILED, PASSED, SKIPPED, Ended, Outcome, Run

Record = dict[str, Any]

# The reasons for which a gpu test may be skipped: the hardware lacks something. Any other skip fails the run.
HARDWARE = (r"needs [\d.]+ Gi?B of GPU memory", r"needs \d+ GPUs", r"needs compute capability")
DRY = r"(no|needs a) CUDA device|dry run"
TOOLS = ("memcheck", "racecheck")
CANNOT = r"Device not supported|Unable to find injection library|not supported on this"
WORKERS, WORKER_MIB = 4, 16 << 10


def gpu_files(root: Path) -> list[str]:
    """The test files that mark anything `gpu`; what the others import need not be installed."""
    found = [p for p in sorted((root / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    return [str(path.relative_to(root)) for path in found]


def accepted(reason: str, run: Run) -> bool:
    """True if a test may be skipped for this reason on this machine."""
    patterns = list(HARDWARE) + ([DRY] if run.dry else [])
    for item in run.absent:  # the summary lists them
        patterns.append(rf"(could not import|No module named) '{item.name}'|\b{item.name} is not installed")
    return any(re.search(pattern, reason) for pattern in patterns)


def gpu_tests(run: Run, limit_s: float) -> Outcome:
    """Run `pytest -m gpu` in parallel, then the large tests, which need all of the GPU's memory, one by one."""
    record = run.path("tests.jsonl")
    workers = min(WORKERS, (os.cpu_count() or 1) // 2, run.gpu.memory_mib // WORKER_MIB if run.gpu else 1)
    parallel = ["-n", str(workers)] if run.has("xdist") and workers > 1 else ["-p", "no:xdist"]
    environment = {"FASTRES_TEST_DEVICE": "cpu"} if run.dry else {}

    def write() -> None:
        files.write(run.results / files.TESTS, files.junit(once(files.read_lines(record))))

    ended: list[Ended] = []
    end = time.monotonic() + limit_s
    for marks, how, share in (("gpu and not full", parallel, 0.7), ("gpu and full", ["-p", "no:xdist"], 1.0)):
        if run.dry and ended:  # a dry run has no second part
            break
        arguments = ["-m", "pytest", *gpu_files(run.root), "-q", "-rs", "-p", "no:cacheprovider", "-m", marks, *how]
        arguments += ["-o", "faulthandler_timeout=60", *plugin(record)]  # shows in the log where a test hangs
        ended.append(run.python(arguments, _left(end) * (1.0 if run.dry else share), environment, on_tick=write))
    write()
    return judged(run, once(files.read_lines(record)), ended)


def _left(end: float) -> float:
    return max(end - time.monotonic(), 1.0)


def plugin(record: Path) -> list[str]:
    return ["-p", __name__, "--record", str(record)]


def once(tests: list[Record]) -> list[Record]:
    """The worst record of each test: a teardown may fail after a call that passed."""
    rank = {"error": 3, "failed": 2, "skipped": 1}
    found: dict[str, Record] = {}
    for test in tests:
        known = found.get(test["test"])
        if known is None or rank.get(test["outcome"], 0) > rank.get(known["outcome"], 0):
            found[test["test"]] = test
    return list(found.values())


def judged(run: Run, tests: list[Record], ended: list[Ended]) -> Outcome:
    """Judge a phase of tests by their records and by how pytest ended."""
    counts = Counter(test["outcome"] for test in tests)
    bad = [test for test in tests if test["outcome"] in ("failed", "error")]
    skips = Counter(test["message"] for test in tests if test["outcome"] == "skipped")
    wrong = {reason: n for reason, n in skips.items() if not accepted(reason, run)}
    lines = [] if counts["passed"] else ["no test passed"]
    for i, end in enumerate(ended):
        if end.out_of_time:
            lines.append(f"pytest ran out of time ({i + 1} of {len(ended)})")
        elif end.code not in (0, 1, 5):  # 1: tests failed, they are listed; 5: no tests of this kind
            lines.append(f"pytest ended with {end.code}: {end.last}")
    failed = bool(lines or bad or wrong) or any(end.code not in (0, 5) for end in ended)
    lines += [f"{test['outcome']}: {test['test']}: {_reason(test['message'])}" for test in bad]
    lines += [f"skipped without a hardware reason: {n} x {reason}" for reason, n in wrong.items()]
    lines += [f"skipped: {n} x {reason}" for reason, n in skips.items() if reason not in wrong]
    message = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "error", "skipped") if counts[name])
    facts = {"counts": dict(counts), "skips": dict(skips)}
    return Outcome(FAILED if failed else PASSED, message or "nothing ran", lines, facts)


def _reason(text: str) -> str:
    """pytest's own error line, or the last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines[-1:] or ["no message"])[0][:160]


def sanitizer(run: Run, limit_s: float) -> Outcome:
    """Run the tests marked `sanitize` under compute-sanitizer: out-of-bounds accesses, races in shared memory.

    torch's caching allocator is off, so that each tensor ends where its allocation does.
    """
    if not run.dry and not run.has("compute-sanitizer"):
        return Outcome(SKIPPED, "compute-sanitizer is absent")
    outcomes: dict[str, Outcome] = {}
    end = time.monotonic() + limit_s
    tools = ("interpreter",) if run.dry else TOOLS
    for i, name in enumerate(tools):
        record = run.path(f"{name}.jsonl")
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        before: list[str] = []
        if run.dry:
            environment = {"TRITON_INTERPRET": "1", "FASTRES_TEST_DEVICE": "cpu"}
        else:
            options = ["--tool", name, "--error-exitcode", "86", "--print-limit", "20"]
            before = ["compute-sanitizer", *options, "--target-processes", "application-only"]
        arguments = ["-m", "pytest", "tests/gpu/test_gpu_sanitize.py", "-q", "-rs", "-m", "sanitize"]
        arguments += ["-p", "no:cacheprovider", "-p", "no:xdist", *plugin(record)]
        ended = run.python(arguments, _left(end) / (len(tools) - i), environment, before)
        text = "\n".join(ended.tail)
        refused = re.search(CANNOT, text)
        if before and refused:
            return Outcome(SKIPPED, f"compute-sanitizer cannot run here: {refused[0]}")
        outcome = judged(run, once(files.read_lines(record)), [ended])
        if ended.code == 86:
            found = [line for line in ended.tail if line.startswith("========= ERROR SUMMARY")]
            outcome.lines.insert(0, f"{name}: {(found or ['errors, see log.txt'])[-1].removeprefix('========= ')}")
        outcomes[name] = outcome
    failed = any(o.status == FAILED for o in outcomes.values())
    message = "; ".join(f"{name} {o.message}" for name, o in outcomes.items())
    lines = [line for o in outcomes.values() for line in o.lines]
    return Outcome(FAILED if failed else PASSED, message, lines, {name: o.facts for name, o in outcomes.items()})


# ---- the plugin ----------------------------------------------------------------------------------------------------


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
        outcome = report.outcome
        if report.when == "call" or outcome != "passed":
            if hasattr(report, "wasxfail"):
                outcome = "xfailed" if outcome == "skipped" else outcome
            elif outcome == "failed" and report.when != "call":
                outcome = "error"
            self._write(report, outcome, report.duration)

    def pytest_collectreport(self, report: Any) -> None:
        # A module skipped as a whole is known only to the processes that collect; each of them reports it.
        if report.outcome != "passed":
            self._write(report, "error" if report.outcome == "failed" else "skipped", 0.0)

    def _write(self, report: Any, outcome: str, seconds: float) -> None:
        skipped = outcome == "skipped" and isinstance(report.longrepr, tuple)
        message = str(report.longrepr[2]).removeprefix("Skipped: ") if skipped else report.longreprtext
        line = {"test": report.nodeid, "outcome": outcome, "seconds": seconds, "message": message}
        with open(self.path, "ab", buffering=0) as file:
            file.write((json.dumps(line) + "\n").encode())  # one call: lines of several processes do not mix
