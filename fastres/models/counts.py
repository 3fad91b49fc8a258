"""Parameters and multiply-adds of a network, counted as the paper counts them.

    parameters     convolutions, BN scales and shifts, the classifier with its bias
    multiply-adds  of convolutions and the classifier: outputs x weights per output, for one image

The paper calls multiply-adds FLOPs (section 3.3: "3.6 billion FLOPs (multiply-adds)").
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Counts:
    parameters: int
    multiply_adds: int  # for one image


def counts(model: nn.Module, size: int = 224, in_channels: int = 3) -> Counts:
    """Count `model`'s parameters and its multiply-adds for one image of size x size.

    Runs a copy once on torch's meta device: nothing is computed, and the model is left as it is.

    Args:
        model: a network of convolutions and linear layers, on any device; on the meta device it takes no memory.
        size: height and width of the image. 224 for ImageNet, 32 for CIFAR-10 in the paper.
        in_channels: of the image.

    Raises ValueError: size or in_channels below 1.

    >>> import fastres.models
    >>> counts(fastres.models.cifar_resnet(20), 32)
    Counts(parameters=269722, multiply_adds=40551040)
    """
    for argument, value in (("size", size), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument}: got {value}, expected at least 1")
    copied = copy.deepcopy(model).to("meta").eval()
    total = 0

    def add(module: Any, _: Any, y: Tensor) -> None:
        nonlocal total
        total += y.numel() * module.weight[0].numel()

    for module in copied.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        copied(torch.empty(1, in_channels, size, size, device="meta"))
    return Counts(sum(p.numel() for p in model.parameters()), total)
