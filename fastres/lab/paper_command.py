"""`fastres paper`: an experiment of the paper from its runs to its table, or a list, or one page with all results."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from rich.table import Table as TextTable
from typer import Argument, Option

from fastres._info import usable_cores
from fastres.lab.devices import pick_device
from fastres.lab.paper import imagenet
from fastres.lab.paper.presets import CLAIMS, PaperError, Preset, preset
from fastres.lab.paper.registry import EXPERIMENTS, estimate, experiment, numbers
from fastres.lab.paper.report import page, stem, write
from fastres.lab.paper.runs import Context, Evaluation, Experiment, Place, execute
from fastres.lab.paper.tables import Outcome, Table, percent
from fastres.lab.results import environment, prepare_folder
from fastres.lab.terminal import Device, progress


@dataclass(frozen=True)
class Request:
    """Run an experiment of the ResNet paper: its table next to the published one, a plot, and JSON.

    Run the same command again, with the same --out, to resume.
    """

    name: Annotated[
        str | None,
        Argument(
            metavar="EXPERIMENT",
            help="degradation, shortcuts, responses, depth, skips or imagenet; or report.",
            show_default=False,
        ),
    ] = None
    listing: Annotated[bool, Option("--list", help="List experiments, published numbers and costs.")] = False
    preset: Annotated[str, Option(help="digits, cifar10 or ci.")] = "digits"
    out: Annotated[Path, Option(help="Folder for runs, tables and plots.")] = Path("out/paper")
    device: Device = "auto"
    workers: Annotated[int | None, Option(min=1, help="Runs at a time; on a CPU, by default one per core.")] = None
    data_root: Annotated[Path | None, Option(help="The folder that holds CIFAR-10 or ImageNet.")] = None
    format: Annotated[str, Option(help="For report: md or html.")] = "md"
    network: Annotated[str | None, Option(help="For imagenet: resnet50, resnet50-v1, plain34 ...")] = None
    weights: Annotated[Path | None, Option(help="For imagenet: a state_dict, torchvision's or ours.")] = None
    shortcut: Annotated[str | None, Option(help="For imagenet: A, B or C; by default B.")] = None
    views: Annotated[str, Option(help="For imagenet: the evaluations to run.")] = "1-crop,10-crop,multi-scale"

    @property
    def evaluation(self) -> Evaluation:
        views = tuple(view for view in self.views.split(",") if view)
        return Evaluation(self.network, self.weights, self.shortcut, views)


def run(console: Console, request: Request, command: str) -> None:
    """Show the list, write the report, or run an experiment.

    Raises LabError: bad input, before any work is done.
    """
    if request.listing:
        show_list(console)
    elif request.name is None:
        raise PaperError(f"experiment: got none, expected {', '.join(EXPERIMENTS)}, report, or --list")
    elif request.name == "report":
        console.print(str(page(request.out, request.format)), soft_wrap=True)
    else:
        run_experiment(console, experiment(request.name), request, command)


def run_experiment(console: Console, chosen: Experiment, request: Request, command: str) -> Outcome:
    """Execute the experiment's runs, show its tables on `console`, and write its files in `request.out`."""
    plan = _plan(chosen, request)
    device = pick_device(request.device)
    place = Place(request.out, str(device), _workers(request.workers, device), request.data_root)
    if chosen.name == "imagenet":
        imagenet.check(request.evaluation)
    name = stem(chosen.name, plan.name)
    prepare_folder(request.out, [f"{name}.json", f"{name}.md", f"{name}.png"])
    specs = chosen.specs(plan)
    console.print(f"{chosen.number} {chosen.title} ({chosen.source}): {plan.title}", highlight=False)
    results = {}
    if specs:
        with progress(console, chosen.name, every_s=20.0) as report:
            results = execute(specs, place, report)
    if device.type == "cpu" and place.workers > 1:
        torch.set_num_threads(1)  # time with one thread below, as in the runs
    context = Context(plan, place, results, request.evaluation, lambda text: console.print(text, highlight=False))
    outcome = chosen.outcome(context)
    for table in outcome.tables:
        show_table(console, table)
    for finding in outcome.findings:
        console.print(f"- {finding}", highlight=False, markup=False)
    plot = importlib.util.find_spec("matplotlib") is not None
    for path in write(chosen, plan, outcome, environment(device, command), request.out, plot):
        console.print(str(path), soft_wrap=True, highlight=False)
    return outcome


def _plan(chosen: Experiment, request: Request) -> Preset:
    if chosen.presets == ("imagenet",):
        return replace(preset("cifar10"), name="imagenet", title="ImageNet")
    if request.preset not in chosen.presets:
        raise PaperError(f"preset: got {request.preset!r}, expected {', '.join(chosen.presets)}")
    return preset(request.preset)


def _workers(wanted: int | None, device: torch.device) -> int:
    if device.type != "cpu":
        if wanted is not None and wanted > 1:
            raise PaperError(f"workers: got {wanted}, expected 1 on a GPU: parallel runs need --device cpu")
        return 1
    return wanted or usable_cores()


def show_table(console: Console, table: Table) -> None:
    """Print a table as text; a pipe gets it at its full width."""
    shown = TextTable(title=table.title, title_justify="left", box=None, pad_edge=False)
    for index, head in enumerate(table.head):
        shown.add_column(head, justify="left" if index == 0 else "right")
    for row in table.rows:
        shown.add_row(*row)
    console.print()
    console.print(shown)
    for note in table.notes:
        console.print(note, style="dim", highlight=False, markup=False)


def show_list(console: Console) -> None:
    """Print the experiments with their costs, and the published numbers with their tables."""
    show = functools.partial(console.print, highlight=False, soft_wrap=True)
    for chosen in EXPERIMENTS.values():
        show(f"\n[bold]{chosen.number} {chosen.name}[/]: {chosen.title} ({chosen.source})")
        lines = list(CLAIMS[chosen.name])
        for each in numbers(chosen.name):
            shortcut, note = each.shortcut and f" {each.shortcut}", each.note and f" ({each.note})"
            top5 = f" / {percent(each.top5)}" if each.top5 is not None else ""
            error = f"{percent(each.top1)}{top5} %{note}"
            lines.append(f"{each.source}: {each.network}{shortcut or ''}, {each.protocol}: {error}")
        for line in lines:
            show(f"   {line}", markup=False)
        for name in chosen.presets:
            cost = chosen.note if name == "imagenet" else estimate(chosen.name, name)
            shared = f"; {chosen.note}" if chosen.note and name != "imagenet" else ""
            show(f"   --preset {name}: {cost}{shared}", markup=False)
