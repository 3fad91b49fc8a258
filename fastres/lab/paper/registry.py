"""The experiments by name, in the paper's order, and what they cost."""

from __future__ import annotations

from fastres.lab import networks
from fastres.lab.loop_state import RunSpec
from fastres.lab.paper import degradation, imagenet, responses, shortcuts
from fastres.lab.paper.presets import PaperError, Preset, Published, find, preset
from fastres.lab.paper.runs import Experiment, layers

EXPERIMENTS: dict[str, Experiment] = {
    each.name: each
    for each in sorted(
        (each for module in (degradation, shortcuts, responses, imagenet) for each in module.EXPERIMENTS),
        key=lambda each: each.number,
    )
}
GPU_FLOPS = 5e12  # sustained in training: an assumption, about what small networks reach on a large GPU


def experiment(name: str) -> Experiment:
    """The experiment called `name`; raises PaperError, which lists them.

    >>> experiment("responses").source
    'Fig. 7'
    """
    if name not in EXPERIMENTS:
        raise PaperError(f"experiment: got {name!r}, expected {', '.join(EXPERIMENTS)}, or report")
    return EXPERIMENTS[name]


def numbers(name: str) -> list[Published]:
    """The published errors that an experiment's tables show next to its own."""
    if name in ("degradation", "depth"):
        return find(source="Table 6")
    if name == "shortcuts":
        return [each for each in find(source="Table 3") if each.network.endswith("34")]
    return find(data="imagenet") if name == "imagenet" else []


def estimate(name: str, preset_name: str) -> str:
    """The cost of an experiment whose runs are all still to do, in words: minutes on two cores, or hours on one GPU.

    A training iteration costs three times the multiply-adds of a forward pass, each two operations. The CPU's seconds
    for each layer and iteration are measured (presets.py); a GPU is assumed to sustain 5 TFLOP/s.

    >>> estimate("degradation", "digits")
    'about 21 min on two CPU cores'
    """
    chosen = experiment(name)
    if preset_name not in chosen.presets:
        return "-"
    plan = preset(preset_name)
    specs = list(dict.fromkeys(chosen.specs(plan)))
    if not specs:
        return chosen.note or "-"
    if plan.seconds_per_layer is not None:
        work = sum(spec.recipe.iterations * layers(spec.network) for spec in specs)
        minutes = work * plan.seconds_per_layer / 2 / 60
        return f"about {minutes:.0f} min on two CPU cores" if minutes >= 1 else "seconds"
    hours = sum(operations(spec, plan) for spec in specs) / GPU_FLOPS / 3600
    return f"about {hours:.0f} h on one GPU (assuming {GPU_FLOPS / 1e12:.0f} TFLOP/s)"


def operations(spec: RunSpec, plan: Preset) -> float:
    cost = networks.cost(spec.network, plan.classes, plan.channels, plan.size, **dict(spec.options))
    return 6.0 * cost.multiply_adds * spec.recipe.batch_size * spec.recipe.iterations
