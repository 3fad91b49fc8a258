"""`fastres train`: one run of the loop, shown as it goes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastres._info import usable_cores
from fastres.lab import datasets, loop, networks, recipes
from fastres.lab.errors import LabError, RecipeError
from fastres.lab.loop_state import RunResult, RunSpec
from fastres.lab.recipes import TrainRecipe
from fastres.lab.terminal import Report, progress
from fastres.lab.train import Step

DEFAULT_RECIPE = {"digits": "digits", "digits8": "digits", "cifar10": "cifar10", "imagenet": "imagenet"}


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line, unchecked; None: as the recipe has it."""

    network: str
    data: str = "digits"
    recipe: str | None = None
    out: Path | None = None
    seed: int = 0
    options: tuple[str, ...] = ()  # "name=value" each
    iterations: int | None = None
    batch_size: int | None = None
    bn_batch: int | None = None
    lr: float | None = None
    decay: str | None = None
    dtype: str = "fp32"
    channels_last: bool = True
    swap: bool = True
    data_root: Path | None = None
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    stop_after: int | None = None
    checkpoint_every: int | None = None


def run(console: Console, request: Request, command: str) -> RunResult:
    """Trains in the folder asked for, or goes on there, and shows images/s, what is left and the errors.

    Raises LabError for what cannot be used; KeyboardInterrupt after Ctrl-C, the run saved.
    """
    spec = _spec(request)
    out = request.out or Path("out/train") / f"{spec.network}-{spec.data}-{spec.recipe.name}-seed{spec.seed}"
    torch.set_num_threads(request.threads or min(torch.get_num_threads(), usable_cores()))
    if int(os.environ.get("RANK", "0")) > 0:
        console = Console(quiet=True)
    header = f"{spec.network} on {spec.data}: {_line(spec.recipe)}; {out}"
    try:
        with progress(console, "training") as report:
            shown = _Shown(report, lambda: console.print(header, soft_wrap=True, markup=False))
            result = loop.run(
                spec,
                out,
                data_root=request.data_root,
                device=request.device,
                on_step=shown.step,
                stop_after=request.stop_after,
                checkpoint_every=request.checkpoint_every,
                workers=request.workers,
                command=command,
            )
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on from {out}", soft_wrap=True, markup=False)
        raise
    console.print(_summary(result), soft_wrap=True, markup=False)
    return result


class _Shown:
    """Draws the loop's steps, with the images/s of the last fifty."""

    def __init__(self, report: Report, begin: Callable[[], None]) -> None:
        self.report, self.begin = report, begin
        self.last: deque[tuple[int, float]] = deque(maxlen=50)

    def step(self, step: Step) -> None:
        if not self.last:  # what cannot be used has been refused before
            self.begin()
        self.last.append((step.images, step.seconds))
        (images, seconds), (images0, seconds0) = self.last[-1], self.last[0]
        rate = f"{(images - images0) / (seconds - seconds0):.0f} images/s" if seconds > seconds0 else ""
        self.report(step.step, step.steps, f"epoch {step.epoch}/{step.epochs}  loss {step.loss:.3f}  {rate}".rstrip())


def _spec(request: Request) -> RunSpec:
    if request.data not in datasets.NAMES:
        raise LabError(f"--data: got {request.data!r}, expected one of {', '.join(datasets.NAMES)}")
    if not 0 <= request.seed < 1 << 63:
        raise LabError(f"--seed: got {request.seed}, expected 0 to {(1 << 63) - 1}")
    for option, value in (("--stop-after", request.stop_after), ("--checkpoint-every", request.checkpoint_every)):
        if value is not None and value < 1:
            raise LabError(f"{option}: got {value}, expected at least 1")
    if request.workers is not None and request.workers < 0:
        raise LabError(f"--workers: got {request.workers}, expected at least 0")
    base = recipes.recipe(request.recipe or DEFAULT_RECIPE[request.data])
    names = ("batch_size", "bn_batch", "lr", "decay")
    changes: dict[str, Any] = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.iterations is not None and request.iterations != base.iterations:
        changes |= _shortened(base, request.iterations)
    recipe = replace(base, **changes)
    options = tuple(_option(text) for text in request.options)
    networks.build(request.network, 10, 3, **dict(options))  # an unknown name or option is found here
    return RunSpec(
        request.network, request.data, recipe, request.seed, options, request.dtype, request.channels_last, request.swap
    )


def _shortened(recipe: TrainRecipe, iterations: int) -> dict[str, Any]:
    """The milestones at the same fractions of `iterations`, tests at least four times."""
    if iterations < 1:
        raise RecipeError(f"--iterations: got {iterations}, expected at least 1")
    at = sorted({max(1, milestone * iterations // recipe.iterations) for milestone in recipe.milestones})
    every = max(1, min(recipe.test_every, iterations // 4))
    return {"iterations": iterations, "milestones": tuple(at), "test_every": every}


def _option(text: str) -> tuple[str, Any]:
    """A network's option: shortcut=B is a string, layers_per_block=3 a number, stride_in_1x1=true a bool."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise LabError(f"--option: got {text!r}, expected name=value, such as shortcut=B")
    known: dict[str, Any] = {"true": True, "false": False}
    return name, int(value) if value.isdecimal() else known.get(value.lower(), value)


def _line(recipe: TrainRecipe) -> str:
    drops = ", ".join(map(str, recipe.milestones)) or "never"
    warm = f" after {recipe.warmup_lr:g}" if recipe.warmup_lr is not None else ""
    return (
        f"recipe {recipe.name}, {recipe.iterations} iterations of {recipe.batch_size},"
        f" lr {recipe.lr:g}{warm}, / 10 at {drops}"
    )


def _summary(result: RunResult) -> str:
    def percent(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.2%}"

    done = f"{result.iterations} of {result.spec.recipe.iterations} iterations, {result.seconds:.1f} s"
    rate = f"{result.images / result.seconds:.0f} images/s" if result.seconds > 0 else "nothing run"
    errors = f"training error {percent(result.train_error)}, test error {percent(result.test_error)}"
    best = f"best {percent(result.best_test_error)}"
    return f"{errors} ({best}); {done}, {rate} with tests; {result.parameters:,} parameters"
