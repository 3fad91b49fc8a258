"""The phases in their order, how long each may take, and those that are programs of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_run import fastest, files
from gpu_run.run import FAILED, PASSED, SKIPPED, Ended, Outcome, Run
from gpu_run.tests import gpu_tests, sanitizer

STOP_S = 10.0  # between the time a program is told it has and the time at which it is stopped

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
    """A part of the run. It may take `most_s` if others follow; `least_s` is kept for it while earlier ones run."""

    name: str
    most_s: float
    least_s: float
    work: Callable[[Run, float], Outcome]


def build(run: Run, limit_s: float) -> Outcome:
    """The extension, in place, for this GPU's architecture alone; then an import of all of it.

    Forced: a binary of these sources may be one for another GPU. ninja compiles only what differs.

    A dry run compiles nothing: the extension in place may be in use.
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
    """Measures the backends of conv_act and each CUDA kernel at ResNet's convolutions; see convs.py."""
    environment = {"TRITON_INTERPRET": "1"} if run.dry else {}
    ended, data = _program(run, "convs", files.CONVS, limit_s, environment)
    if data is None:
        return _broken(ended)
    if data["why_not"]:
        return Outcome(SKIPPED, data["why_not"])
    entries = data["entries"]
    message = f"{len(entries)} of {data['planned']} convolutions measured, no figure kept"
    message = message if run.dry else fastest.message(entries, data["planned"])
    wrong = [f"wrong answers: {text}" for text in data["wrong"]]
    lines = [] if run.dry else fastest.lines(entries)
    lines += [f"left out: {text}" for text in data["refused"]]
    failed = bool(wrong) or not entries or _crashed(ended)
    if _crashed(ended):
        lines.insert(0, ended.last)
    return Outcome(FAILED if failed else PASSED, message, wrong + lines, {"entries": len(entries)})


def tune(run: Run, limit_s: float) -> Outcome:
    """Measures configurations of the Triton kernels; see tune.py."""
    environment = {"TRITON_INTERPRET": "1"} if run.dry else {}
    ended, data = _program(run, "tune", files.TUNED, limit_s, environment)
    if data is None:
        return _broken(ended)
    if data["why_not"]:
        return Outcome(SKIPPED, data["why_not"])
    entries = data["entries"]
    faster = sorted((e for e in entries if e["speedup"] > 1), key=lambda e: -e["speedup"])
    message = f"{len(entries)} of {data['planned']} entries measured, "
    message += "no figure kept" if run.dry else f"another configuration is faster for {len(faster)}"
    lines = [f"{e['kernel']} {e['shape_class']}: {e['speedup']:.2f}x with {_config(e['config'])}" for e in faster]
    lines = [] if run.dry else lines
    wrong = [f"wrong answers: {text}" for text in data["wrong"]]
    failed = bool(wrong) or _crashed(ended)
    if _crashed(ended):
        lines.insert(0, ended.last)
    return Outcome(FAILED if failed else PASSED, message, wrong + lines, {"entries": len(entries)})


def _config(config: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items())


def bench(run: Run, limit_s: float) -> Outcome:
    """Measures the operators and networks beside their peers; see bench.py."""
    ended, data = _program(run, "bench", files.BENCH, limit_s, {})
    if data is None:
        return _broken(ended)
    status, settings = data["run"], data["settings"]
    rates = [f"copy {settings['bandwidth_bytes_per_s'] / 1e12:.2f} TB/s"]
    rates += [f"{rate / 1e12:.0f} TFLOP/s {name}" for name, rate in settings["flops_per_s"].items()]
    cut = len(status["not_measured"])
    message = f"{len(status['measured'])} of {len(status['measured']) + cut + len(status['failed'])} items"
    message += ", no figure kept" if run.dry else f"; {', '.join(rates)}"
    lines = [f"{item}: {why}" for item, why in status["failed"].items()]
    failed = bool(lines) or not status["measured"] or _crashed(ended)
    if _crashed(ended):
        lines.insert(0, ended.last)
    lines += [] if run.dry else status["headlines"]
    if status["not_measured"]:
        lines.append(f"not measured, for want of time: {', '.join(status['not_measured'])}")
    return Outcome(FAILED if failed else PASSED, message, lines, {"rates": settings["flops_per_s"]})


def _program(run: Run, name: str, file: str, limit_s: float, environment: dict[str, str]) -> tuple[Ended, Any]:
    """Runs a program of this folder that writes `file` as it goes: (its end, what it wrote; None for nothing)."""
    arguments = ["-m", f"gpu_run.{name}", "--out", str(run.results / file)]
    arguments += ["--seconds", f"{max(limit_s - STOP_S, 1):.0f}", *(["--dry-run"] if run.dry else [])]
    ended = run.python(arguments, limit_s, environment)
    path = run.results / file
    return ended, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _crashed(ended: Ended) -> bool:
    """A program that was stopped at its limit has written what it measured; one that failed by itself has not."""
    return ended.code != 0 and not ended.out_of_time


def _broken(ended: Ended) -> Outcome:
    return Outcome(FAILED, "out of time before the first result" if ended.out_of_time else ended.last)


PHASES = (
    Phase("build", 300, 20, build),
    Phase("tests", 240, 60, gpu_tests),
    Phase("sanitizer", 120, 10, sanitizer),
    Phase("convs", 90, 40, convs),
    Phase("tune", 90, 20, tune),
    Phase("bench", 300, 150, bench),
)
DRY_S = 300.0  # every phase of a dry run


def limit(run: Run, phases: tuple[Phase, ...], i: int) -> float:
    """Seconds for phase i: what is left, less what later ones must have; all of it for the last."""
    if run.dry:
        return DRY_S
    later = phases[i + 1 :]
    left = run.left() - sum(phase.least_s for phase in later)
    return min(phases[i].most_s, left) if later else left


def command(phases: tuple[Phase, ...]) -> str:
    """The command that does this again."""
    named = "" if phases == PHASES else f" PHASES={','.join(phase.name for phase in phases)}"
    return f"make gpu{named} PYTHON={Path(sys.executable)}"
