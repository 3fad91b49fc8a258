"""Layers: BNReLU, BNAddReLU, AddReLU, ConvBNReLU.

BNReLU and BNAddReLU hold a stock `nn.BatchNorm2d` as the child `bn` rather than derive from it, so that
`SyncBatchNorm.convert_sync_batchnorm` replaces the norm and cannot lose the ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastres.nn.conv_steps import run_sequence
from fastres.nn.steps import bn_step, fused_add_relu, is_plain

torch.fx.wrap("fused_add_relu")


class _BNAct(nn.Module):
    backend: str = "auto"
    memory: str = "default"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)


class BNReLU(_BNAct):
    """relu(bn(x)): `nn.BatchNorm2d`'s arguments, the norm is the child `bn`.

    Shapes: x [N, C, H, W] -> y [N, C, H, W].

    Raises:
        ValueError: x is not 4-dimensional, has another C, or holds one value per channel in training.

    Source: Ioffe and Szegedy 2015.

    Example:
        >>> import torch
        >>> from fastres.nn import BNReLU
        >>> BNReLU(3)(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(self.bn, nn.BatchNorm2d):
            return bn_step(x, self.bn, None, "relu", self.backend, self.memory)
        return torch.relu(self.bn(x))


class BNAddReLU(_BNAct):
    """relu(bn(x) + residual): the end of a residual block; the norm is the child `bn`.

    Shapes: x, residual [N, C, H, W] -> y [N, C, H, W].

    Raises:
        ValueError: as `BNReLU`.

    Source: He et al. 2016, section 3.2.

    Example:
        >>> import torch
        >>> from fastres.nn import BNAddReLU
        >>> x = torch.randn(2, 3, 4, 4)
        >>> BNAddReLU(3)(x, x).shape
        torch.Size([2, 3, 4, 4])
    """

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if is_plain(self.bn, nn.BatchNorm2d):
            return bn_step(x, self.bn, residual, "relu", self.backend, self.memory)
        return torch.relu(self.bn(x) + residual)


class AddReLU(nn.Module):
    """relu(x + residual), one pass over memory. Shapes: x, residual [*] -> y [*].

    Example:
        >>> import torch
        >>> from fastres.nn import AddReLU
        >>> AddReLU()(torch.tensor([-2.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor([0., 2.])
    """

    backend: str = "auto"

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return fused_add_relu(x, residual, self.backend)


class ConvBNReLU(nn.Sequential):
    """Convolution, BN, ReLU under torchvision's names: 0, 1, 2, and `Conv2dNormActivation`'s arguments.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, dilation: as for `nn.Conv2d`.
        padding: None keeps the size at stride 1: (kernel_size - 1) // 2 * dilation.
        norm_layer: None leaves the norm out and gives the convolution a bias.
        activation_layer: None ends with the norm.
        inplace: passed to the activation.
        bias: None for a bias exactly when there is no norm.

    Shapes: x [N, C_in, H, W] -> y [N, C_out, H_out, W_out].

    Example:
        >>> import torch
        >>> from fastres.nn import ConvBNReLU
        >>> ConvBNReLU(3, 8, stride=2)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    backend: str = "auto"
    memory: str = "default"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int | tuple[int, int] = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        if padding is None:
            kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
            spread = (dilation,) * 2 if isinstance(dilation, int) else dilation
            padding = ((kernel[0] - 1) // 2 * spread[0], (kernel[1] - 1) // 2 * spread[1])
        if bias is None:
            bias = norm_layer is None
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        ]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer() if inplace is None else activation_layer(inplace=inplace))
        super().__init__(*layers)
        self.out_channels = out_channels

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = run_sequence(self, input, self.backend, self.memory)
        return y
