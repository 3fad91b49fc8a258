"""The paper's networks by name, as runs and the command line spell them.

resnet18 resnet34 resnet50 resnet101 resnet152     ImageNet (Table 1); bottlenecks stride in the 3x3 (v1.5)
resnet50-v1 resnet101-v1 resnet152-v1              the same, stride in the first 1x1: the paper's own
plain18 plain34                                    ImageNet without shortcuts
resnet20 ... resnet1202, plain20, resnet8 ...      CIFAR of any depth (Table 6), shortcut A
cifar-resnet50, cifar-resnet152                    CIFAR of a depth that is also an ImageNet network's
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
from torch import nn

from fastres import models
from fastres.lab.errors import LabError, did_you_mean

_IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "plain18", "plain34")
_V1 = ("resnet50", "resnet101", "resnet152")
_DEPTHS = (20, 32, 44, 56, 110, 1202)


class NetworkError(LabError, ValueError):
    """An unknown network, or an option that the network does not take."""


def names() -> list[str]:
    """The names of the paper's own networks; `build` takes CIFAR networks of other depths too.

    >>> names()[:3]
    ['resnet18', 'resnet34', 'resnet50']
    """
    cifar = [f"{kind}{depth}" for kind in ("resnet", "plain") for depth in _DEPTHS]
    return [*_IMAGENET, *(f"{name}-v1" for name in _V1), *cifar]


def build(name: str, num_classes: int = 10, in_channels: int = 3, **options: Any) -> nn.Module:
    """The network called `name`, freshly initialized from torch's random state, in training mode on the CPU.

    Args:
        name: one of :func:`names`, or `resnetN` or `plainN` for a CIFAR network of another depth.
        num_classes, in_channels: of the data.
        options: those of :class:`fastres.models.ResNet` or :class:`fastres.models.CifarResNet`.

    Raises NetworkError: an unknown name, with the nearest ones; an option or a depth that the network does not take.

    >>> net = build("resnet20", 10, 1, shortcut="B")
    >>> sum(p.numel() for p in net.parameters())
    272186
    """
    make: Any
    taken: type[nn.Module]
    base, fixed = name.removesuffix("-v1"), {}
    cifar = re.fullmatch(r"(?:cifar-)?(resnet|plain)([0-9]{1,5})", name)
    if name in _IMAGENET or (base in _V1 and base != name):
        make, taken = getattr(models, base), models.ResNet
        fixed = {"stride_in_1x1": True} if base != name else {}
    elif cifar:
        kind, depth = cifar[1], int(cifar[2])
        maker = models.cifar_resnet if kind == "resnet" else models.cifar_plain
        make, taken = lambda **given: maker(depth, **given), models.CifarResNet
    else:
        expected = f"expected one of {', '.join(names())}{did_you_mean(name, names())}"
        raise NetworkError(f"network: got {name!r}, {expected}")
    allowed = [key for key in inspect.signature(taken).parameters if key not in _GIVEN]
    unknown = [key for key in options if key not in allowed]
    if unknown:
        raise NetworkError(f"options of {name}: got {unknown[0]!r}, expected {', '.join(allowed)}")
    try:
        made: nn.Module = make(num_classes=num_classes, in_channels=in_channels, **{**options, **fixed})
    except (TypeError, ValueError) as error:
        raise NetworkError(f"network {name}: {error}") from error
    return made


@functools.cache
def cost(name: str, num_classes: int, in_channels: int, size: int, **options: Any) -> models.Counts:
    """The parameters of a network and its multiply-adds for one image of size x size; nothing is computed."""
    with torch.device("meta"):
        model = build(name, num_classes, in_channels, **options)
    return models.counts(model, size, in_channels)


_GIVEN = ("block", "layers", "depth", "num_classes", "in_channels")
