"""The paper's networks, built of ``fastres.nn``: ImageNet (imagenet.py) and CIFAR-10 (cifar.py)."""

from .cifar import CifarResNet, cifar_plain, cifar_resnet
from .imagenet import ResNet, plain18, plain34, resnet18, resnet34, resnet50, resnet101, resnet152
from .shortcut import PlainBlock, ZeroPadShortcut

__all__ = [
    "CifarResNet",
    "PlainBlock",
    "ResNet",
    "ZeroPadShortcut",
    "cifar_plain",
    "cifar_resnet",
    "plain18",
    "plain34",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
