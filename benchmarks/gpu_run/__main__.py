"""The command line of `make gpu` and `make gpu-dry-run`, and the summary: one screen, summary.md and run.json."""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_run import files, needs
from gpu_run.checkout import ROOT, commit, digest
from gpu_run.needs import Item
from gpu_run.phases import PHASES, Phase, command, limit
from gpu_run.run import FAILED, INTERRUPTED, RUNNING, Interrupted, Outcome, Run

SECONDS = 570.0
WIDTH = 110
SHOWN = 6  # lines of a phase on the screen
LEAST_S = 5.0  # a phase with less time is not started


class Summary:
    """The state of the run, written after each change."""

    def __init__(self, run: Run, command: str, found: list[Item]) -> None:
        self.run, self.command = run, command
        self.versions = {item.name: item.version for item in found}
        self.phases: dict[str, dict[str, Any]] = {}
        self.commit, self.sources = commit(run.root), digest(run.root)
        self.time = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def note(self, name: str, outcome: Outcome, seconds: float) -> None:
        self.phases[name] = asdict(outcome) | {"seconds": round(seconds, 1)}
        self.write()

    @property
    def failed(self) -> list[str]:
        bad = (FAILED, INTERRUPTED, RUNNING)
        return [name for name, phase in self.phases.items() if phase["status"] in bad]

    def write(self) -> None:
        gpu = self.run.gpu
        data = {
            "schema": files.RUN_SCHEMA,
            "schema_version": files.RUN_VERSION,
            "dry_run": self.run.dry,
            "command": self.command,
            "time": self.time,
            "commit": self.commit,
            "sources": self.sources,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "gpu": asdict(gpu) if gpu else None,
            "versions": self.versions,
            "absent": {item.name: f"{item.why}: {item.remedy}" for item in self.run.absent},
            "phases": self.phases,
        }
        files.write_json(self.run.results / files.RUN, data)
        files.write(self.run.results / files.SUMMARY, self.markdown())

    def device(self) -> str:
        return str(self.run.gpu) if self.run.gpu else "dry run on a CPU"

    def markdown(self) -> str:
        names = ", ".join(f"{name} {version}" for name, version in self.versions.items() if name in ("torch", "triton"))
        lines = [
            f"# make gpu: {self.device()}",
            "",
            f"{self.time}, commit {self.commit or 'unknown'}, Python {platform.python_version()}, {names}.",
            f"Command: `{self.command}`.",
            "",
            "| phase | status | seconds | |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {n} | {p['status']} | {p['seconds']:.0f} | {_cell(p['message'])} |" for n, p in self.phases.items()
        ]
        for name, phase in self.phases.items():
            if phase["lines"]:
                lines += ["", f"## {name}", "", *(f"- {line}" for line in phase["lines"])]
        if self.run.absent:
            lines += ["", "## absent", "", *(f"- {item}" for item in self.run.absent)]
        return "\n".join(lines) + "\n"

    def screen(self) -> list[str]:
        lines = [f"make gpu: {self.device()}, torch {self.versions.get('torch')}, commit {(self.commit or '?')[:10]}"]
        for name, phase in self.phases.items():
            status = phase["status"].upper() if name in self.failed else phase["status"]
            lines.append(f"  {name:<10} {status:<11} {phase['seconds']:>4.0f} s  {phase['message']}")
            lines += [f"{'':<14}{line}" for line in phase["lines"][:SHOWN]]
            if len(phase["lines"]) > SHOWN:
                lines.append(f"{'':<14}and {len(phase['lines']) - SHOWN} more in {files.SUMMARY}")
        if self.run.absent:
            lines.append(f"  absent: {', '.join(item.name for item in self.run.absent)}")
        kept = sorted(name for name in files.NAMES if (self.run.results / name).exists())
        lines.append(f"  in {self.run.results}: {', '.join(kept)}")
        taken = time.monotonic() - self.run.started
        verdict = f"FAILED ({', '.join(self.failed)})" if self.failed else "passed"
        lines.append(f"make gpu: {verdict}, {taken:.0f} s")
        return [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _phases(text: str) -> tuple[Phase, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {phase.name: phase for phase in PHASES}
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {', '.join(known)}")
    return tuple(phase for phase in PHASES if phase.name in names)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_run", description="Build, test, tune and measure fastres on a GPU.")
    parser.add_argument("--results", type=Path, metavar="DIR", help="output folder (default build/gpu/results)")
    parser.add_argument("--phases", type=_phases, default=PHASES, metavar="LIST", help="phases to run, comma-separated")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"time limit of the whole run (default {SECONDS:.0f})"
    )
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU: all phases, tiny; no figure is kept")
    options = parser.parse_args(arguments)
    options.build = ROOT / "build" / ("gpu-dry-run" if options.dry_run else "gpu")
    options.results = (options.results or options.build / "results").absolute()
    return options


def check(dry: bool) -> tuple[needs.Gpu | None, list[needs.Item], list[needs.Item]]:
    """The GPU, the items found, and the optional ones that are absent. Exits if a required one is missing."""
    gpu = None if dry else needs.find_gpu()
    if isinstance(gpu, str):
        sys.exit(f"make gpu: no GPU: {gpu} (make gpu-dry-run runs everything on a CPU)")
    required, optional = needs.required(gpu is not None), needs.optional()
    missing = [item for item in required if item.version is None]
    if missing:
        lines = [f"make gpu: {len(missing)} missing, for {sys.executable} and this machine:"]
        sys.exit("\n".join([*lines, *(f"  {item}" for item in missing)]))
    found = [item for item in [*required, *optional] if item.version is not None]
    return gpu, found, [item for item in optional if item.version is None]


def work(run: Run, summary: Summary, phases: tuple[Phase, ...]) -> None:
    """Run the phases in turn, continuing after failures. Raises Interrupted when told to stop."""
    for i, phase in enumerate(phases):
        most, started = limit(run, phases, i), time.monotonic()
        if most < LEAST_S:
            summary.note(phase.name, Outcome(FAILED, "no time left"), 0.0)
            continue
        print(f"{phase.name}: at most {most:.0f} s", flush=True)
        summary.note(phase.name, Outcome(RUNNING, "not finished"), 0.0)
        try:
            outcome = phase.work(run, most)
        except Interrupted:
            summary.note(phase.name, Outcome(INTERRUPTED, "stopped"), time.monotonic() - started)
            raise
        except Exception as error:  # the other phases must still run
            outcome = Outcome(FAILED, f"the runner failed: {type(error).__name__}: {error}")
        summary.note(phase.name, outcome, time.monotonic() - started)
        print(f"{phase.name}: {outcome.status}: {outcome.message}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    gpu, found, absent = check(options.dry_run)
    try:
        run = Run(options.results, options.build, gpu, absent, options.seconds)
    except OSError as error:
        sys.exit(f"make gpu: results in {options.results}: cannot be written: {error.strerror or error}")
    again = "make gpu-dry-run" if run.dry else command(options.phases)
    summary = Summary(run, again, found)
    print(f"make gpu: {summary.device()}, at most {options.seconds:.0f} s, results in {options.results}", flush=True)
    for item in absent:
        print(f"  absent: {item}", flush=True)

    def handle(by: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, by)

    def interrupt(*_: Any) -> None:
        handle(signal.SIG_IGN)  # a second signal must not interrupt the writing of the files
        raise Interrupted

    handle(interrupt)
    try:
        work(run, summary, options.phases)
    except Interrupted:
        print("make gpu: stopped", file=sys.stderr)
        code = 130
    else:
        code = 1 if summary.failed else 0
    print("\n" + "\n".join(summary.screen()))
    return code


if __name__ == "__main__":
    sys.exit(main())
