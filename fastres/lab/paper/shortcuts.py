"""Experiment 2, shortcuts (Table 3): A, B and C, with the cost of each in parameters, multiply-adds and time.

    A  zero padding where dimensions grow, identity elsewhere: no parameters
    B  projections W_s x where dimensions grow (Eqn. 2), identity elsewhere
    C  projections everywhere

The paper compares them in ResNet-34 on ImageNet. That network's cost is exact here; errors come of CIFAR's network on
the preset's data.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F

from fastres.lab import networks
from fastres.lab.devices import channels_last, pick_device
from fastres.lab.loop_state import RunSpec
from fastres.lab.paper import curves
from fastres.lab.paper.experiment import Context, Experiment
from fastres.lab.paper.presets import Preset
from fastres.lab.paper.published import find
from fastres.lab.paper.tables import Comparison, Outcome, Panel, Table, percent, spread
from fastres.lab.timing import interleave, paired_ratio, timer_for
from fastres.models import counts

KINDS = ("A", "B", "C")
_TIME = ("training step ms", "time against A")


def specs(preset: Preset) -> list[RunSpec]:
    """The shallowest network with A, B and C and plain; A and plain are the runs of degradation."""
    depth = preset.skip_depths[0]
    return [*preset.specs((f"plain{depth}", f"resnet{depth}")), *(s for k in "BC" for s in _specs(preset, depth, k))]


def _specs(preset: Preset, depth: int, kind: str) -> list[RunSpec]:
    return preset.specs((f"resnet{depth}",), **({} if kind == "A" else {"shortcut": kind}))


def times(
    network: str, classes: int, batch: int, channels: int, size: int, device_name: str, rounds: int = 7
) -> dict[str, list[float]]:
    """Seconds of a training step (forward and backward) of `network` with A, B and C, in interleaved rounds.

    Example:
        >>> sorted(times("resnet8", 10, 4, 1, 8, "cpu", rounds=3))
        ['A', 'B', 'C']
    """
    device = pick_device(device_name)
    images = torch.randn(batch, channels, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(classes, (batch,), device=device)

    def step(kind: str) -> Any:
        model = networks.build(network, classes, channels, shortcut=kind)
        model = channels_last(model.to(device))

        def run() -> None:
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()

        return run

    return interleave({kind: step(kind) for kind in KINDS}, rounds, timer=timer_for(device))


def outcome(context: Context) -> Outcome:
    """Errors and cost on the preset's data, and ResNet-34's exact cost beside Table 3."""
    preset = context.preset
    depth = preset.skip_depths[0]
    name = f"resnet{depth}"
    found = {"plain": context.of(f"plain{depth}")}
    for kind in KINDS:
        found[kind] = [context.results[spec] for spec in _specs(preset, depth, kind)]
    context.tell(f"timing {name} with A, B and C")
    device = context.place.device
    batch = preset.recipe.batch_size
    seconds = times(name, preset.classes, batch, preset.channels, preset.size, device)
    size, batch = (64, 2) if preset.name == "ci" else (224, 2 if device == "cpu" else 64)
    context.tell(f"timing resnet34 with A, B and C, batch {batch} at {size}x{size}")
    seconds_34 = times("resnet34", 1000, batch, 3, size, device, 5)
    rows = []
    for kind, results in found.items():
        macs = _counts(f"plain{depth}" if kind == "plain" else name, kind, preset.classes, preset.channels, preset.size)
        rows.append(
            (
                kind,
                f"{results[0].parameters:,}",
                f"{macs[1] / 1e6:,.2f}",
                *_time(seconds, kind),
                spread(curves.train_errors(results)),
                spread(curves.test_errors(results)),
            )
        )
    head = ("shortcut", "parameters", "multiply-adds M", *_TIME)
    table = Table(
        f"Shortcuts in {name}: {preset.title}",
        (*head, "training error %", "test error %"),
        tuple(rows),
        (
            f"Mean ± sample deviation of {len(preset.seeds)} seeds. Time: forward and backward of a batch of "
            f"{preset.recipe.batch_size}, the median of interleaved rounds, and of their ratios.",
        ),
    )
    paper = []
    for kind in ("plain", *KINDS):
        parameters, multiply_adds = _counts("plain34" if kind == "plain" else "resnet34", kind, 1000, 3, 224)
        error = find(
            "plain34" if kind == "plain" else "resnet34", source="Table 3", shortcut=None if kind == "plain" else kind
        )[0]
        cells = kind, f"{parameters:,}", f"{multiply_adds / 1e9:.3f}", *_time(seconds_34, kind)
        paper.append((*cells, percent(error.top1), percent(error.top5)))
    published = Table(
        "ResNet-34: cost counted and timed here, errors published (Table 3, 10-crop)",
        ("shortcut", "parameters", "multiply-adds G", *_TIME, "top-1 error %", "top-5 error %"),
        tuple(paper),
        (f"Time: batch {batch} at {size}x{size}, forward and backward.",),
    )
    lines = []
    for a, b in (("plain", "A"), ("A", "B"), ("B", "C")):
        values = curves.test_errors(found[a]), curves.test_errors(found[b])
        ends = Comparison(a, values[0], b, values[1])
        lines.append(f"test error is lower with {b} than {a} - {ends.holds(False)}: {ends}")
    panels = (
        Panel(
            "test error",
            "iteration",
            "error %",
            tuple(
                curves.over_seeds(results, "test_error", kind, i, "dashed" if kind == "plain" else "solid")
                for i, (kind, results) in enumerate(found.items())
            ),
            percent=True,
        ),
        Panel(
            "training loss",
            "iteration",
            "cross-entropy",
            tuple(
                curves.over_seeds(results, "train_loss", kind, i, "dashed" if kind == "plain" else "solid")
                for i, (kind, results) in enumerate(found.items())
            ),
            log=True,
        ),
    )
    data = {
        "seconds": seconds,
        "seconds_resnet34": seconds_34,
        "test_error": {kind: curves.test_errors(r) for kind, r in found.items()},
    }
    return Outcome((table, published), tuple(lines), panels, data)


def _time(seconds: dict[str, list[float]], kind: str) -> tuple[str, str]:
    """The cells of the columns _TIME."""
    if kind == "plain":
        return "-", "-"
    ratio = 1 / paired_ratio(seconds["A"], seconds[kind]).median
    return f"{1e3 * statistics.median(seconds[kind]):.1f}", f"{ratio:.2f}"


def _counts(network: str, kind: str, classes: int, channels: int, size: int) -> tuple[int, int]:
    options = {} if kind == "plain" else {"shortcut": kind}
    with torch.device("meta"):
        model = networks.build(network, classes, channels, **options)
    counted = counts(model, size, channels)
    return counted.parameters, counted.multiply_adds


EXPERIMENT = Experiment(2, "shortcuts", "Shortcuts A, B and C", "Table 3", specs, outcome)
