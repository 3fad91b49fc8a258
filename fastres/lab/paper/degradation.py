"""Experiment 1, the degradation problem (Figs. 1 and 6): plain against residual networks, by depth.

plain      training error rises with depth: not overfitting, since the deeper network contains the shallower one
residual   y = F(x) + x (Eqn. 1): training and test error fall with depth
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastres.lab import batches, datasets, networks
from fastres.lab.devices import channels_last, pick_device
from fastres.lab.loop_state import RunResult, RunSpec
from fastres.lab.paper.curves import (
    Results,
    columns,
    curve,
    error_panel,
    gradient_norms,
    over_seeds,
    test_errors,
    train_errors,
    train_losses,
)
from fastres.lab.paper.experiment import Context, Experiment
from fastres.lab.paper.presets import Preset
from fastres.lab.paper.published import find
from fastres.lab.paper.tables import Comparison, Outcome, Panel, Table, percent

KINDS = {"plain": "plain", "resnet": "residual"}
_ERRORS = (("test", test_errors, "solid"), ("train", train_errors, "dashed"))


def compared(preset: Preset) -> tuple[str, ...]:
    """The names of the networks compared.

    >>> from fastres.lab.paper.presets import preset
    >>> compared(preset("ci"))
    ('plain8', 'resnet8', 'plain20', 'resnet20')
    """
    return tuple(f"{kind}{depth}" for depth in preset.depths for kind in KINDS)


def specs(preset: Preset) -> list[RunSpec]:
    """Plain and residual networks of every depth, every seed."""
    return preset.specs(compared(preset))


def outcome(context: Context) -> Outcome:
    """Errors by depth next to Table 6, curves as in Fig. 6, and a verdict on each claim."""
    preset = context.preset
    found = {network: context.of(network) for network in compared(preset)}
    context.tell("gradients before the first step")
    starts = {network: [first_gradient(r.spec, context) for r in results] for network, results in found.items()}
    table = Table.of(
        f"Plain and residual networks by depth: {preset.title}",
        {
            "network": _dashed,
            **columns(found, "parameters", "training error %", "training loss", "test error %"),
            "gradient, first step": lambda network: f"{statistics.median(starts[network]):.3g}",
            **columns(found, "gradient"),
            "paper, CIFAR-10 test error %": _published,
        },
        found,
        preset.seeds_note(
            f", at the end of {preset.recipe.iterations:,} iterations. Training error and loss: the last tenth of the"
            " iterations, on augmented batches. Gradient: the norm over all parameters; the median of the seeds before"
            " the first step (added after the results were seen, to explain them), and the median over the last nine"
            " tenths of the iterations."
        ),
        "The paper's plain networks of 20 to 56 layers are curves in Fig. 6, without numbers.",
    )
    return Outcome((table,), tuple(findings(preset, found)), tuple(_panels(preset, found)), data(found, starts))


def _published(network: str) -> str:
    errors = find(network, source="Table 6")
    return percent(errors[0].top1) if errors else "> 60, not displayed" if network == "plain110" else "-"


def _panels(preset: Preset, found: dict[str, list[RunResult]]) -> list[Panel]:
    depths = tuple(enumerate(preset.depths))
    panels = [
        error_panel(
            title,
            (
                over_seeds(found[f"{kind}{depth}"], f"{what}_error", f"{kind}-{depth} {what}", color, style)
                for color, depth in depths
                for what, _, style in _ERRORS
            ),
        )
        for kind, title in KINDS.items()
    ]
    ends = (
        curve(((d, value(found[f"{kind}{d}"])) for d in preset.depths), f"{name} {what}", color, style)
        for color, (kind, name) in enumerate(KINDS.items())
        for what, value, style in _ERRORS
    )
    norms = (
        over_seeds(found[f"{kind}{depth}"], "gradient_norm", f"{kind}-{depth}", color, style)
        for kind, style in zip(KINDS, ("dashed", "solid"), strict=True)
        for color, depth in depths
    )
    gradients = Panel("gradient norm", "iteration", "norm of all gradients", tuple(norms), log=True)
    return [*panels, error_panel("at the end, by depth", ends, by_depth=True), gradients]


def first_gradient(spec: RunSpec, context: Context) -> float:
    """The norm of all gradients of a run's first batch, before any step: the log starts some steps later.

    Args:
        spec: the run whose initial weights and first batch to take.
        context: where the data are.
    """
    data = datasets.load(spec.data, context.place.data_root)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(batches.stream(spec.seed, "weights"))
        model = networks.build(spec.network, data.classes, data.channels, **dict(spec.options))
    device = pick_device(context.place.device)
    model = channels_last(model.to(device))
    images, labels = next(data.batches(spec.recipe, spec.seed, 0, batches.Part(), device))
    F.cross_entropy(model(images), labels).backward()
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))


def findings(preset: Preset, found: dict[str, list[RunResult]]) -> list[str]:
    """Each claim of section 4.2 against the measurements."""

    def compare(a: str, b: str, value: Callable[[Results], list[float]]) -> Comparison:
        return Comparison(_dashed(a), value(found[a]), _dashed(b), value(found[b]))

    lines, first, last = [], preset.depths[0], preset.depths[-1]
    measures = (("training", train_errors), ("test", test_errors))
    for what, value in measures:
        for kind, name in KINDS.items():
            claim = f"{name}: {what} error {'rises' if kind == 'plain' else 'falls'} with depth"
            lines.append(compare(f"{kind}{first}", f"{kind}{last}", value).finding(claim, higher=kind == "plain"))
    for depth in preset.depths:
        for what, value in measures:
            claim = f"{depth} layers: residual has the lower {what} error"
            lines.append(compare(f"plain{depth}", f"resnet{depth}", value).finding(claim, higher=False))
    return lines


def _dashed(network: str) -> str:
    kind = network.rstrip("0123456789")
    return f"{kind}-{network.removeprefix(kind)}"


def data(found: dict[str, list[RunResult]], starts: dict[str, list[float]]) -> dict[str, object]:
    """Every seed's numbers, for the JSON."""
    return {
        network: {
            "seeds": [r.spec.seed for r in results],
            "parameters": results[0].parameters,
            "test_error": test_errors(results),
            "best_test_error": [r.best_test_error for r in results],
            "train_error": train_errors(results),
            "train_loss": train_losses(results),
            "first_gradient_norm": starts[network],
            "gradient_norm": gradient_norms(results, 0.1),
            "seconds": [r.seconds for r in results],
        }
        for network, results in found.items()
    }


EXPERIMENT = Experiment(
    1, "degradation", "Degradation: plain against residual by depth", "Figs. 1, 6; Table 6", specs, outcome
)
