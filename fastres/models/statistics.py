"""BN statistics as in the authors' Caffe models: true averages computed after training, not moving averages.

    mean = (1 / B) sum_b mean_b        var = (1 / B) sum_b var_b        over B batches through the finished network

mean_b and var_b (unbiased) are those of batch b, computed with the batch statistics of the layers below.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

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
