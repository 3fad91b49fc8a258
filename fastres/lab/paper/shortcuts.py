"""Experiments 2 and 5: shortcuts A, B and C with the cost of each (Table 3), and their length (section 3.2).

    A  zero padding where dimensions grow, identity elsewhere: no parameters
    B  projections W_s x where dimensions grow (Eqn. 2), identity elsewhere
    C  projections everywhere

The paper compares them in ResNet-34 on ImageNet. That network's cost is exact here; the errors are those of the CIFAR
network on the preset's data.

    one layer     y = relu(W1 x + x)           nearly a linear layer: "we have not observed advantages"
    two layers    y = relu(F(x) + x)           the paper's
    three layers  the same over three 3x3 layers

Depth, parameters and multiply-adds are equal: 20 = 3 * 6 * 1 + 2 = 3 * 3 * 2 + 2 = 3 * 2 * 3 + 2 layers, 56 likewise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fastres.lab import networks
from fastres.lab.devices import channels_last, pick_device
from fastres.lab.loop_state import RunSpec
from fastres.lab.paper import tables
from fastres.lab.paper.presets import Preset, Published, find
from fastres.lab.paper.runs import Context, Experiment
from fastres.lab.paper.tables import Comparison, Curve, Outcome, Panel, Table
from fastres.lab.timing import interleave, paired_ratio, timer_for
from fastres.models import Counts

KINDS = ("A", "B", "C")


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
    """Errors and cost on the preset's data, and ResNet-34's exact cost next to Table 3."""
    preset, device = context.preset, context.place.device
    depth = preset.skip_depths[0]
    found = {"plain": context.of(f"plain{depth}")}
    found |= {kind: [context.results[spec] for spec in _specs(preset, depth, kind)] for kind in KINDS}
    errors = {kind: tables.per_seed(results, "test_error") for kind, results in found.items()}
    context.tell(f"timing resnet{depth} with A, B and C")
    shape = preset.classes, preset.recipe.batch_size, preset.channels, preset.size
    seconds = times(f"resnet{depth}", *shape, device)
    size, batch = (64, 2) if preset.name == "ci" else (224, 2 if device == "cpu" else 64)
    context.tell(f"timing resnet34 with A, B and C, batch {batch} at {size}x{size}")
    seconds_34 = times("resnet34", 1000, batch, 3, size, device, 5)
    here = {kind: _cost(kind, depth, preset.classes, preset.channels, preset.size) for kind in found}
    exact = {kind: _cost(kind, 34, 1000, 3, 224) for kind in found}
    table = Table.of(
        f"Shortcuts in resnet{depth}: {preset.title}",
        {
            "shortcut": str,
            **tables.columns(found, "parameters"),
            "multiply-adds M": lambda kind: f"{here[kind].multiply_adds / 1e6:,.2f}",
            **_times(seconds),
            **tables.columns(found, "training error %", "test error %"),
        },
        found,
        preset.seeds_note(
            f". Time: forward and backward of a batch of {preset.recipe.batch_size}, the median of interleaved rounds,"
            " and of their ratios."
        ),
    )
    published = Table.of(
        "ResNet-34: cost counted and timed here, errors published (Table 3, 10-crop)",
        {
            "shortcut": str,
            "parameters": lambda kind: f"{exact[kind].parameters:,}",
            "multiply-adds G": lambda kind: f"{exact[kind].multiply_adds / 1e9:.3f}",
            **_times(seconds_34),
            "top-1 error %": lambda kind: tables.percent(_table_3(kind).top1),
            "top-5 error %": lambda kind: tables.percent(_table_3(kind).top5),
        },
        found,
        f"Time: batch {batch} at {size}x{size}, forward and backward.",
    )
    lines = tuple(
        Comparison(a, errors[a], b, errors[b]).finding(f"test error is lower with {b} than {a}", higher=False)
        for a, b in (("plain", "A"), ("A", "B"), ("B", "C"))
    )

    def by_kind(value: str) -> Iterator[Curve]:
        for i, (kind, results) in enumerate(found.items()):
            yield tables.over_seeds(results, value, kind, i, "dashed" if kind == "plain" else "solid")

    panels = (
        tables.error_panel("test error", by_kind("test_error")),
        tables.loss_panel("training loss", by_kind("train_loss")),
    )
    data = {"seconds": seconds, "seconds_resnet34": seconds_34, "test_error": errors}
    return Outcome((table, published), lines, panels, data)


def _times(seconds: dict[str, list[float]]) -> dict[str, Callable[[str], str]]:
    """The columns of the times; plain networks are not timed."""

    def ratio(kind: str) -> str:
        return "-" if kind == "plain" else f"{1 / paired_ratio(seconds['A'], seconds[kind]).median:.2f}"

    def milliseconds(kind: str) -> str:
        return "-" if kind == "plain" else f"{1e3 * statistics.median(seconds[kind]):.1f}"

    return {"training step ms": milliseconds, "time against A": ratio}


def _cost(kind: str, depth: int, classes: int, channels: int, size: int) -> Counts:
    if kind == "plain":
        return networks.cost(f"plain{depth}", classes, channels, size)
    return networks.cost(f"resnet{depth}", classes, channels, size, shortcut=kind)


def _table_3(kind: str) -> Published:
    if kind == "plain":
        return find("plain34", source="Table 3")[0]
    return find("resnet34", source="Table 3", shortcut=kind)[0]


# ---- 5: the length of a shortcut -------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, dict[str, int]]] = {  # name -> kind and options of the network
    "no shortcut": ("plain", {}),
    "over one layer": ("resnet", {"layers_per_block": 1}),
    "over two layers": ("resnet", {}),
    "over three layers": ("resnet", {"layers_per_block": 3}),
}


def skips_specs(preset: Preset) -> list[RunSpec]:
    """Every variant at every depth, every seed; two layers and none are the runs of degradation."""
    return [
        spec
        for depth in preset.skip_depths
        for kind, options in VARIANTS.values()
        for spec in preset.specs((f"{kind}{depth}",), **options)
    ]


def skips_outcome(context: Context) -> Outcome:
    """Errors by depth and by the length of the shortcut."""
    preset = context.preset
    found = {
        (depth, variant): context.of(f"{kind}{depth}", **options)
        for depth in preset.skip_depths
        for variant, (kind, options) in VARIANTS.items()
    }
    errors = {key: tables.per_seed(results, "test_error") for key, results in found.items()}
    table = Table.of(
        f"What a shortcut skips: {preset.title}",
        {
            "layers": lambda key: str(key[0]),
            "shortcut": lambda key: key[1],
            **tables.columns(found, "parameters", "training error %", "training loss", "test error %"),
        },
        found,
        preset.seeds_note(
            " at the end of the runs. The paper has no numbers: section 3.2 says that no advantage of a single layer"
            " was observed."
        ),
    )
    one = "over one layer"
    lines = tuple(
        f"{depth} layers, test: {Comparison(base, errors[depth, base], one, errors[depth, one])}"
        for depth in preset.skip_depths
        for base in ("no shortcut", "over two layers")
    )

    def panel(depth: int) -> Panel:
        curves = (
            tables.over_seeds(found[depth, variant], "train_loss", variant, i, "solid" if i else "dashed")
            for i, variant in enumerate(VARIANTS)
        )
        return tables.loss_panel(f"{depth} layers: training loss", curves)

    data = {f"{depth}, {variant}": values for (depth, variant), values in errors.items()}
    return Outcome((table,), lines, tuple(map(panel, preset.skip_depths)), {"test_error": data})


EXPERIMENTS = (
    Experiment(2, "shortcuts", "Shortcuts A, B and C", "Table 3", specs, outcome),
    Experiment(5, "skips", "Shortcuts over one, two and three layers", "section 3.2", skips_specs, skips_outcome),
)
