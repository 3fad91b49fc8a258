"""`fastres paper`: an experiment of the paper from its runs to its table, or a list, or one page of all results."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as TextTable

from fastres._info import usable_cores
from fastres.lab.devices import pick_device
from fastres.lab.paper.experiment import Context, Evaluation, Experiment
from fastres.lab.paper.presets import PaperError, Preset, preset
from fastres.lab.paper.published import CLAIMS
from fastres.lab.paper.registry import EXPERIMENTS, estimate, experiment, numbers
from fastres.lab.paper.report import page, stem, write
from fastres.lab.paper.runs import Place, execute
from fastres.lab.paper.tables import Outcome, Table, percent
from fastres.lab.results import environment, prepare_folder
from fastres.lab.terminal import progress


@dataclass(frozen=True)
class Request:
    """What was asked on the command line."""

    name: str | None
    listing: bool
    preset: str
    out: Path
    device: str
    workers: int | None
    data_root: Path | None
    format: str
    evaluation: Evaluation


def run(console: Console, asked: Request, command: str) -> None:
    """Shows the list, makes the report, or runs an experiment, on `console`.

    Raises LabError: bad input, before any work is done.
    """
    if asked.listing:
        show_list(console)
    elif asked.name is None:
        raise PaperError(f"experiment: got none, expected {', '.join(EXPERIMENTS)}, report, or --list")
    elif asked.name == "report":
        console.print(str(page(asked.out, asked.format)), soft_wrap=True)
    else:
        run_experiment(console, experiment(asked.name), asked, command)


def run_experiment(console: Console, chosen: Experiment, asked: Request, command: str) -> Outcome:
    """The experiment's runs, its tables on `console`, and its files in `asked.out`."""
    plan = _plan(chosen, asked)
    device = pick_device(asked.device)
    place = Place(asked.out, str(device), _workers(asked.workers, device), asked.data_root)
    if chosen.name == "imagenet":
        from fastres.lab.paper.imagenet import check

        check(asked.evaluation)
    name = stem(chosen.name, plan.name)
    prepare_folder(asked.out, [f"{name}.json", f"{name}.md", f"{name}.png"])
    specs = chosen.specs(plan)
    console.print(f"{chosen.number} {chosen.title} ({chosen.source}): {plan.title}", highlight=False)
    if specs:
        with progress(console, chosen.name, every_s=20.0) as report:
            results = execute(specs, place, report)
    else:
        results = {}
    if device.type == "cpu" and place.workers > 1:
        torch.set_num_threads(1)  # what is timed below, as the runs were
    context = Context(plan, place, results, asked.evaluation, lambda text: console.print(text, highlight=False))
    outcome = chosen.outcome(context)
    for table in outcome.tables:
        show_table(console, table)
    for finding in outcome.findings:
        console.print(f"- {finding}", highlight=False, markup=False)
    for path in write(chosen, plan, outcome, environment(device, command), asked.out, _can_draw()):
        console.print(str(path), soft_wrap=True, highlight=False)
    return outcome


def _plan(chosen: Experiment, asked: Request) -> Preset:
    if chosen.presets == ("imagenet",):
        return replace(preset("cifar10"), name="imagenet", title="ImageNet")
    if asked.preset not in chosen.presets:
        raise PaperError(f"preset: got {asked.preset!r}, expected {', '.join(chosen.presets)}")
    return preset(asked.preset)


def _workers(wanted: int | None, device: torch.device) -> int:
    if device.type != "cpu":
        if wanted is not None and wanted > 1:
            raise PaperError(f"workers: got {wanted}, expected 1 on a GPU: runs side by side need --device cpu")
        return 1
    return wanted or usable_cores()


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def show_table(console: Console, table: Table) -> None:
    """A table as text; a pipe gets it as wide as it is."""
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
    """Experiments with what they cost, and the published numbers with their tables."""
    for chosen in EXPERIMENTS.values():
        console.print(f"\n[bold]{chosen.number} {chosen.name}[/]: {chosen.title} ({chosen.source})", highlight=False)
        for claim in CLAIMS[chosen.name]:
            console.print(f"   {claim}", highlight=False, markup=False)
        for each in numbers(chosen.name):
            shortcut = f" {each.shortcut}" if each.shortcut else ""
            top5 = f" / {percent(each.top5)}" if each.top5 is not None else ""
            note = f" ({each.note})" if each.note else ""
            line = f"{each.network}{shortcut}, {each.protocol}: {percent(each.top1)}{top5} %{note}"
            console.print(f"   {each.source}: {line}", highlight=False, markup=False)
        for name in chosen.presets:
            cost = chosen.note if name == "imagenet" else estimate(chosen.name, name)
            shared = f"; {chosen.note}" if chosen.note and name != "imagenet" else ""
            console.print(f"   --preset {name}: {cost}{shared}", highlight=False, markup=False)
