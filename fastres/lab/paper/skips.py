"""Experiment 5, what a shortcut skips (section 3.2): residual functions of one, two and three layers, and none.

    one layer     y = relu(W1 x + x)           nearly a linear layer: "we have not observed advantages"
    two layers    y = relu(F(x) + x)           the paper's
    three layers  the same over three 3x3 layers

Depth, parameters and multiply-adds are equal: 20 = 3 * 6 * 1 + 2 = 3 * 3 * 2 + 2 = 3 * 2 * 3 + 2 layers, 56 likewise.
"""

from __future__ import annotations

from fastres.lab.loop_state import RunResult, RunSpec
from fastres.lab.paper import curves
from fastres.lab.paper.experiment import Context, Experiment
from fastres.lab.paper.presets import Preset
from fastres.lab.paper.tables import Comparison, Outcome, Panel, Table, spread

WAYS: dict[str, tuple[str, dict[str, int]]] = {  # what it is called, the network's kind and options
    "no shortcut": ("plain", {}),
    "over one layer": ("resnet", {"layers_per_block": 1}),
    "over two layers": ("resnet", {}),
    "over three layers": ("resnet", {"layers_per_block": 3}),
}


def specs(preset: Preset) -> list[RunSpec]:
    """Every way at every depth, every seed; two layers and none are the runs of degradation."""
    return [
        spec
        for depth in preset.skip_depths
        for kind, options in WAYS.values()
        for spec in preset.specs((f"{kind}{depth}",), **options)
    ]


def outcome(context: Context) -> Outcome:
    """Errors by depth and by what a shortcut skips."""
    preset = context.preset
    found: dict[tuple[int, str], list[RunResult]] = {
        (depth, way): context.of(f"{kind}{depth}", **options)
        for depth in preset.skip_depths
        for way, (kind, options) in WAYS.items()
    }
    rows = tuple(
        (
            str(depth),
            way,
            f"{results[0].parameters:,}",
            spread(curves.train_errors(results)),
            spread(curves.train_losses(results), 1, 4),
            spread(curves.test_errors(results)),
        )
        for (depth, way), results in found.items()
    )
    table = Table(
        f"What a shortcut skips: {preset.title}",
        ("layers", "shortcut", "parameters", "training error %", "training loss", "test error %"),
        rows,
        (
            f"Mean ± sample deviation of {len(preset.seeds)} seeds at the end of the runs. The paper has no numbers: "
            "section 3.2 says that no advantage of a single layer was observed.",
        ),
    )
    lines = []
    for depth in preset.skip_depths:
        for base in ("no shortcut", "over two layers"):
            values = [curves.test_errors(found[depth, way]) for way in (base, "over one layer")]
            lines.append(f"{depth} layers, test: {Comparison(base, values[0], 'over one layer', values[1])}")
    panels = tuple(
        Panel(
            f"{depth} layers: training loss",
            "iteration",
            "cross-entropy",
            tuple(
                curves.over_seeds(found[depth, way], "train_loss", way, i, "dashed" if i == 0 else "solid")
                for i, way in enumerate(WAYS)
            ),
            log=True,
        )
        for depth in preset.skip_depths
    )
    data = {f"{depth}, {way}": curves.test_errors(results) for (depth, way), results in found.items()}
    return Outcome((table,), tuple(lines), panels, {"test_error": data})


EXPERIMENT = Experiment(5, "skips", "Shortcuts over one, two and three layers", "section 3.2", specs, outcome)
