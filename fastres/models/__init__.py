"""The paper's networks, built from ``fastres.nn``: ImageNet (imagenet.py) and CIFAR-10 (cifar.py)."""

from .cifar import CifarResNet, cifar_plain, cifar_resnet
from .imagenet import ResNet, plain18, plain34, resnet18, resnet34, resnet50, resnet101, resnet152
from .shortcut import PlainBlock, SingleLayerBlock, ThreeLayerBlock, ZeroPadShortcut
from .statistics import Counts, average_statistics, counts

__all__ = [
    "CifarResNet",
    "Counts",
    "PlainBlock",
    "ResNet",
    "SingleLayerBlock",
    "ThreeLayerBlock",
    "ZeroPadShortcut",
    "average_statistics",
    "cifar_plain",
    "cifar_resnet",
    "counts",
    "plain18",
    "plain34",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
