"""`fastres demo`: digits, then photographs, then the table as JSON and as a chart."""

from __future__ import annotations

import importlib.util
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as TextTable
from rich.text import Text

import fastres
from fastres._info import cpu, usable_cores
from fastres.lab import demo_digits, demo_photographs
from fastres.lab.data import digits, photographs
from fastres.lab.demo_photographs import Effort, Row, Table, verdict_dict
from fastres.lab.devices import pick_device
from fastres.lab.errors import MissingExtra, RefereeError
from fastres.lab.figures import Bar, throughput_chart
from fastres.lab.results import environment, prepare_folder, write_json
from fastres.lab.terminal import progress
from fastres.lab.train import Step
from fastres.verify import Verification

SCHEMA = "fastres.demo/1"


def run(
    console: Console,
    out: Path,
    weights: Path | None,
    device_name: str,
    threads: int | None,
    quick: bool,
    command: str,
) -> None:
    """The whole demo, shown on `console` as it goes.

    Raises LabError: bad arguments before any work is done; a result that falls short (AccuracyError, RefereeError)
    once everything that could be measured has been shown, and for the referee also written.
    """
    _require_extras()
    logging.getLogger("fastres").addHandler(logging.NullHandler())  # what it would warn of is in the table
    device = pick_device(device_name)
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))
    prepare_folder(out, ["demo.json", "demo.png"])
    network = demo_photographs.resnet50(weights)
    effort = demo_photographs.QUICK if quick else Effort()
    start = time.perf_counter()
    console.print(f"fastres {fastres.__version__} on {_machine(device)}, torch {torch.__version__}", soft_wrap=True)

    digits_result, same_answers = _digits(console, device, quick)
    pictures = photographs(effort.size)
    console.print(f"\n[bold]3  ResNet-50 on photographs[/]: {', '.join(pictures.names)} at {effort.size}x{effort.size}")
    with progress(console, "   running", remaining=False) as report:
        table = demo_photographs.compare_ways(network, pictures, device, weights, effort, report)
    _show(console, table)

    console.print("\n[bold]4  Results[/]")
    data = {
        "schema": SCHEMA,
        "quick": quick,
        **environment(device, command),
        "digits": digits_result,
        "photographs": table.to_dict(),
        "seconds": time.perf_counter() - start,
    }
    write_json(out / "demo.json", data)
    _draw(table, out / "demo.png", device)
    for name in ("demo.json", "demo.png"):
        console.print(f"   {out / name}", soft_wrap=True, markup=False)
    console.print(f"   done in {time.perf_counter() - start:.0f} s")
    failed = [row.name for row in table.rows if _failed(row)]
    if failed:
        raise RefereeError(f"the referee rejects {', '.join(failed)}: error above 2x eager's")
    if not same_answers:
        raise RefereeError("the frozen digits network does not give the same answers, see 2")


def _digits(console: Console, device: torch.device, quick: bool) -> tuple[dict[str, Any], bool]:
    data = digits(size=8 if quick else 16)
    n_train, n_test = len(data.train_labels), len(data.test_labels)
    console.print(f"\n[bold]1  ResNet-20 learns handwritten digits[/]: {n_train} to train on, {n_test} held out")
    with progress(console, "   training") as report:

        def on_step(step: Step) -> None:
            rate = f"{step.images / step.seconds:.0f} images/s"
            report(step.step, step.steps, f"epoch {step.epoch}/{step.epochs}  loss {step.loss:.3f}  {rate}")

        learned = demo_digits.learn(data, device, quick, on_step)
    wanted = "a few steps only, --quick" if quick else f"at least {demo_digits.WANTED_ACCURACY:.0%} wanted"
    console.print(
        f"   held-out accuracy [bold]{learned.accuracy:.2%}[/] ({wanted}); {learned.trained.seconds:.1f} s,"
        f" {learned.blocks} fused blocks"
    )

    console.print("\n[bold]2  The frozen network gives the same answers[/]")
    frozen, agreement = demo_digits.freeze_and_compare(learned.model, data)
    _indented(console, str(agreement))
    verdict = frozen.report.verification
    _indented(console, f"{frozen.report.folded} BN folded; referee: {_verdict(verdict)}")
    result = {"held_out": n_test, **learned.to_dict(), "frozen": asdict(agreement), "verdict": verdict_dict(verdict)}
    return result, bool(agreement) and bool(verdict)


def _show(console: Console, table: Table) -> None:
    text = TextTable(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for title, justify in (
        ("   way to run", "left"),
        ("images/s", "right"),
        ("ms", "right"),
        ("ratio to eager", "left"),
        ("referee", "left"),
    ):
        text.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in table.rows:
        name = Text(f"   {row.name}", "bold" if row.ours else "")
        text.add_row(name, f"{row.images_per_s:.1f}", f"{row.ms:.1f}", str(row.ratio or "1.00x"), _verdict(row.verdict))
    console.print(text)
    notes = [
        f"Batch {table.batch}. Ratio: median of the paired rounds against {table.baseline}, the faster eager, and its"
        f" 95 % interval; above 1 is faster. Referee: error over eager's, against float64; at most 2 passes.",
        *(f"{name}: {answer}" for name, answer in table.answers.items()),
        *table.notes,
    ]
    for note in notes:
        _indented(console, note)


def _indented(console: Console, text: str) -> None:
    console.print(Padding(Text(text), (0, 0, 0, 3), expand=False))


def _verdict(verdict: Verification | None) -> str:
    if verdict is None:
        return "is eager"
    return f"{'passed' if verdict else 'FAILED'} ({verdict.error_ratio:.2g})"


def _draw(table: Table, path: Path, device: torch.device) -> None:
    bars = []
    for row in table.rows:
        ratio = f"{row.ratio.median if row.ratio else 1.0:.2f}x{', WRONG ANSWERS' if _failed(row) else ''}"
        bars.append(Bar(row.name, row.images_per_s, f"{row.images_per_s:.1f}  ({ratio})", row.ours, not _failed(row)))
    title = f"ResNet-50 on photographs, batch {table.batch}, {table.size}x{table.size}"
    footnote = f"{_machine(device)}; torch {torch.__version__}; ratios to {table.baseline}, the faster eager"
    throughput_chart(bars, path, title, footnote)


def _failed(row: Row) -> bool:
    return row.verdict is not None and not row.verdict


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = cpu()
    threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
    return f"{found['model']} ({found['isa']}, {threads})"


def _require_extras() -> None:
    """Raises MissingExtra, naming all packages of the demo that are not there, before minutes of work end in one."""
    modules = {"sklearn": "scikit-learn", "torchvision": "torchvision", "matplotlib": "matplotlib"}
    missing = [name for module, name in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtra(f'the demo needs {", ".join(missing)}: pip install "fastres[cli,train,viz]"')
