"""The paper's CIFAR-10 networks (section 4.2): 6n + 2 layers of 3x3 convolutions.

    one 3x3 convolution to 16; 2n layers each at 32x32 with 16 channels, 16x16 with 32, 8x8 with 64;
    global average pooling; fc

n = 3, 5, 7, 9, 18, 200 give the 20, 32, 44, 56, 110 and 1202 layers of Table 6; the paper uses shortcut A throughout.
The residual function of a block has two layers; `layers_per_block` sets it to one or three (section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastres.nn import BasicBlock, conv_norm_act

from .shortcut import (
    Block,
    Init,
    PlainBlock,
    Shortcut,
    SingleLayerBlock,
    ThreeLayerBlock,
    Zeros,
    check_options,
    initialize,
    make_stage,
    positive,
)

_BLOCKS: dict[int, Block] = {1: SingleLayerBlock, 2: BasicBlock, 3: ThreeLayerBlock}


class CifarResNet(nn.Module):
    """A CIFAR network: ``x [N, in_channels, H, W] -> logits [N, num_classes]``; 32x32 in the paper, any size here.

    Args:
        block: ``fastres.nn.BasicBlock`` or ``fastres.models.PlainBlock``.
        depth: 6n + 2 layers: 20, 32, 44, 56, 110, 1202, or any other n >= 1.
        layers_per_block: 3x3 layers that a shortcut skips: 2 in the paper; 1 and 3 replace ``BasicBlock`` with
            :class:`SingleLayerBlock` and :class:`ThreeLayerBlock`, and ``depth`` is then 3n + 2 or 9n + 2 (20, 56 and
            110 fit all three).
        shortcut, num_classes, in_channels, zero_init_residual, zeros, init: as in :class:`fastres.models.ResNet`.

    Raises:
        TypeError, ValueError: naming the argument, before anything is built.
    """

    def __init__(
        self,
        block: Block,
        depth: int,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        shortcut: Shortcut = "A",
        zero_init_residual: bool = False,
        zeros: Zeros = "end",
        init: Init = "fan_out",
        layers_per_block: int = 2,
    ) -> None:
        super().__init__()
        check_options(shortcut, zeros, init)
        sizes = {"depth": depth, "num_classes": num_classes, "in_channels": in_channels}
        positive(**sizes, layers_per_block=layers_per_block)
        if layers_per_block not in _BLOCKS:
            raise ValueError(f"layers_per_block: got {layers_per_block}, expected 1, 2 or 3")
        if layers_per_block != 2:
            if block is not BasicBlock:
                raise ValueError(f"layers_per_block: got {layers_per_block}, expected 2 for {block.__name__}")
            block = _BLOCKS[layers_per_block]
        n, rest = divmod(depth - 2, 3 * layers_per_block)
        if rest or n < 1:
            such = "20, 32, 44, 56 or 110" if layers_per_block < 3 else "11, 20, 29, 56 or 110"
            raise ValueError(f"depth: got {depth}, expected {3 * layers_per_block}n + 2 with n >= 1, such as {such}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = make_stage(block, 16, 16, n, 1, shortcut, zeros)
        self.layer2 = make_stage(block, 16, 32, n, 2, shortcut, zeros)
        self.layer3 = make_stage(block, 32, 64, n, 2, shortcut, zeros)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        initialize(self, init, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_norm_act(x, self.conv1, self.bn1, self.relu)  # [N, 16, H, W]
        x = self.layer1(x)
        x = self.layer2(x)  # [N, 32, H / 2, W / 2]
        x = self.layer3(x)  # [N, 64, H / 4, W / 4]
        x = torch.flatten(self.avgpool(x), 1)  # [N, 64]
        logits: Tensor = self.fc(x)  # [N, num_classes]
        return logits


def cifar_resnet(
    depth: int, shortcut: Shortcut = "A", num_classes: int = 10, in_channels: int = 3, **options: Any
) -> CifarResNet:
    """The residual network of ``depth`` = 6n + 2 layers: 269,722 parameters at depth 20, 1,727,962 at 110 (shortcut A).

    Args:
        depth: 20, 32, 44, 56, 110, 1202, or any 6n + 2.
        shortcut: ``"A"`` (the paper's), ``"B"`` or ``"C"``.
        num_classes, in_channels: of the data.
        options: ``zeros``, ``init``, ``zero_init_residual``, ``layers_per_block`` as in :class:`CifarResNet`.

    Example:
        >>> import fastres.models
        >>> sum(p.numel() for p in fastres.models.cifar_resnet(20).parameters())
        269722
    """
    return CifarResNet(BasicBlock, depth, num_classes, in_channels=in_channels, shortcut=shortcut, **options)


def cifar_plain(depth: int, num_classes: int = 10, in_channels: int = 3, **options: Any) -> CifarResNet:
    """The plain network of ``depth`` = 6n + 2 layers: no shortcuts, otherwise (and in parameters) the same."""
    return CifarResNet(PlainBlock, depth, num_classes, in_channels=in_channels, **options)
