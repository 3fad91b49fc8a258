"""BN statistics for networks that never saw data: a randomly initialized network explodes in eval mode.

With running mean 0 and variance 1 every BN is the identity, activations grow with every block, and half precision
overflows before a comparison can say anything. One pass in which exactly those layers use and keep the batch's
statistics gives the network the scale that training would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .runs import call, devices_of, map_tensors, private, same_strides


def uncalibrated(model: nn.Module) -> list[str]:
    """Names of the BN layers in eval mode whose statistics are the initial ones: mean 0, variance 1, no batch seen."""
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or module.training:
            continue
        mean, var, count = module.running_mean, module.running_var, module.num_batches_tracked
        if mean is None or var is None or (count is not None and bool(count)):
            continue
        if not bool(mean.any()) and bool((var == 1).all()):
            names.append(name)
    return names


def calibrate(model: nn.Module, inputs: Any) -> list[str]:
    """Give the uncalibrated BN layers of ``model`` the statistics of ``inputs``, in place; change nothing else.

    Args:
        model: any module; its other layers run as they are, and its parameters and flags do not change.
        inputs: tensor, tuple or mapping for one call of the model; at least two values per channel at every layer.

    Returns:
        Names of the calibrated layers; empty if there were none.

    Raises:
        ValueError: raised by torch if a layer sees one value per channel; the model is unchanged.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
        >>> calibrate(net, torch.randn(2, 3, 8, 8)), int(net[1].num_batches_tracked)
        (['1'], 1)
    """
    names = uncalibrated(model)
    if not names:
        return names
    work = private("model", model)
    layers = {name: work.get_submodule(name) for name in names}
    for layer in layers.values():
        layer.train()
        layer.momentum = None  # type: ignore[assignment]  # the cumulative average: this batch's statistics
    with torch.random.fork_rng(devices_of(model, inputs)), torch.inference_mode(False), torch.no_grad():
        call(work, map_tensors(inputs, lambda _, t: same_strides(t), "input"))
        for name, layer in layers.items():
            target = model.get_submodule(name)
            for buffer, value in layer.named_buffers(recurse=False):
                target.get_buffer(buffer).copy_(value)
    return names
