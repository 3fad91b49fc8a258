"""Parameters and multiply-adds as the paper counts them, and BN statistics as in the authors' Caffe models.

    parameters     convolutions, BN scales and shifts, the classifier with its bias
    multiply-adds  of convolutions and the classifier: outputs x weights per output, for one image; the paper's FLOPs
                   (section 3.3: "3.6 billion FLOPs (multiply-adds)")

The statistics are true averages computed after training, not moving averages:

    mean = (1 / B) sum_b mean_b        var = (1 / B) sum_b var_b        over B batches through the finished network

mean_b and var_b (unbiased) are those of batch b, computed with the batch statistics of the layers below.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn


def average_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every BN in `model` with their true averages over `batches`.

    Weights, momentum and modes are left as they are; only running_mean, running_var and num_batches_tracked change.

    Args:
        model: in any mode, on any device; swapped or not. Freeze it, or call a frozen model's `refresh()`, afterwards.
        batches: images [N, C, H, W], moved to the model's device, or tuples that begin with them.

    Raises ValueError: no batches, before any statistic changes.

    >>> import torch, fastres.models
    >>> net = fastres.models.cifar_resnet(8)
    >>> average_statistics(net, [torch.randn(4, 3, 8, 8) for _ in range(3)])
    >>> int(net.bn1.num_batches_tracked), net.bn1.momentum
    (3, 0.1)
    """
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("batches: got none, expected at least one")
    parameter = next(model.parameters(), None)
    update_bn(chain([first], iterator), model, parameter.device if parameter is not None else torch.device("cpu"))


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
