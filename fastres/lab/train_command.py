"""`fastres train`: one run of the loop, with progress."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from typer import Argument, Option

from fastres._info import usable_cores
from fastres.lab import datasets, loop, networks, recipes
from fastres.lab.errors import LabError
from fastres.lab.loop_state import RunResult, RunSpec, Step
from fastres.lab.recipes import TrainRecipe
from fastres.lab.terminal import Device, Threads, on_step, progress

DEFAULT_RECIPE = {"digits": "digits", "digits8": "digits", "cifar10": "cifar10", "imagenet": "imagenet"}


@dataclass(frozen=True)
class Request:
    """Train one of the paper's networks with one of its recipes. Run the same command again to resume.

    The output folder holds checkpoint.pt, log.csv, TensorBoard's events if it is installed, and result.json.
    To use several processes: torchrun --nproc-per-node 2 -m fastres train ...
    """

    network: Annotated[str, Argument(metavar="NETWORK", help="resnet20, plain56, resnet50-v1 ...", show_default=False)]
    data: Annotated[str, Option(help="digits, digits8, cifar10 or imagenet.")] = "digits"
    recipe: Annotated[
        str | None, Option(help="cifar10, cifar10-110, imagenet, digits or digits-quick; by default, the data's.")
    ] = None
    out: Annotated[Path | None, Option(help="The run's folder; by default out/train/...")] = None
    seed: Annotated[int, Option(min=0, max=(1 << 63) - 1, help="Seed of weights, order and augmentation.")] = 0
    options: Annotated[list[str] | None, Option("--option", help="A network option, such as shortcut=B.")] = None
    iterations: Annotated[int | None, Option(min=1, help="Override the recipe's; drops move in proportion.")] = None
    batch_size: Annotated[int | None, Option(help="Images per iteration over all processes.")] = None
    bn_batch: Annotated[int | None, Option(help="Images that share BN statistics.")] = None
    lr: Annotated[float | None, Option(help="The initial learning rate.")] = None
    decay: Annotated[str | None, Option(help="Weight decay on all parameters or only on convolutions.")] = None
    dtype: Annotated[str, Option(help="fp32, or bf16 or fp16 under autocast.")] = "fp32"
    channels_last: Annotated[bool, Option("--channels-last/--nchw", help="The memory layout.")] = True
    swap: Annotated[bool, Option("--swap/--no-swap", help="Fused blocks, or PyTorch's own modules.")] = True
    data_root: Annotated[Path | None, Option(help="The folder that holds CIFAR-10 or ImageNet.")] = None
    device: Device = "auto"
    threads: Threads = None
    workers: Annotated[int | None, Option(min=0, help="Processes that decode ImageNet; by default one per core.")] = (
        None
    )
    stop_after: Annotated[int | None, Option(min=1, help="Stop for now after this many iterations.")] = None
    checkpoint_every: Annotated[
        int | None, Option(min=1, help="Iterations between checkpoints; by default every 30 s.")
    ] = None


def run(console: Console, request: Request, command: str) -> RunResult:
    """Train in the folder asked for, or resume there, and show images/s, the time left and the errors.

    Raises LabError for bad input; KeyboardInterrupt after Ctrl-C, with the run saved.
    """
    spec = _spec(request)
    out = request.out or Path("out/train") / f"{spec.network}-{spec.data}-{spec.recipe.name}-seed{spec.seed}"
    torch.set_num_threads(request.threads or min(torch.get_num_threads(), usable_cores()))
    if int(os.environ.get("RANK", "0")) > 0:
        console = Console(quiet=True)
    header = f"{spec.network} on {spec.data}: {_describe(spec.recipe)}; {out}"
    try:
        with progress(console, "training") as report:
            show = on_step(report)

            def first_step(step: Step) -> None:  # only now is it certain that the input is good
                nonlocal header
                if header:
                    console.print(header, soft_wrap=True, markup=False)
                header = ""
                show(step)

            result = loop.run(
                spec,
                out,
                data_root=request.data_root,
                device=request.device,
                on_step=first_step,
                stop_after=request.stop_after,
                checkpoint_every=request.checkpoint_every,
                workers=request.workers,
                command=command,
            )
    except KeyboardInterrupt:
        console.print(f"interrupted; run the same command again to resume from {out}", soft_wrap=True, markup=False)
        raise
    console.print(_summary(result), soft_wrap=True, markup=False)
    return result


def _spec(request: Request) -> RunSpec:
    if request.data not in datasets.NAMES:
        raise LabError(f"--data: got {request.data!r}, expected one of {', '.join(datasets.NAMES)}")
    base = recipes.recipe(request.recipe or DEFAULT_RECIPE[request.data])
    names = ("batch_size", "bn_batch", "lr", "decay")
    changes: dict[str, Any] = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.iterations is not None and request.iterations != base.iterations:
        changes |= _rescaled(base, request.iterations)
    recipe = replace(base, **changes)
    options = tuple(_option(text) for text in request.options or ())
    networks.build(request.network, 10, 3, **dict(options))  # raises for an unknown name or option
    how = request.dtype, request.channels_last, request.swap
    return RunSpec(request.network, request.data, recipe, request.seed, options, *how)


def _rescaled(recipe: TrainRecipe, iterations: int) -> dict[str, Any]:
    """The recipe's changes for fewer or more iterations: milestones in proportion, and at least four tests."""
    at = sorted({max(1, milestone * iterations // recipe.iterations) for milestone in recipe.milestones})
    every = max(1, min(recipe.test_every, iterations // 4))
    return {"iterations": iterations, "milestones": tuple(at), "test_every": every}


def _option(text: str) -> tuple[str, Any]:
    """Parse a network option: shortcut=B is a string, layers_per_block=3 a number, stride_in_1x1=true a bool."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise LabError(f"--option: got {text!r}, expected name=value, such as shortcut=B")
    known: dict[str, Any] = {"true": True, "false": False}
    return name, int(value) if value.isdecimal() else known.get(value.lower(), value)


def _describe(recipe: TrainRecipe) -> str:
    drops = ", ".join(map(str, recipe.milestones)) or "never"
    warm = f" after {recipe.warmup_lr:g}" if recipe.warmup_lr is not None else ""
    batches = f"recipe {recipe.name}, {recipe.iterations} iterations of {recipe.batch_size}"
    return f"{batches}, lr {recipe.lr:g}{warm}, / 10 at {drops}"


def _summary(result: RunResult) -> str:
    errors = (result.train_error, result.test_error, result.best_test_error)
    train, test, best = ("unknown" if error is None else f"{error:.2%}" for error in errors)
    done = f"{result.iterations} of {result.spec.recipe.iterations} iterations, {result.seconds:.1f} s"
    rate = f"{result.images / result.seconds:.0f} images/s" if result.seconds > 0 else "nothing run"
    text = f"training error {train}, test error {test} (best {best}); {done}, {rate} with tests"
    return f"{text}; {result.parameters:,} parameters"
