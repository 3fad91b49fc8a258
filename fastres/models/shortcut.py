"""Shared parts of the ImageNet and CIFAR networks: shortcuts A, B and C, the plain block, the initialization.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, sections 3.3 and 4.1:

    A  identity everywhere; where the width grows, stride-2 subsampling and zeros for the new channels: no parameters
    B  a projection (1x1 convolution and BN) where the width grows, identity elsewhere
    C  a projection in every block
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from fastres.nn import BasicBlock, Bottleneck, conv_norm_act

Shortcut = Literal["A", "B", "C"]
Zeros = Literal["end", "both"]
Init = Literal["fan_out", "fan_in"]


def one_of(argument: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError, naming the argument, unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{argument}: got {value!r}, expected one of {', '.join(repr(a) for a in allowed)}")


def check_options(shortcut: Any, zeros: Any, init: Any) -> None:
    one_of("shortcut", shortcut, get_args(Shortcut))
    one_of("zeros", zeros, get_args(Zeros))
    one_of("init", init, get_args(Init))


def positive(**arguments: Any) -> None:
    """Raise TypeError or ValueError, naming the argument, unless each is an integer of at least 1."""
    for argument, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{argument}: got {value!r}, expected an integer")
        if value < 1:
            raise ValueError(f"{argument}: got {value}, expected at least 1")


class ZeroPadShortcut(nn.Module):
    """Shortcut A across a change of width: subsample by ``stride``, then add zeros for the new channels.

    ``x [N, in_planes, H, W] -> [N, out_planes, ceil(H / stride), ceil(W / stride)]``, any dtype, no parameters.

    Args:
        in_planes, out_planes: channels before and after; ``out_planes >= in_planes``.
        stride: every ``stride``-th row and column is kept (the paper's and fb.resnet.torch's 1x1 average pooling).
        zeros: the position of the zeros: ``"end"`` (fb.resnet.torch) or ``"both"`` (half before, half after; a common
            port). The two are the same network up to a permutation of channels.

    Raises:
        ValueError: unknown ``zeros``, or fewer channels after than before.

    Example:
        >>> import torch
        >>> y = ZeroPadShortcut(16, 32, stride=2)(torch.ones(1, 16, 8, 8))
        >>> tuple(y.shape), float(y.sum())
        ((1, 32, 4, 4), 256.0)
    """

    def __init__(self, in_planes: int, out_planes: int, stride: int = 1, zeros: Zeros = "end") -> None:
        super().__init__()
        one_of("zeros", zeros, ("end", "both"))
        if out_planes < in_planes:
            raise ValueError(f"out_planes: got {out_planes}, expected at least in_planes = {in_planes}")
        self.stride = stride
        new = out_planes - in_planes
        self.pad = (0, new) if zeros == "end" else (new // 2, new - new // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]  # [N, in_planes, H / stride, W / stride]
        return F.pad(x, (0, 0, 0, 0, *self.pad))  # [N, out_planes, H / stride, W / stride]

    def extra_repr(self) -> str:
        return f"stride={self.stride}, pad={self.pad}"


def make_shortcut(kind: Shortcut, in_planes: int, out_planes: int, stride: int, zeros: Zeros) -> nn.Module | None:
    """The ``downsample`` of one block; None if the shortcut is the identity."""
    same = stride == 1 and in_planes == out_planes
    if kind == "C" or (kind == "B" and not same):
        return nn.Sequential(nn.Conv2d(in_planes, out_planes, 1, stride, bias=False), nn.BatchNorm2d(out_planes))
    return None if same else ZeroPadShortcut(in_planes, out_planes, stride, zeros)


class PlainBlock(nn.Module):
    """Two layers of the plain network, a basic block without a shortcut: ``relu(bn2(conv2(relu(bn1(conv1(x))))))``.

    ``x [N, inplanes, H, W] -> [N, planes, H / stride, W / stride]``. Parameter names are the basic block's.
    """

    expansion: int = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = conv_norm_act(x, self.conv1, self.bn1, self.relu)  # [N, planes, H / stride, W / stride]
        return conv_norm_act(x, self.conv2, self.bn2, self.relu)


class ChainBlock(nn.Module):
    """A residual block whose function F is a chain of ``layers`` 3x3 layers: ``relu(F(x) + shortcut(x))``.

        layers = 1    relu(bn1(conv1(x)) + shortcut(x))
        layers = 3    relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))

    Section 3.2: "if F has only a single layer, Eqn.(1) is similar to a linear layer: y = W1 x + x, for which we have
    not observed advantages." Two layers are ``fastres.nn.BasicBlock``; use :class:`SingleLayerBlock` or
    :class:`ThreeLayerBlock`.

    ``x [N, inplanes, H, W] -> [N, planes, H / stride, W / stride]``; the first convolution has the stride.

    Example:
        >>> import torch
        >>> ThreeLayerBlock(8, 8)(torch.ones(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    expansion: int = 1
    layers: int
    backend: str = "auto"
    memory: str = "default"

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        for index in range(1, self.layers + 1):
            first = index == 1
            conv = nn.Conv2d(inplanes if first else planes, planes, 3, stride if first else 1, 1, bias=False)
            self.add_module(f"conv{index}", conv)
            self.add_module(f"bn{index}", nn.BatchNorm2d(planes))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)  # [N, planes, H / stride, W / stride]
        for index in range(1, self.layers + 1):
            conv, bn = getattr(self, f"conv{index}"), getattr(self, f"bn{index}")
            added = residual if index == self.layers else None
            x = conv_norm_act(x, conv, bn, self.relu, added, self.backend, self.memory)
        return x


class SingleLayerBlock(ChainBlock):
    """:class:`ChainBlock` of one layer: ``relu(bn1(conv1(x)) + shortcut(x))``."""

    layers = 1


class ThreeLayerBlock(ChainBlock):
    """:class:`ChainBlock` of three layers, all 3x3."""

    layers = 3


Block = type[BasicBlock] | type[Bottleneck] | type[PlainBlock] | type[ChainBlock]


def make_stage(
    block: Block,
    in_planes: int,
    planes: int,
    blocks: int,
    stride: int,
    shortcut: Shortcut,
    zeros: Zeros,
    stride_in_1x1: bool = False,
) -> nn.Sequential:
    """``blocks`` blocks of one width, the first with ``stride``; the last has ``planes * block.expansion`` channels."""
    layers: list[nn.Module] = []
    for index in range(blocks):
        step = stride if index == 0 else 1
        if issubclass(block, PlainBlock):
            layers.append(block(in_planes, planes, step))
        else:
            downsample = make_shortcut(shortcut, in_planes, planes * block.expansion, step, zeros)
            extra: dict[str, Any] = {"stride_in_1x1": stride_in_1x1} if issubclass(block, Bottleneck) else {}
            layers.append(block(in_planes, planes, step, downsample, **extra))
        in_planes = planes * block.expansion
    return nn.Sequential(*layers)


def initialize(model: nn.Module, init: Init, zero_init_residual: bool) -> None:
    """He initialization (paper section 3.4, reference [12]): convolutions N(0, sqrt(2 / fan)), BN 1 and 0, fc bias 0.

    ``fan_out`` is the choice of fb.resnet.torch and torchvision, ``fan_in`` the other reading of [12].
    ``zero_init_residual`` sets the last BN of every residual block to 0, so that a block starts as the identity.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=init, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if zero_init_residual and isinstance(module, BasicBlock | Bottleneck | ChainBlock):
            last = max(name for name, _ in module.named_children() if name.startswith("bn"))
            nn.init.zeros_(module.get_parameter(f"{last}.weight"))
