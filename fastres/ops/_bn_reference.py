"""bn_act in stock PyTorch: the reference backend, and the gradient formula that create_graph=True differentiates again.

The reference runs eager's own kernels, so its error is eager's error. Names and formulas are those of ops/bn_act.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    residual: Tensor | None,  # [N, C, H, W]
    y: Tensor,  # [N, C, H, W], filled
    mean: Tensor,  # [C], filled in training
    var: Tensor,  # [C], filled in training
    *,
    channels_last: bool,
    training: bool,
    eps: float,
    act: str,
) -> None:
    saved = torch.empty_like(mean), torch.empty_like(var)
    if training:  # momentum 1 leaves the batch's mean and unbiased variance in the "running" tensors
        torch.ops.aten.native_batch_norm.out(
            x, weight, bias, mean.zero_(), var.zero_(), True, 1.0, eps, out=y, save_mean=saved[0], save_invstd=saved[1]
        )
        n = x.numel() // x.shape[1]
        var.mul_((n - 1) / n)
    else:
        torch.ops.aten.native_batch_norm.out(
            x, weight, bias, mean, var, False, 0.0, eps, out=y, save_mean=saved[0], save_invstd=saved[1]
        )
    if residual is not None:
        y.add_(residual)
    if act == "relu":
        y.relu_()


def backward(
    dy: Tensor,  # [N, C, H, W]
    x: Tensor,  # [N, C, H, W]
    y: Tensor | None,  # [N, C, H, W], None for act="none"
    weight: Tensor | None,  # [C]
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    dx: Tensor | None,  # [N, C, H, W], filled
    dweight: Tensor | None,  # [C], filled
    dbias: Tensor | None,  # [C], filled
    dresidual: Tensor | None,  # [N, C, H, W], filled
    *,
    channels_last: bool,
    training: bool,
    eps: float,
    act: str,
) -> None:
    g = dy if y is None else torch.ops.aten.threshold_backward.default(dy, y, 0)
    if dresidual is not None:
        dresidual.copy_(g)
    if dx is None and dweight is None and dbias is None:
        return
    wanted = [dx is not None, dweight is not None or dbias is not None, dweight is not None or dbias is not None]
    grads = torch.ops.aten.native_batch_norm_backward.default(
        g, x, weight, mean, var, mean, torch.rsqrt(var + eps), training, eps, wanted
    )
    for out, grad in zip((dx, dweight, dbias), grads, strict=True):
        if out is not None:
            out.copy_(grad)


def composite_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient formula in differentiable torch operations: what create_graph=True differentiates again."""
    dims = (0, 2, 3)
    g = (dy if y is None else torch.where(y.detach() <= 0, 0, dy)).to(mean.dtype)  # [N, C, H, W]
    xs = x.to(mean.dtype)
    if training:
        var, mean = torch.var_mean(xs, dims, correction=0)  # functions of x here, so that second derivatives see them
    rstd = torch.rsqrt(var + eps)[:, None, None]  # [C, 1, 1]
    x_hat = (xs - mean[:, None, None]) * rstd
    dbias, dweight = g.sum(dims), (g * x_hat).sum(dims)  # [C]
    scale = rstd if weight is None else rstd * weight.to(mean.dtype)[:, None, None]
    if training:
        n = x.numel() // x.shape[1]
        dx = scale * (g - dbias[:, None, None] / n - x_hat * dweight[:, None, None] / n)
    else:
        dx = scale * g
    return dx.to(x.dtype), dweight, dbias, g.to(x.dtype)
