"""The forward of residual blocks whose BN are folded: ReLU in place, the residual and the last ReLU in one pass.

A block becomes one of these classes by its ``__class__``; its children keep their names. Only blocks of exactly
torchvision's and our own classes, with plain ReLUs and every BN folded.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from fastres.nn import BasicBlock, Bottleneck
from fastres.nn.steps import fused_add_relu, is_bare, is_plain


class FrozenBasicBlock(nn.Module):
    """relu(conv2(relu(conv1(x))) + shortcut(x)). Shapes: x [N, C_in, H, W] -> y [N, C, H / stride, W / stride]."""

    conv1: nn.Module
    conv2: nn.Module
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x).relu_()  # [N, C, H / stride, W / stride]
        out = self.conv2(out)
        residual = x if self.downsample is None else self.downsample(x)
        return fused_add_relu(out, residual, "auto")


class FrozenBottleneck(nn.Module):
    """relu(conv3(relu(conv2(relu(conv1(x))))) + shortcut(x)). Shapes: x [N, C_in, H, W] -> y, smaller by the stride."""

    conv1: nn.Module
    conv2: nn.Module
    conv3: nn.Module
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x).relu_()  # [N, C, H, W]
        out = self.conv2(out).relu_()  # [N, C, H / stride, W / stride]
        out = self.conv3(out)  # [N, 4 C, H / stride, W / stride]
        residual = x if self.downsample is None else self.downsample(x)
        return fused_add_relu(out, residual, "auto")


_KNOWN: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "BasicBlock": (FrozenBasicBlock, ("bn1", "bn2")),
    "Bottleneck": (FrozenBottleneck, ("bn1", "bn2", "bn3")),
}


def freeze_block(block: Any) -> bool:
    """Give ``block`` its fused forward if it is a known one and its main path's BN are all folded; whether it was."""
    stock = getattr(type(block), "fastres_stock", type(block))
    theirs = sys.modules.get("torchvision.models.resnet")
    if stock not in {BasicBlock, Bottleneck, getattr(theirs, "BasicBlock", None), getattr(theirs, "Bottleneck", None)}:
        return False
    frozen, norms = _KNOWN[stock.__name__]
    if "forward" in block.__dict__ or not is_plain(block.relu, nn.ReLU):
        return False
    if not all(type(getattr(block, name)) is nn.Identity and is_bare(getattr(block, name)) for name in norms):
        return False
    block.__class__ = frozen
    return True
