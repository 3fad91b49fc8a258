"""The protocols: data, recipe, seeds and depths of the experiments. Fixed before any run.

**digits** stands in for CIFAR-10 where there is no GPU and no download. Differences from the paper:

    data        scikit-learn's handwritten digits, 1,437 to train and 360 to test, 8x8 pixels, one channel; the paper:
                CIFAR-10, 50,000 and 10,000, 32x32, three. Stages work on 8x8, 4x4 and 2x2 instead of 32, 16 and 8.
    schedule    640 iterations of batch 128, learning rate 0.1, divided by 10 at 320 and at 480: the paper's 64k with
                drops at 32k and 48k, scaled down by 100. 57 epochs instead of 164.
    110 layers  the same schedule as all others; the paper starts its 110-layer network at 0.01. (Its footnote 5 says
                that 0.1 also works.) One schedule for all, so that only depth and shortcuts differ.
    augmentation  shifts by up to one pixel instead of four, no mirror images (a mirrored digit is a different one)
    depths      20, 56, 110; the paper also has 32 and 44, and its plain networks end at 56
    seeds       three, mean and spread of all; the paper: one run, and for 110 layers the best of five and their spread

Momentum 0.9, weight decay 1e-4 on all parameters, He initialization, BN, shortcut A and no dropout are the paper's.
Gradient norms are logged with every point (the paper's argument against vanishing gradients, section 4.1).

**cifar10** is the paper's protocol on its data, with five seeds for every network. **ci** only shows that everything
runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastres.lab.errors import LabError
from fastres.lab.loop_state import RunSpec
from fastres.lab.recipes import TrainRecipe, recipe


class PaperError(LabError, ValueError):
    """An unknown experiment or preset, or one that lacks an input."""


@dataclass(frozen=True)
class Preset:
    name: str  # "ci", "digits" or "cifar10"
    title: str  # of the data, for tables
    data: str  # for fastres.lab.datasets.load; size, channels and classes are its images'
    size: int
    channels: int
    recipe: TrainRecipe
    depths: tuple[int, ...]  # plain and residual (experiments 1, 3)
    more_depths: tuple[int, ...]  # residual only (experiment 4, Table 6)
    skip_depths: tuple[int, ...]
    seeds: tuple[int, ...]  # for every network
    recipe_110: TrainRecipe | None = None  # for networks of 110 layers, where it differs
    deepest: int = 1202  # built and run for a single step
    classes: int = 10
    # Time of one iteration on one CPU core, measured over a whole experiment on a machine that had other work too (a
    # step by itself takes half of it); None where only a GPU makes sense.
    seconds_per_layer: float | None = None

    def spec(self, network: str, seed: int, **options: Any) -> RunSpec:
        """The run of one network; equal arguments give equal runs, so that experiments share them."""
        chosen = self.recipe_110 if self.recipe_110 is not None and network.endswith("110") else self.recipe
        return RunSpec(network, self.data, chosen, seed, tuple(sorted(options.items())))

    def specs(self, networks: tuple[str, ...], **options: Any) -> list[RunSpec]:
        return [self.spec(network, seed, **options) for network in networks for seed in self.seeds]

    def seeds_note(self, rest: str) -> str:
        """The note that explains the numbers of a table, continued by `rest`."""
        return f"Mean ± sample deviation of {len(self.seeds)} seeds{rest}"


DIGITS = TrainRecipe("digits-640", 128, 640, 0.1, (320, 480), augment="digits", test_every=20, log_every=10)

PRESETS: dict[str, Preset] = {
    each.name: each
    for each in (
        Preset(
            "ci",
            "the digits, a smoke test",
            "digits8",
            8,
            1,
            replace(
                DIGITS, name="digits-ci", batch_size=32, iterations=6, milestones=(3, 5), test_every=3, log_every=3
            ),
            depths=(8, 20),
            more_depths=(8, 20),
            skip_depths=(20,),
            seeds=(0, 1),
            deepest=110,
            seconds_per_layer=0.001,
        ),
        Preset(
            "digits",
            "scikit-learn's digits at 8x8",
            "digits8",
            8,
            1,
            DIGITS,
            depths=(20, 56, 110),
            more_depths=(20, 32, 44, 56, 110),
            skip_depths=(20, 56),
            seeds=(0, 1, 2),
            seconds_per_layer=0.0035,
        ),
        Preset(
            "cifar10",
            "CIFAR-10",
            "cifar10",
            32,
            3,
            recipe("cifar10"),
            depths=(20, 32, 44, 56, 110),
            more_depths=(20, 32, 44, 56, 110),
            skip_depths=(20, 56),
            seeds=(0, 1, 2, 3, 4),
            recipe_110=recipe("cifar10-110"),
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset called `name`; raises PaperError, which lists them.

    >>> preset("digits").recipe.milestones
    (320, 480)
    """
    if name not in PRESETS:
        raise PaperError(f"preset: got {name!r}, expected {', '.join(PRESETS)}")
    return PRESETS[name]
