"""`fastres demo`: digits, then photographs, then the table as JSON and as a chart."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as TextTable
from rich.text import Text
from torch import nn
from typer import Option

import fastres
from fastres._info import cpu, usable_cores
from fastres.lab import datasets, demo_photographs, loop, named_models
from fastres.lab.batches import InMemory
from fastres.lab.datasets import photographs
from fastres.lab.demo_photographs import Effort, Row, Table, verdict_dict
from fastres.lab.devices import pick_device
from fastres.lab.errors import AccuracyError, MissingExtra, RefereeError
from fastres.lab.loop import RunResult, RunSpec, Step
from fastres.lab.recipes import TrainRecipe
from fastres.lab.results import Bar, environment, prepare_folder, throughput_chart, write_json
from fastres.lab.terminal import Device, Threads, on_step, progress
from fastres.verify import Verification, compare_predictions

SCHEMA = "fastres.demo/1"
WANTED_ACCURACY = 0.97
RECIPE = TrainRecipe(
    "demo", 64, 220, 0.1, (110, 165), weight_decay=5e-4, augment="digits", test_every=220, log_every=22
)
QUICK = replace(RECIPE, name="demo-quick", iterations=12, milestones=(6, 10))


@dataclass(frozen=True)
class Request:
    """Train ResNet-20 on real digits, freeze it, then time ResNet-50 on real photographs.

    Writes the results as JSON and as a chart. Takes under four minutes on two cores; uses a GPU if there is one.
    """

    out: Annotated[Path, Option(help="Folder for demo.json and demo.png.")] = Path("out/demo")
    weights: Annotated[Path | None, Option(help="A torchvision ResNet-50 checkpoint; by default random weights.")] = (
        None
    )
    device: Device = "auto"
    threads: Threads = None
    quick: Annotated[bool, Option("--quick", help="A smoke test: a few steps, small images.")] = False


def run(console: Console, request: Request, command: str) -> None:
    """Run the whole demo, shown on `console` as it goes.

    Raises LabError: bad arguments before any work is done; a result that falls short (AccuracyError, RefereeError)
    once everything that could be measured has been shown, and for the referee also written.
    """
    _require_extras()
    logging.getLogger("fastres").addHandler(logging.NullHandler())  # its warnings are in the table
    device, out = pick_device(request.device), request.out
    torch.set_num_threads(request.threads or min(torch.get_num_threads(), usable_cores()))
    prepare_folder(out, ["demo.json", "demo.png"])
    network = named_models.build("torchvision:resnet50", request.weights).model
    effort = demo_photographs.QUICK if request.quick else Effort()
    start = time.perf_counter()
    console.print(f"fastres {fastres.__version__} on {_machine(device)}, torch {torch.__version__}", soft_wrap=True)

    digits_result, same_answers = _digits(console, device, request.quick)
    names, images = photographs(effort.size)
    console.print(f"\n[bold]3  ResNet-50 on photographs[/]: {', '.join(names)} at {effort.size}x{effort.size}")
    with progress(console, "   running", remaining=False) as report:
        table = demo_photographs.compare_configurations(network, images, device, request.weights, effort, report)
    if request.weights is not None:
        table.answers.update(demo_photographs.answers(table, names))
    _show(console, table)

    console.print("\n[bold]4  Results[/]")
    data = {
        "schema": SCHEMA,
        "quick": request.quick,
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
    failed = [row.name for row in table.rows if row.failed]
    if failed:
        raise RefereeError(f"the referee rejects {', '.join(failed)}: error above 2x eager's")
    if not same_answers:
        raise RefereeError("the frozen digits network does not give the same answers, see 2")


def _digits(console: Console, device: torch.device, quick: bool) -> tuple[dict[str, Any], bool]:
    data = datasets.load("digits8" if quick else "digits")
    assert isinstance(data, InMemory)
    sizes = f"{data.train_size} to train on, {data.test_size} held out"
    console.print(f"\n[bold]1  ResNet-20 learns handwritten digits[/]: {sizes}")
    with progress(console, "   training") as report:
        learned = learn(device, quick, on_step(report))
    wanted = "only a few steps, --quick" if quick else f"at least {WANTED_ACCURACY:.0%} required"
    console.print(
        f"   held-out accuracy [bold]{learned.accuracy:.2%}[/] ({wanted}); {learned.result.seconds:.1f} s,"
        f" {learned.blocks} fused blocks"
    )

    console.print("\n[bold]2  The frozen network gives the same answers[/]")
    images = data.test()[0].to(device)
    frozen = fastres.freeze(learned.model, images[:64], verify="warn")  # a rejection fails the demo at its end
    agreement = compare_predictions(learned.model, frozen, images)
    _indented(console, str(agreement))
    verdict = frozen.report.verification
    _indented(console, f"{frozen.report.folded} BN folded; referee: {_verdict(verdict)}")
    compared = {"frozen": asdict(agreement), "verdict": verdict_dict(verdict)}
    return {"held_out": data.test_size, **learned.to_dict(), **compared}, bool(agreement) and bool(verdict)


def _show(console: Console, table: Table) -> None:
    text = TextTable(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for title in ("   configuration", "images/s", "ms", "ratio to eager", "referee"):
        text.add_column(title, justify="right" if title in ("images/s", "ms") else "left", no_wrap=True)
    for row in table.rows:
        name = Text(f"   {row.name}", "bold" if row.ours else "")
        text.add_row(name, f"{row.images_per_s:.1f}", f"{row.ms:.1f}", str(row.ratio or "1.00x"), _verdict(row.verdict))
    console.print(text)
    notes = [
        f"Batch {table.batch}. Ratio: median of the paired rounds against {table.baseline}, the faster eager layout,"
        f" with its 95 % interval; above 1 is faster. Referee: error over eager's, against float64; 2 or less passes.",
        *(f"{name}: {answer}" for name, answer in table.answers.items()),
        *table.notes,
    ]
    for note in notes:
        _indented(console, note)


def _indented(console: Console, text: str) -> None:
    console.print(Padding(Text(text), (0, 0, 0, 3), expand=False))


def _verdict(verdict: Verification | None) -> str:
    return f"{'passed' if verdict else 'FAILED'} ({verdict.error_ratio:.2g})" if verdict is not None else "is eager"


def _draw(table: Table, path: Path, device: torch.device) -> None:
    def bar(row: Row) -> Bar:
        ratio = f"{row.ratio.median if row.ratio else 1.0:.2f}x{', WRONG ANSWERS' if row.failed else ''}"
        return Bar(row.name, row.images_per_s, f"{row.images_per_s:.1f}  ({ratio})", row.ours, not row.failed)

    title = f"ResNet-50 on photographs, batch {table.batch}, {table.size}x{table.size}"
    footnote = f"{_machine(device)}; torch {torch.__version__}; ratios to {table.baseline}, the faster eager layout"
    throughput_chart([bar(row) for row in table.rows], path, title, footnote)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = cpu()
    threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
    return f"{found['model']} ({found['isa']}, {threads})"


def _require_extras() -> None:
    """Raise MissingExtra, naming every missing package, before minutes of work end in the first of them."""
    modules = {"sklearn": "scikit-learn", "torchvision": "torchvision", "matplotlib": "matplotlib"}
    missing = [name for module, name in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtra(f'the demo needs {", ".join(missing)}: pip install "fastres[cli,train,viz]"')


@dataclass(frozen=True)
class Learned:
    """The trained network, in eval mode, and its run."""

    model: nn.Module
    result: RunResult
    blocks: int  # fused residual blocks in the model

    @property
    def accuracy(self) -> float:
        """The fraction of the held-out digits that it gets right."""
        assert self.result.test_error is not None  # the loop tests after its last iteration
        return 1 - self.result.test_error

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": "fastres.models.cifar_resnet(20)",
            "parameters": self.result.parameters,
            "fused_blocks": self.blocks,
            "steps": self.result.iterations,
            "seconds": self.result.seconds,
            "images_per_s": self.result.images / self.result.seconds,
            "epoch_losses": [point.train_loss for point in self.result.history],
            "accuracy": self.accuracy,
            "wanted_accuracy": WANTED_ACCURACY,
        }


def learn(device: torch.device, quick: bool, on_step: Callable[[Step], None] | None = None, seed: int = 0) -> Learned:
    """Train on the training digits and test on the held-out ones; `quick` takes a few steps on smaller images.

    The network is the paper's for CIFAR-10 (section 4.2; n = 3, shortcut A) on one input channel.

    Raises AccuracyError below 97 % (unless quick).
    """
    spec = RunSpec("resnet20", "digits8", QUICK, seed) if quick else RunSpec("resnet20", "digits", RECIPE, seed)
    with tempfile.TemporaryDirectory() as folder:
        result = loop.run(spec, Path(folder), device=str(device), on_step=on_step)
        model = loop.trained(Path(folder)).to(device)
    learned = Learned(model, result, sum(isinstance(m, fastres.nn.BasicBlock) for m in model.modules()))
    if learned.accuracy < WANTED_ACCURACY and not quick:
        wanted = f"expected at least {WANTED_ACCURACY:.0%}"
        raise AccuracyError(f"ResNet-20 reached {learned.accuracy:.2%} on the held-out digits, {wanted}")
    return learned
