"""First half of the demo: ResNet-20 learns the handwritten digits, then its frozen twin answers the same.

The network is the paper's for CIFAR-10 (He et al. 2016, section 4.2; n = 3, shortcut A) on one input channel: nine
basic blocks whose BN, addition and ReLU run as one operator each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastres
from fastres.inference import FrozenModel
from fastres.lab.data import Digits
from fastres.lab.devices import channels_last
from fastres.lab.errors import AccuracyError
from fastres.lab.train import Recipe, Step, Trained, accuracy, predict, train
from fastres.models import cifar_resnet
from fastres.verify import Agreement, compare_predictions

WANTED_ACCURACY = 0.97
RECIPE = Recipe(epochs=8, batch_size=64, lr=0.1)
QUICK_STEPS = 12


@dataclass(frozen=True)
class Learned:
    model: nn.Module
    trained: Trained
    accuracy: float  # on the held-out digits
    parameters: int
    blocks: int  # fused residual blocks in the model

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": "fastres.models.cifar_resnet(20)",
            "parameters": self.parameters,
            "fused_blocks": self.blocks,
            "steps": self.trained.steps,
            "seconds": self.trained.seconds,
            "images_per_s": self.trained.images / self.trained.seconds,
            "epoch_losses": self.trained.losses,
            "accuracy": self.accuracy,
            "wanted_accuracy": WANTED_ACCURACY,
        }


def learn(data: Digits, device: torch.device, quick: bool, on_step: Callable[[Step], None] | None = None) -> Learned:
    """Trains on the training digits and counts the held-out ones it gets right.

    Args:
        quick: a few steps only, and no accuracy is asked for.

    Raises AccuracyError below 97 % (unless quick).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RECIPE.seed)
        network = cifar_resnet(20, num_classes=10, in_channels=1)
    model = channels_last(network.to(device))
    trained = train(
        model,
        data.train_images.to(device),
        data.train_labels.to(device),
        RECIPE,
        max_steps=QUICK_STEPS if quick else None,
        on_step=on_step,
    )
    reached = accuracy(predict(model, data.test_images), data.test_labels)
    if reached < WANTED_ACCURACY and not quick:
        raise AccuracyError(
            f"ResNet-20 reached {reached:.2%} on the held-out digits, expected at least {WANTED_ACCURACY:.0%}"
        )
    model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    blocks = sum(isinstance(m, fastres.nn.BasicBlock) for m in model.modules())
    return Learned(model, trained, reached, parameters, blocks)


def freeze_and_compare(model: nn.Module, data: Digits) -> tuple[FrozenModel, Agreement]:
    """Freezes the trained network and compares its answers with the eager network's on every held-out digit."""
    images = data.test_images.to(next(model.parameters()).device)  # [360, 1, size, size]
    frozen = fastres.freeze(model, images[:64], verify="warn")  # a rejection is shown and fails the demo at its end
    return frozen, compare_predictions(model, frozen, images)
