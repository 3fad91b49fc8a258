"""The forward of residual blocks whose BN are folded: one call per convolution, the residual and ReLU inside the last.

A block becomes one of these classes by its ``__class__``; its children keep their names. Only blocks of exactly
torchvision's and our own classes, with plain ReLUs and every BN folded.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from fastres.inference.conv import FrozenConv
from fastres.nn import BasicBlock, Bottleneck
from fastres.nn.steps import has_global_hooks, is_bare, is_plain


class _Frozen(nn.Module):
    """A residual block whose `main` convolutions each take their epilogue in; the last one the shortcut as well."""

    main: tuple[str, ...] = ()
    downsample: nn.Module | None
    # The block before it in one nn.Sequential, in a tuple so that it is not a child; see `own_residuals`.
    previous: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = (getattr(self, name) for name in self.main)
        out = x
        for conv in inner:
            out = conv.run(out, None, "relu")  # [N, planes, H / stride, W / stride]
        if self.downsample is None:
            # x is the output of the block before, and this block its only reader
            own = bool(self.previous) and is_bare(self.previous[0]) and not has_global_hooks()
            return last.run(out, x, "relu", overwrite=own)  # type: ignore[no-any-return]
        residual = self.downsample(x)
        own = _is_fresh(self.downsample) and not has_global_hooks()
        return last.run(out, residual, "relu", overwrite=own)  # type: ignore[no-any-return]


def _is_fresh(shortcut: Any) -> bool:
    """Whether the projection's output is new memory that nobody else has seen."""
    if type(shortcut) is not nn.Sequential or not is_bare(shortcut):
        return False
    chain = list(shortcut.children())
    return any(isinstance(m, FrozenConv) for m in chain) and all(is_bare(m) for m in chain)


class FrozenBasicBlock(_Frozen):
    """relu(conv2(relu(conv1(x))) + shortcut(x)). Shapes: x [N, C_in, H, W] -> y [N, C, H / stride, W / stride]."""

    main = ("conv1", "conv2")


class FrozenBottleneck(_Frozen):
    """relu(conv3(relu(conv2(relu(conv1(x))))) + shortcut(x)). Shapes: x [N, C_in, H, W] -> y, smaller by the stride."""

    main = ("conv1", "conv2", "conv3")


_KNOWN: dict[str, tuple[type[_Frozen], tuple[str, ...]]] = {
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
    if not all(isinstance(getattr(block, name), FrozenConv) for name in frozen.main):
        return False
    block.__class__ = frozen
    return True


def own_residuals(model: nn.Module, allowed: bool) -> None:
    """Lets each block of an nn.Sequential write its output over that of the block before it, which it alone reads.

    A network that keeps the outputs between (a pyramid's features) reads them elsewhere too: FrozenModel compares its
    outputs with and without, on the example, and asks for `allowed=False` where they differ. A forward hook on a block
    ends it for the block behind it.
    """
    for parent in model.modules():
        children = list(parent.children()) if type(parent) is nn.Sequential else []
        for before, block in zip(children, children[1:], strict=False):
            if isinstance(block, _Frozen):
                block.previous = (before,) if allowed and isinstance(before, _Frozen) else ()
