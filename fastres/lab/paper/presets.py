"""The protocols: data, recipe, seeds and depths of the experiments, fixed before any run; and the published numbers.

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

The published numbers are those of He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table
by table, and of the authors' released models and two other reproductions. Errors are fractions (0.0643 is 6.43 %).
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


# ---- published numbers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    network: str  # as fastres.lab.networks.names calls it
    source: str  # "Table 6", or another publisher
    data: str  # "cifar10" or "imagenet"
    protocol: str  # "1-crop", "10-crop", "multi-scale" or "single view"
    top1: float
    top5: float | None = None
    shortcut: str | None = None  # "A", "B", "C"; None for plain networks
    note: str = ""


def _imagenet(
    network: str, source: str, protocol: str, top1: float, top5: float | None, shortcut: str | None
) -> Published:
    fractions = round(top1 / 100, 6), None if top5 is None else round(top5 / 100, 6)
    return Published(network, source, "imagenet", protocol, *fractions, shortcut)


def _cifar(source: str, depth: int, error: float, note: str = "") -> Published:
    return Published(f"resnet{depth}", source, "cifar10", "single view", round(error / 100, 6), None, "A", note)


# CIFAR-10, option A: Table 6, and other reproductions of it.
_CIFAR: dict[str, tuple[Any, ...]] = {
    "Table 6": (
        *((20, 8.75), (32, 7.51), (44, 7.17), (56, 6.97)),
        *((110, 6.43, "best of 5 runs; 6.61 +- 0.16"), (1202, 7.93, "training error below 0.1 %")),
    ),
    "akamaster/pytorch_resnet_cifar10": ((20, 8.27), (32, 7.37), (44, 6.90), (56, 6.61), (110, 6.32), (1202, 6.18)),
    "gcr/torch-residual-networks": ((20, 8.29), (32, 7.63), (44, 7.14), (56, 6.94), (110, 6.73)),
}

PUBLISHED: tuple[Published, ...] = (
    # Table 2: plain and residual (option A), 10-crop
    _imagenet("plain18", "Table 2", "10-crop", 27.94, None, None),
    _imagenet("plain34", "Table 2", "10-crop", 28.54, None, None),
    _imagenet("resnet18", "Table 2", "10-crop", 27.88, None, "A"),
    _imagenet("resnet34", "Table 2", "10-crop", 25.03, None, "A"),
    # Table 3: shortcuts, and the bottleneck networks (option B), 10-crop
    _imagenet("plain34", "Table 3", "10-crop", 28.54, 10.02, None),
    _imagenet("resnet34", "Table 3", "10-crop", 25.03, 7.76, "A"),
    _imagenet("resnet34", "Table 3", "10-crop", 24.52, 7.46, "B"),
    _imagenet("resnet34", "Table 3", "10-crop", 24.19, 7.40, "C"),
    _imagenet("resnet50", "Table 3", "10-crop", 22.85, 6.71, "B"),
    _imagenet("resnet101", "Table 3", "10-crop", 21.75, 6.05, "B"),
    _imagenet("resnet152", "Table 3", "10-crop", 21.43, 5.71, "B"),
    # Table 4: single models, fully convolutional at scales 224, 256, 384, 480, 640
    _imagenet("resnet34", "Table 4", "multi-scale", 21.84, 5.71, "B"),
    _imagenet("resnet34", "Table 4", "multi-scale", 21.53, 5.60, "C"),
    _imagenet("resnet50", "Table 4", "multi-scale", 20.74, 5.25, "B"),
    _imagenet("resnet101", "Table 4", "multi-scale", 19.87, 4.60, "B"),
    _imagenet("resnet152", "Table 4", "multi-scale", 19.38, 4.49, "B"),
    # 1-crop: the authors' released models, and fb.resnet.torch's (v1.5, trained with more augmentation)
    _imagenet("resnet50", "authors' release", "1-crop", 24.7, 7.8, "B"),
    _imagenet("resnet101", "authors' release", "1-crop", 23.6, 7.1, "B"),
    _imagenet("resnet152", "authors' release", "1-crop", 23.0, 6.7, "B"),
    _imagenet("resnet18", "fb.resnet.torch", "1-crop", 30.43, 10.76, "B"),
    _imagenet("resnet34", "fb.resnet.torch", "1-crop", 26.73, 8.74, "B"),
    _imagenet("resnet50", "fb.resnet.torch", "1-crop", 24.01, 7.02, "B"),
    _imagenet("resnet101", "fb.resnet.torch", "1-crop", 22.44, 6.21, "B"),
    _imagenet("resnet152", "fb.resnet.torch", "1-crop", 22.16, 6.16, "B"),
    _imagenet("resnet50", "torchvision V1", "1-crop", 23.87, None, "B"),
    *(_cifar(source, *each) for source, rows in _CIFAR.items() for each in rows),
)

# Figures have no numbers to read off; these are the claims of their captions and of section 4.2.
CLAIMS: dict[str, tuple[str, ...]] = {
    "degradation": (
        "Fig. 6 left: plain-20 to plain-56: training and test error rise with depth",
        'Fig. 6, caption: plain-110 has an error above 60 % and is "not displayed"',
        "Fig. 6 middle: residual networks' errors fall with depth, from 20 to 110 layers",
        "Section 4.1: forward and backward signals do not vanish in plain networks: BN, healthy gradient norms",
    ),
    "shortcuts": ("Section 4.1: B is slightly better than A, C marginally better than B; not essential",),
    "responses": (
        "Fig. 7: residual networks have smaller responses than their plain counterparts",
        "Fig. 7: the deeper the residual network, the smaller the response of a layer (20, 56, 110)",
    ),
    "depth": ("Section 4.2: 1202 layers train (error below 0.1 %), and test worse (7.93 %) than 110 (6.43 %)",),
    "skips": ("Section 3.2: for a residual function of a single layer no advantage was observed",),
    "imagenet": (),
}

# Shortcut A (and plain), B, C: CIFAR with 3 channels, ImageNet with 1000 classes.
PARAMETERS: dict[str, tuple[int, int, int]] = {
    "resnet20": (269_722, 272_474, 283_962),
    "resnet32": (464_154, 466_906, 489_594),
    "resnet44": (658_586, 661_338, 695_226),
    "resnet56": (853_018, 855_770, 900_858),
    "resnet110": (1_727_962, 1_730_714, 1_826_202),
    "resnet1202": (19_421_274, 19_424_026, 20_538_714),
    "resnet18": (11_515_688, 11_689_512, 12_043_816),
    "resnet34": (21_623_848, 21_797_672, 22_716_840),
}


def find(network: str | None = None, **wanted: str | None) -> list[Published]:
    """The published errors that match every argument given (data, source, protocol, shortcut), in the paper's order.

    >>> find("resnet110", source="Table 6")[0].top1
    0.0643
    """
    wanted["network"] = network
    given = {key: value for key, value in wanted.items() if value is not None}
    return [each for each in PUBLISHED if all(getattr(each, key) == value for key, value in given.items())]
