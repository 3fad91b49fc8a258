"""Experiment 5, the length of a shortcut (section 3.2): residual functions of one, two and three layers, and none.

    one layer     y = relu(W1 x + x)           nearly a linear layer: "we have not observed advantages"
    two layers    y = relu(F(x) + x)           the paper's
    three layers  the same over three 3x3 layers

Depth, parameters and multiply-adds are equal: 20 = 3 * 6 * 1 + 2 = 3 * 3 * 2 + 2 = 3 * 2 * 3 + 2 layers, 56 likewise.
"""

from __future__ import annotations

from fastres.lab.loop_state import RunSpec
from fastres.lab.paper.curves import columns, loss_panel, over_seeds, test_errors
from fastres.lab.paper.experiment import Context, Experiment
from fastres.lab.paper.presets import Preset
from fastres.lab.paper.tables import Comparison, Outcome, Table

VARIANTS: dict[str, tuple[str, dict[str, int]]] = {  # name -> kind and options of the network
    "no shortcut": ("plain", {}),
    "over one layer": ("resnet", {"layers_per_block": 1}),
    "over two layers": ("resnet", {}),
    "over three layers": ("resnet", {"layers_per_block": 3}),
}


def specs(preset: Preset) -> list[RunSpec]:
    """Every variant at every depth, every seed; two layers and none are the runs of degradation."""
    return [
        spec
        for depth in preset.skip_depths
        for kind, options in VARIANTS.values()
        for spec in preset.specs((f"{kind}{depth}",), **options)
    ]


def outcome(context: Context) -> Outcome:
    """Errors by depth and by the length of the shortcut."""
    preset = context.preset
    found = {
        (depth, variant): context.of(f"{kind}{depth}", **options)
        for depth in preset.skip_depths
        for variant, (kind, options) in VARIANTS.items()
    }
    errors = {key: test_errors(results) for key, results in found.items()}
    table = Table.of(
        f"What a shortcut skips: {preset.title}",
        {
            "layers": lambda key: str(key[0]),
            "shortcut": lambda key: key[1],
            **columns(found, "parameters", "training error %", "training loss", "test error %"),
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
    panels = tuple(
        loss_panel(
            f"{depth} layers: training loss",
            (
                over_seeds(found[depth, variant], "train_loss", variant, i, "solid" if i else "dashed")
                for i, variant in enumerate(VARIANTS)
            ),
        )
        for depth in preset.skip_depths
    )
    data = {f"{depth}, {variant}": values for (depth, variant), values in errors.items()}
    return Outcome((table,), lines, panels, {"test_error": data})


EXPERIMENT = Experiment(5, "skips", "Shortcuts over one, two and three layers", "section 3.2", specs, outcome)
