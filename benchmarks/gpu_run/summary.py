"""The summary of a run: one screen at the end, and everything in summary.md and run.json."""

from __future__ import annotations

import platform
import subprocess
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_run import files
from gpu_run.checkout import digest
from gpu_run.needs import Item
from gpu_run.run import FAILED, INTERRUPTED, RUNNING, Outcome, Run

WIDTH = 110
SHOWN = 6  # lines of a phase on the screen


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


class Summary:
    """The state of the run, written after each change."""

    def __init__(self, run: Run, command: str, found: list[Item]) -> None:
        self.run, self.command = run, command
        self.versions = {item.name: item.version for item in found}
        self.phases: dict[str, dict[str, Any]] = {}
        self.commit, self.sources = commit(run.root), digest(run.root)
        self.time = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def note(self, name: str, outcome: Outcome, seconds: float) -> None:
        self.phases[name] = {
            "status": outcome.status,
            "seconds": round(seconds, 1),
            "message": outcome.message,
            "lines": outcome.lines,
            "facts": outcome.facts,
        }
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
        """The lines to print at the end."""
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
