"""Small networks, and BN layers that do something: the statistics and parameters of a fresh network hide mistakes."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
from torch import nn

from fastres.nn import BasicBlock, ConvBNReLU


def fused_network(width: int = 8) -> nn.Module:
    """A stem and a residual block of fastres.nn, a pool and a classifier: [N, 3, H, W] -> [N, 5]."""
    torch.manual_seed(1)
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            stem=ConvBNReLU(3, width),
            block=BasicBlock(width, width),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(width, 5),
        )
    )


def randomize_bn(model: nn.Module, seed: int | None = None, statistics: bool = True) -> nn.Module:
    """Draw the parameters and running statistics of every norm that has statistics; return the model.

    Scales and variances from [0.5, 1.5], shifts and means from [-0.5, 0.5]; on the CPU, from the seed or the global
    generator. `statistics=False` leaves the running statistics as they are.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    names = {"weight": 1.0, "bias": 0.0} | ({"running_mean": 0.0, "running_var": 1.0} if statistics else {})
    with torch.no_grad():
        for norm in model.modules():
            if hasattr(norm, "running_var"):
                for name, middle in names.items():
                    if (t := getattr(norm, name)) is not None:
                        t.copy_(torch.empty(t.shape).uniform_(middle - 0.5, middle + 0.5, generator=generator))
    return model


def transformers_module(name: str = "transformers") -> ModuleType:
    """Import a module of transformers, which probes for a package `kernels`: this checkout's folder is not it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [p for p in sys.path if not os.path.isfile(os.path.join(p, "kernels", "bn_act.py"))])
        module: ModuleType = pytest.importorskip(name)
    return module
