"""First half of the demo: ResNet-20 learns the handwritten digits, and the frozen network gives the same answers.

The network is the paper's for CIFAR-10 (He et al. 2016, section 4.2; n = 3, shortcut A) on one input channel: nine
basic blocks whose BN, addition and ReLU run as one operator each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres.inference import FrozenModel
from fastres.lab import loop
from fastres.lab.errors import AccuracyError
from fastres.lab.loop import RunResult, RunSpec, Step
from fastres.lab.recipes import TrainRecipe
from fastres.verify import Agreement, compare_predictions

WANTED_ACCURACY = 0.97
RECIPE = TrainRecipe(
    "demo", 64, 220, 0.1, (110, 165), weight_decay=5e-4, augment="digits", test_every=220, log_every=22
)
QUICK = replace(RECIPE, name="demo-quick", iterations=12, milestones=(6, 10))


@dataclass(frozen=True)
class Learned:
    """The trained network, in eval mode, and its run."""

    model: nn.Module
    result: RunResult
    blocks: int  # fused residual blocks in the model

    @property
    def accuracy(self) -> float:
        """The fraction of the held-out digits that it gets right."""
        assert self.result.test_error is not None  # the loop tests after its last iteration
        return 1 - self.result.test_error

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": "fastres.models.cifar_resnet(20)",
            "parameters": self.result.parameters,
            "fused_blocks": self.blocks,
            "steps": self.result.iterations,
            "seconds": self.result.seconds,
            "images_per_s": self.result.images / self.result.seconds,
            "epoch_losses": [point.train_loss for point in self.result.history],
            "accuracy": self.accuracy,
            "wanted_accuracy": WANTED_ACCURACY,
        }


def learn(device: torch.device, quick: bool, on_step: Callable[[Step], None] | None = None, seed: int = 0) -> Learned:
    """Train on the training digits and test on the held-out ones.

    Args:
        quick: a few steps on smaller images, with no accuracy required.

    Raises AccuracyError below 97 % (unless quick).
    """
    spec = RunSpec("resnet20", "digits8", QUICK, seed) if quick else RunSpec("resnet20", "digits", RECIPE, seed)
    with tempfile.TemporaryDirectory() as folder:
        result = loop.run(spec, Path(folder), device=str(device), on_step=on_step)
        model = loop.trained(Path(folder)).to(device)
    learned = Learned(model, result, sum(isinstance(m, fastres.nn.BasicBlock) for m in model.modules()))
    if learned.accuracy < WANTED_ACCURACY and not quick:
        wanted = f"expected at least {WANTED_ACCURACY:.0%}"
        raise AccuracyError(f"ResNet-20 reached {learned.accuracy:.2%} on the held-out digits, {wanted}")
    return learned


def freeze_and_compare(model: nn.Module, images: Tensor) -> tuple[FrozenModel, Agreement]:
    """Freeze the trained network and compare its answers with the eager network's on the held-out digits."""
    frozen = fastres.freeze(model, images[:64], verify="warn")  # a rejection is shown and fails the demo at its end
    return frozen, compare_predictions(model, frozen, images)
