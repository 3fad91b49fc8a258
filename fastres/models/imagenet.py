"""The paper's ImageNet networks (Table 1): ResNet-18, 34, 50, 101, 152 and the plain 18 and 34.

    stem: 7x7/2 convolution to 64, BN, ReLU, 3x3/2 max pooling
    conv2_x ... conv5_x (``layer1`` ... ``layer4``): widths 64, 128, 256, 512 (times 4 out of a bottleneck),
        stride 2 at the first block of conv3_x, conv4_x, conv5_x
    global average pooling, fc

Parameter names and shapes are torchvision's: its checkpoints load unchanged into the default networks (shortcut B,
stride in the 3x3, v1.5), and the other way around. ``stride_in_1x1=True`` is the paper's own bottleneck (v1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastres.nn import BasicBlock, Bottleneck, conv_norm_act

from .shortcut import Block, Init, PlainBlock, Shortcut, Zeros, check_options, initialize, make_stage, positive


class ResNet(nn.Module):
    """A residual or plain network for images of about 224x224: ``x [N, in_channels, H, W] -> logits [N, num_classes]``.

    Args:
        block: ``fastres.nn.BasicBlock``, ``fastres.nn.Bottleneck`` or ``fastres.models.PlainBlock``.
        layers: blocks in each of the four stages, e.g. ``(3, 4, 6, 3)``.
        num_classes: rows of the classifier.
        in_channels: channels of the input.
        shortcut: ``"A"``, ``"B"`` or ``"C"`` (paper section 4.1); plain networks have none and ignore it.
        stride_in_1x1: bottlenecks only: stride 2 in the first 1x1 (the paper, v1) instead of the 3x3 (v1.5).
        zero_init_residual: start every residual block as the identity (last BN weight 0).
        zeros: where shortcut A's zeros go, ``"end"`` or ``"both"``.
        init: fan of the He initialization, ``"fan_out"`` or ``"fan_in"``.
        conv1_bias: the stem's convolution has a bias, as in the authors' Caffe ResNet-50.
        ceil_pool: the stem's pooling has no padding and rounds its size up, as in Caffe; 56x56 at 224x224 either way.

    Raises:
        TypeError, ValueError: naming the argument, before anything is built.

    Example:
        >>> import torch, fastres.models
        >>> net = fastres.models.resnet18(num_classes=10).eval()
        >>> tuple(net(torch.zeros(1, 3, 64, 64)).shape)
        (1, 10)
    """

    def __init__(
        self,
        block: Block,
        layers: tuple[int, int, int, int],
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        shortcut: Shortcut = "B",
        stride_in_1x1: bool = False,
        zero_init_residual: bool = False,
        zeros: Zeros = "end",
        init: Init = "fan_out",
        conv1_bias: bool = False,
        ceil_pool: bool = False,
    ) -> None:
        super().__init__()
        check_options(shortcut, zeros, init)
        positive(num_classes=num_classes, in_channels=in_channels)
        if len(layers) != 4:
            raise ValueError(f"layers: got {len(layers)} stages, expected 4")
        if stride_in_1x1 and not issubclass(block, Bottleneck):
            raise ValueError(f"stride_in_1x1: got True, expected False for {block.__name__}: it has no 1x1")
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=conv1_bias)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 0 if ceil_pool else 1, ceil_mode=ceil_pool)
        stages = []
        planes = 64
        for stage, blocks in enumerate(layers):
            width, stride = 64 << stage, 1 if stage == 0 else 2
            stages.append(make_stage(block, planes, width, blocks, stride, shortcut, zeros, stride_in_1x1))
            planes = width * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(planes, num_classes)
        initialize(self, init, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_norm_act(x, self.conv1, self.bn1, self.relu)  # [N, 64, H / 2, W / 2]
        x = self.maxpool(x)  # [N, 64, H / 4, W / 4]
        x = self.layer1(x)
        x = self.layer2(x)  # [N, 128 * expansion, H / 8, W / 8]
        x = self.layer3(x)  # [N, 256 * expansion, H / 16, W / 16]
        x = self.layer4(x)  # [N, 512 * expansion, H / 32, W / 32]
        x = torch.flatten(self.avgpool(x), 1)  # [N, 512 * expansion]
        logits: Tensor = self.fc(x)  # [N, num_classes]
        return logits


def resnet18(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-18: 11,689,512 parameters, 1.814 G multiply-adds at 224x224. Options: those of :class:`ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-34: 21,797,672 parameters, 3.664 G multiply-adds at 224x224. Options: those of :class:`ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-50: 25,557,032 parameters, 4.089 G multiply-adds (v1: 3.858 G). Options: those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


def resnet101(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-101: 44,549,160 parameters, 7.801 G multiply-adds (v1: 7.570 G). Options: those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **options)


def resnet152(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-152: 60,192,808 parameters, 11.514 G multiply-adds (v1: 11.282 G). Options: those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, **options)


def plain18(num_classes: int = 1000, **options: Any) -> ResNet:
    """The plain 18-layer network: ResNet-18 without shortcuts; 11,515,688 parameters. Options: :class:`ResNet`."""
    return ResNet(PlainBlock, (2, 2, 2, 2), num_classes, **options)


def plain34(num_classes: int = 1000, **options: Any) -> ResNet:
    """The plain 34-layer network: ResNet-34 without shortcuts; 21,623,848 parameters. Options: :class:`ResNet`."""
    return ResNet(PlainBlock, (3, 4, 6, 3), num_classes, **options)
