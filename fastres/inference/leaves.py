"""What a frozen graph calls beside its convolutions: modules with tensors of their own, each one step.

FrozenNorm      act(bn(x) [+ residual])        a BN that no convolution takes in
FrozenAddReLU   relu(x + residual)
PoolLinear      linear(mean of every channel)  a classifier's head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres.inference.conv import is_traced
from fastres.nn.steps import fused_add_relu, fused_bn_act


class FrozenNorm(nn.Module):
    """act(scale * x + shift [+ residual]) by running statistics. Shapes: x, residual, y [N, C, H, W].

    Tensors are float32 whatever x is, or float64 for a float64 network.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, tensors: dict[str, Tensor | None], eps: float, act: str) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, tensors[name])
        self.eps, self.act = eps, act
        self.eval()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_traced():
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            y = y if residual is None else y + residual
            return torch.relu(y) if self.act == "relu" else y
        return fused_bn_act(
            x,
            residual,
            self.act,
            "auto",
            weight=self.weight,
            bias=self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            training=False,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, eps={self.eps}, act={self.act}"


class FrozenAddReLU(nn.Module):
    """relu(x + residual). Shapes: x, residual, y [N, C, H, W]."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(x + residual) if is_traced() else fused_add_relu(x, residual, "auto")


class PoolLinear(nn.Linear):
    """The mean of every channel, then a linear layer. Shapes: x [N, C, H, W] -> y [N, K]."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Any:
        """The head with this weight [K, C] and bias [K], which become its parameters."""
        with torch.device("meta"):
            head = cls(weight.shape[1], weight.shape[0], bias is not None)
        head.weight = nn.Parameter(weight, requires_grad=False)
        head.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        return head.eval()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.mean((2, 3)), self.weight, self.bias)
