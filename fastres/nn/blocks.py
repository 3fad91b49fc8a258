"""The residual blocks of He et al. 2016, fused, with torchvision's arguments, child names and state_dict.

    basic        relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))                   3x3, 3x3
    bottleneck   relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))  1x1, 3x3, 1x1

Each BN runs as one operator with the ReLU behind it, the last also with the shortcut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastres.nn.conv_steps import conv_norm_act


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left; torchvision's `BasicBlock`).

    Args:
        inplanes, planes: channels in and out.
        stride: of the first convolution.
        downsample: the projection shortcut, None for the identity.
        groups, base_width, dilation: 1, 64 and 1 only, as in torchvision.
        norm_layer: makes a norm from a channel count; BatchNorm2d is fused, anything else runs as it is.

    Shapes: x [N, inplanes, H, W] -> y [N, planes, H / stride, W / stride].

    Raises:
        ValueError: groups or base_width; NotImplementedError: dilation above 1.

    Example:
        >>> import torch
        >>> from fastres.nn import BasicBlock
        >>> BasicBlock(8, 8)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    expansion: int = 1
    backend: str = "auto"
    memory: str = "default"

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        if groups != 1 or base_width != 64:
            raise ValueError(f"groups, base_width: got {groups}, {base_width}; BasicBlock takes 1 and 64")
        if dilation > 1:
            raise NotImplementedError(f"dilation: got {dilation}, BasicBlock takes 1")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        relu: Any = self.relu
        out = conv_norm_act(x, self.conv1, self.bn1, relu, None, self.backend, self.memory)  # [N, planes, H/s, W/s]
        residual = x if self.downsample is None else self.downsample(x)  # [N, planes, H/s, W/s]
        return conv_norm_act(out, self.conv2, self.bn2, relu, residual, self.backend, self.memory)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (He et al. 2016, figure 5 right; torchvision's `Bottleneck`).

    Args:
        inplanes: channels in; `planes * 4` come out.
        planes: sets the width of the 3x3: planes * base_width / 64 * groups.
        stride: of the 3x3 (v1.5, torchvision), or of the first 1x1 with `stride_in_1x1` (v1, the paper).
        downsample: the projection shortcut, None for the identity.
        groups, base_width, dilation: of the 3x3; ResNeXt and Wide ResNet.
        norm_layer: makes a norm from a channel count; BatchNorm2d is fused, anything else runs as it is.

    Shapes: x [N, inplanes, H, W] -> y [N, planes * 4, H / stride, W / stride].

    Example:
        >>> import torch
        >>> from fastres.nn import Bottleneck
        >>> Bottleneck(16, 4)(torch.randn(2, 16, 4, 4)).shape
        torch.Size([2, 16, 4, 4])
    """

    expansion: int = 4
    backend: str = "auto"
    memory: str = "default"

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        width = int(planes * (base_width / 64.0)) * groups
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(inplanes, width, first)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, second, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        relu: Any = self.relu
        out = conv_norm_act(x, self.conv1, self.bn1, relu, None, self.backend, self.memory)  # [N, width, H, W]
        out = conv_norm_act(out, self.conv2, self.bn2, relu, None, self.backend, self.memory)  # [N, width, H/s, W/s]
        residual = x if self.downsample is None else self.downsample(x)  # [N, planes * 4, H/s, W/s]
        return conv_norm_act(out, self.conv3, self.bn3, relu, residual, self.backend, self.memory)
