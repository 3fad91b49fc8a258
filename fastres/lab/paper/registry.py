"""The experiments by name, in the paper's order, and what they cost."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastres.lab import networks
from fastres.lab.loop_state import RunSpec
from fastres.lab.paper import degradation, depth, imagenet, responses, shortcuts, skips
from fastres.lab.paper.experiment import Experiment
from fastres.lab.paper.presets import PRESETS, PaperError, Preset, preset
from fastres.lab.paper.published import PUBLISHED, Published
from fastres.lab.paper.runs import layers
from fastres.models import counts

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in (degradation, shortcuts, responses, depth, skips, imagenet)
}
GPU_FLOPS = 5e12  # sustained in training, an assumption for estimates: what small networks reach on a large GPU


def experiment(name: str) -> Experiment:
    """The experiment called `name`.

    Raises:
        PaperError: no such experiment; the message lists them.

    Example:
        >>> experiment("responses").source
        'Fig. 7'
    """
    if name not in EXPERIMENTS:
        raise PaperError(f"experiment: got {name!r}, expected {', '.join(EXPERIMENTS)}, or report")
    return EXPERIMENTS[name]


def numbers(name: str) -> list[Published]:
    """The published errors that an experiment's tables show beside its own."""
    tables = {"degradation": ("Table 6",), "depth": ("Table 6",), "shortcuts": ("Table 3",)}
    if name == "imagenet":
        return [each for each in PUBLISHED if each.data == "imagenet"]
    if name == "shortcuts":
        return [each for each in PUBLISHED if each.source == "Table 3" and each.network.endswith("34")]
    return [each for each in PUBLISHED if each.source in tables.get(name, ())]


def estimate(name: str, preset_name: str) -> str:
    """What an experiment's runs cost from nothing, in words: minutes on two cores, or hours on one GPU.

    A training iteration costs three times the multiply-adds of a forward pass, each two operations. The CPU's seconds
    for each layer and iteration are measured (presets.py); a GPU is assumed to sustain 5 TFLOP/s.

    Example:
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
    """Floating-point operations of a run."""
    multiply_adds = _multiply_adds(spec.network, spec.options, plan)
    return 6.0 * multiply_adds * spec.recipe.batch_size * spec.recipe.iterations


@functools.cache
def _multiply_adds(network: str, options: tuple[tuple[str, Any], ...], plan: Preset) -> int:
    with torch.device("meta"):
        model = networks.build(network, plan.classes, plan.channels, **dict(options))
    return counts(model, plan.size, plan.channels).multiply_adds


__all__ = ["EXPERIMENTS", "PRESETS", "estimate", "experiment", "numbers"]
