"""The phases in order with their time limits, and the work of those that run programs other than pytest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_run import fastest, files
from gpu_run.run import FAILED, PASSED, SKIPPED, Outcome, Run
from gpu_run.tests import gpu_tests, sanitizer

STOP_S = 10.0  # between the deadline a program is given and its being stopped

_IMPORTS = """\
import json, torch, fastres, fastres.kernels
info = fastres.info(init_cuda=True)
device = "cuda" if "cuda" in info["operators"] else "cpu"
print(json.dumps({"fastres": fastres.__file__, "kernels": fastres.kernels.__file__, "device": device,
                  "extension": info["extension"], "operators": info["operators"][device],
                  "convolutions": len(fastres._extension.conv_kernels())}))
"""


@dataclass(frozen=True)
class Phase:
    """A part of the run. It takes at most `most_s` if others follow; earlier ones leave it at least `least_s`."""

    name: str
    most_s: float
    least_s: float
    work: Callable[[Run, float], Outcome]


def build(run: Run, limit_s: float) -> Outcome:
    """Build the extension in place, for this GPU's architecture only, and import all of it.

    The build is forced, because a binary of the same sources may be for another GPU; ninja compiles only what differs.
    A dry run compiles nothing, because the extension in place may be in use.
    """
    environment = {"FASTRES_BUILD_EXT": "0" if run.dry else "1"}
    ended = run.python(["setup.py", "build_ext", "--inplace", "--force"], limit_s - 5, environment)
    said = [line.removeprefix("fastres: ") for line in ended.tail if line.startswith("fastres: ")]
    if ended.code or ended.out_of_time:
        why = "out of time" if ended.out_of_time else f"exit status {ended.code}"
        errors = [line for line in ended.tail if "error" in line.lower()]
        return Outcome(FAILED, f"the extension was not built ({why})", (errors or [ended.last])[:5])
    imported = run.python(["-c", _IMPORTS], max(limit_s / 2, 60.0))
    if imported.code or imported.out_of_time:
        return Outcome(FAILED, f"fastres cannot be imported: {imported.last}", said)
    found = json.loads(imported.last)
    if run.gpu and found["device"] != "cuda":
        return Outcome(FAILED, "fastres finds no GPU to use", said)
    usable = {op: [b for b, reasons in backends.items() if not reasons] for op, backends in found["operators"].items()}
    lines = [f"{op} on {found['device']}: {', '.join(backends)}" for op, backends in usable.items()]
    for op, backends in found["operators"].items() if run.gpu else ():
        mine = {name: reasons for name, reasons in backends.items() if name in ("triton", "cuda") and reasons}
        lines += [f"{op}: {name} refuses: {'; '.join(reasons)}" for name, reasons in mine.items()]
    message = f"for {run.gpu.arch_list}: {'; '.join(said)}" if run.gpu else "nothing is compiled in a dry run"
    kernels = found["convolutions"]
    lines.insert(0, f"{kernels or 'no'} kernels of convolutions")
    facts = {"backends": usable, "convolutions": kernels}
    if run.gpu and not kernels and run.has("CUTLASS"):
        return Outcome(FAILED, f"no convolutions, though CUTLASS is here: {'; '.join(said)}", lines, facts)
    return Outcome(PASSED, message, lines, facts)


def convs(run: Run, limit_s: float) -> Outcome:
    def report(data: Data) -> Report:
        entries, planned = data["entries"], data["planned"]
        lines = [f"left out: {text}" for text in data["refused"]]
        message = f"{len(entries)} of {planned} convolutions measured, no figure kept"
        if not run.dry:
            message, lines = fastest.message(entries, planned), fastest.lines(entries) + lines
        return Report(message, _wrong(data), lines, {"entries": len(entries)}, empty=not entries)

    return _measure(run, "convs", files.CONVS, limit_s, report)


def tune(run: Run, limit_s: float) -> Outcome:
    def report(data: Data) -> Report:
        entries, lines = data["entries"], []
        message = f"{len(entries)} of {data['planned']} entries measured, no figure kept"
        if not run.dry:
            for e in sorted((e for e in entries if e["speedup"] > 1), key=lambda e: -e["speedup"]):
                config = ", ".join(f"{key} {value}" for key, value in e["config"].items())
                lines.append(f"{e['kernel']} {e['shape_class']}: {e['speedup']:.2f}x with {config}")
            faster = f"another configuration is faster for {len(lines)}"
            message = message.replace("no figure kept", faster)
        return Report(message, _wrong(data), lines, {"entries": len(entries)})

    return _measure(run, "tune", files.TUNED, limit_s, report)


def bench(run: Run, limit_s: float) -> Outcome:
    def report(data: Data) -> Report:
        status, settings = data["run"], data["settings"]
        measured, cut, broken = status["measured"], status["not_measured"], status["failed"]
        rates = [f"bandwidth {settings['bandwidth_bytes_per_s'] / 1e12:.2f} TB/s"]
        rates += [f"{rate / 1e12:.0f} TFLOP/s {name}" for name, rate in settings["flops_per_s"].items()]
        message = f"{len(measured)} of {len(measured) + len(cut) + len(broken)} items"
        message += ", no figure kept" if run.dry else f"; {', '.join(rates)}"
        lines = [] if run.dry else list(status["headlines"])
        lines += [f"not measured, out of time: {', '.join(cut)}"] if cut else []
        errors = [f"{item}: {why}" for item, why in broken.items()]
        return Report(message, errors, lines, {"rates": settings["flops_per_s"]}, empty=not measured)

    return _measure(run, "bench", files.BENCH, limit_s, report)


Data = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """The summary of a program's file. Errors fail the phase, and so does an empty file."""

    message: str
    errors: list[str]
    lines: list[str]
    facts: dict[str, Any]
    empty: bool = False


def _wrong(data: Data) -> list[str]:
    return [f"wrong answers: {text}" for text in data["wrong"]]


def _measure(run: Run, name: str, file: str, limit_s: float, report: Callable[[Data], Report]) -> Outcome:
    """Run a program of this folder that updates `file` as it measures, and report what it wrote.

    A program stopped at its limit has written what it measured; one that crashed fails the phase.
    """
    path = run.results / file
    arguments = ["-m", f"gpu_run.{name}", "--out", str(path), "--seconds", f"{max(limit_s - STOP_S, 1):.0f}"]
    environment = {"TRITON_INTERPRET": "1"} if run.dry and name != "bench" else {}
    ended = run.python([*arguments, *(["--dry-run"] if run.dry else [])], limit_s, environment)
    if not path.is_file():
        return Outcome(FAILED, "out of time before the first result" if ended.out_of_time else ended.last)
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("why_not"):
        return Outcome(SKIPPED, data["why_not"])
    found = report(data)
    crash = [ended.last] if ended.code != 0 and not ended.out_of_time else []
    failed = bool(found.errors or crash or found.empty)
    return Outcome(FAILED if failed else PASSED, found.message, found.errors + crash + found.lines, found.facts)


PHASES = (
    Phase("build", 300, 20, build),
    Phase("tests", 240, 60, gpu_tests),
    Phase("sanitizer", 120, 10, sanitizer),
    Phase("convs", 90, 40, convs),
    Phase("tune", 90, 20, tune),
    Phase("bench", 300, 150, bench),
)
DRY_S = 300.0  # per phase of a dry run


def limit(run: Run, phases: tuple[Phase, ...], i: int) -> float:
    """The time limit of phase i in seconds: what is left, minus what later phases need; all of it for the last."""
    if run.dry:
        return DRY_S
    later = phases[i + 1 :]
    left = run.left() - sum(phase.least_s for phase in later)
    return min(phases[i].most_s, left) if later else left


def command(phases: tuple[Phase, ...]) -> str:
    """The command that repeats the run."""
    named = "" if phases == PHASES else f" PHASES={','.join(phase.name for phase in phases)}"
    return f"make gpu{named} PYTHON={Path(sys.executable)}"
