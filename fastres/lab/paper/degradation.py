"""Experiment 1, the degradation problem (Figs. 1 and 6): plain against residual networks, by depth.

plain      training error rises with depth: not overfitting, since the deeper network holds the shallower one
residual   y = F(x) + x (Eqn. 1): training and test error fall with depth
"""

from __future__ import annotations

import math
import statistics

import torch
import torch.nn.functional as F

from fastres.lab import datasets, networks
from fastres.lab.devices import channels_last, pick_device
from fastres.lab.loop_state import RunResult, RunSpec
from fastres.lab.paper import curves
from fastres.lab.paper.experiment import Context, Experiment
from fastres.lab.paper.presets import Preset
from fastres.lab.paper.published import find
from fastres.lab.paper.tables import Comparison, Outcome, Panel, Table, percent, spread

KINDS = ("plain", "resnet")


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
    """Errors by depth beside Table 6, curves as in Fig. 6, and whether each claim holds here."""
    preset = context.preset
    found = {f"{kind}{depth}": context.of(f"{kind}{depth}") for kind in KINDS for depth in preset.depths}
    context.tell("gradients before the first step")
    starts = {name: [first_gradient(r.spec, context) for r in results] for name, results in found.items()}
    rows = []
    for depth in preset.depths:
        for kind in KINDS:
            results = found[f"{kind}{depth}"]
            paper = find(f"{kind}{depth}", source="Table 6")
            said = (
                percent(paper[0].top1) if paper else "> 60, not displayed" if kind + str(depth) == "plain110" else "-"
            )
            rows.append(
                (
                    f"{kind}-{depth}",
                    f"{results[0].parameters:,}",
                    spread(curves.train_errors(results)),
                    spread(curves.train_losses(results), 1, 4),
                    spread(curves.test_errors(results)),
                    f"{statistics.median(starts[f'{kind}{depth}']):.3g}",
                    spread(curves.gradient_norms(results, 0.1), 1, 2),
                    said,
                )
            )
    head = (
        "network",
        "parameters",
        "training error %",
        "training loss",
        "test error %",
        "gradient, first step",
        "gradient",
    )
    table = Table(
        f"Plain and residual networks by depth: {preset.title}",
        (*head, "paper, CIFAR-10 test error %"),
        tuple(rows),
        (
            f"Mean ± sample deviation of {len(preset.seeds)} seeds, at the end of {preset.recipe.iterations:,} "
            "iterations. Training error and loss: the last tenth of the iterations, on augmented batches. Gradient: "
            "the norm over all parameters; the median of the seeds before the first step (added once the "
            "results were seen, to explain them), and the median over the last nine tenths of the iterations.",
            "The paper's plain networks of 20 to 56 layers are curves in Fig. 6, without numbers.",
        ),
    )
    panels = [
        Panel(
            "plain" if kind == "plain" else "residual",
            "iteration",
            "error %",
            tuple(
                curves.over_seeds(found[f"{kind}{depth}"], value, label.format(f"{kind}-{depth}"), i, style)
                for i, depth in enumerate(preset.depths)
                for value, label, style in (("test_error", "{} test", "solid"), ("train_error", "{} train", "dashed"))
            ),
            percent=True,
        )
        for kind in KINDS
    ]
    panels.append(
        Panel(
            "at the end, by depth",
            "layers",
            "error %",
            tuple(
                curves.by_depth([(d, value(found[f"{kind}{d}"])) for d in preset.depths], f"{name} {what}", i, style)
                for i, (kind, name) in enumerate(zip(KINDS, ("plain", "residual"), strict=True))
                for what, value, style in (
                    ("test", curves.test_errors, "solid"),
                    ("train", curves.train_errors, "dashed"),
                )
            ),
            percent=True,
            points=True,
        )
    )
    panels.append(
        Panel(
            "gradient norm",
            "iteration",
            "norm of all gradients",
            tuple(
                curves.over_seeds(found[f"{kind}{depth}"], "gradient_norm", f"{kind}-{depth}", i, style)
                for kind, style in zip(KINDS, ("dashed", "solid"), strict=True)
                for i, depth in enumerate(preset.depths)
            ),
            log=True,
        )
    )
    return Outcome((table,), tuple(findings(context, found)), tuple(panels), data(found, starts))


def first_gradient(spec: RunSpec, context: Context) -> float:
    """The norm of all gradients of a run's first batch, before any step: the log begins after some steps.

    Args:
        spec: whose initial weights and first batch.
        context: where the data are.
    """
    data = datasets.load(spec.data, context.place.data_root)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(datasets.stream(spec.seed, "weights"))
        model = networks.build(spec.network, data.classes, data.channels, **dict(spec.options))
    device = pick_device(context.place.device)
    model = channels_last(model.to(device))
    images, labels = next(data.batches(spec.recipe, spec.seed, 0, datasets.Part(), device))
    F.cross_entropy(model(images), labels).backward()
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))


def findings(context: Context, found: dict[str, list[RunResult]]) -> list[str]:
    """Each claim of section 4.2 against what was measured."""
    depths, lines = context.preset.depths, []
    for what, value in (("training", curves.train_errors), ("test", curves.test_errors)):
        for kind, rises in (("plain", True), ("resnet", False)):
            first, last = f"{kind}{depths[0]}", f"{kind}{depths[-1]}"
            ends = Comparison(_name(first), value(found[first]), _name(last), value(found[last]))
            claim = f"{'plain' if rises else 'residual'}: {what} error {'rises' if rises else 'falls'} with depth"
            lines.append(f"{claim} - {ends.holds(rises)}: {ends}")
    for depth in depths:
        both = [f"{kind}{depth}" for kind in KINDS]
        for what, value in (("training", curves.train_errors), ("test", curves.test_errors)):
            ends = Comparison(_name(both[0]), value(found[both[0]]), _name(both[1]), value(found[both[1]]))
            lines.append(f"{depth} layers: residual has the lower {what} error - {ends.holds(False)}: {ends}")
    return lines


def _name(network: str) -> str:
    kind = network.rstrip("0123456789")
    return f"{kind}-{network.removeprefix(kind)}"


def data(found: dict[str, list[RunResult]], starts: dict[str, list[float]]) -> dict[str, object]:
    """Every seed's numbers, for the JSON."""
    return {
        network: {
            "seeds": [r.spec.seed for r in results],
            "parameters": results[0].parameters,
            "test_error": curves.test_errors(results),
            "best_test_error": [r.best_test_error for r in results],
            "train_error": curves.train_errors(results),
            "train_loss": curves.train_losses(results),
            "first_gradient_norm": starts[network],
            "gradient_norm": curves.gradient_norms(results, 0.1),
            "seconds": [r.seconds for r in results],
        }
        for network, results in found.items()
    }


EXPERIMENT = Experiment(
    1, "degradation", "Degradation: plain against residual by depth", "Figs. 1, 6; Table 6", specs, outcome
)
