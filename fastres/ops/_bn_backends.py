"""bn_act's backends, and the gradient formula that create_graph=True differentiates again.

Each backend returns its outputs, and takes dense images of one memory order and numbers per channel in the statistics'
dtype. The reference is eager's own kernels, so its error is eager's. Names and formulas are those of ops/bn_act.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.ops._autograd import refuse_elsewhere
from fastres.ops._tensors import check_activation, is_channels_last, stats_dtype

ACTS = ("relu", "none")
Outputs = tuple[Tensor, Tensor, Tensor]  # y [N, C, H, W]; mean, var [C]: what it was normalized with
Grads = Sequence[Tensor | None]  # dx, dweight, dbias, dresidual; None unless needed

_LIB = torch.library.Library("fastres", "FRAGMENT")
# What csrc registers, described in csrc/cpu/bn_act.cpp. None for each output, having done nothing, unless the images
# have the strides of a new tensor and the numbers per channel are fp32.
_LIB.define(
    "_bn_act_native(Tensor(a!) x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(b!)? running_mean, "
    "Tensor(c!)? running_var, Tensor(d!)? num_batches_tracked, bool training, float momentum, float eps, bool relu, "
    "bool overwrite) -> (Tensor?, Tensor?, Tensor?)"
)
_LIB.define(
    "_bn_act_backward_native(Tensor(a!) dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, bool training, float eps, bool relu, int needs, bool reuse_dy) "
    "-> (Tensor?, Tensor?, Tensor?, Tensor?)"
)
NATIVE = torch.ops.fastres._bn_act_native.default
NATIVE_BACKWARD = torch.ops.fastres._bn_act_backward_native.default
for _name in ("_bn_act_native", "_bn_act_backward_native"):
    refuse_elsewhere(_LIB, _name)


def check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    act: str,
) -> None:
    """Raises a typed error that names the argument unless the call's arguments fit each other."""
    check_activation("bn_act", "x", x)
    if x.ndim != 4:
        raise ValueError(f"bn_act: x: got {x.ndim} dimensions {list(x.shape)}, expected 4: [N, C, H, W]")
    channels = x.shape[1]
    per_channel = ("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var)
    for name, t in per_channel:
        if t is None:
            continue
        if t.ndim != 1 or t.shape[0] != channels:
            raise ValueError(f"bn_act: {name}: got shape {list(t.shape)}, expected [{channels}], x's channels")
        if not t.dtype.is_floating_point:
            raise TypeError(f"bn_act: {name}: got dtype {t.dtype}, expected a floating dtype")
        if t.device != x.device:
            raise ValueError(f"bn_act: {name}: got device {t.device}, expected x's device {x.device}")
    if residual is not None:
        check_activation("bn_act", "residual", residual, like=x)
    if act not in ACTS:
        raise ValueError(f"bn_act: act: got {act!r}, expected one of {ACTS}")
    if training:
        if x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise ValueError(f"bn_act: x: expected more than 1 value per channel when training, got {list(x.shape)}")
    elif running_mean is None or running_var is None:
        raise ValueError("bn_act: running_mean and running_var: got None, expected [C] tensors when training is False")


def reference_forward(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    residual: Tensor | None,  # [N, C, H, W]
    mean: Tensor | None,  # [C], the running statistics in eval mode
    var: Tensor | None,  # [C]
    *,
    training: bool,
    eps: float,
    act: str,
) -> Outputs:
    mean, var = statistics(x, mean, var)
    # in training, momentum 1 leaves the batch's mean and unbiased variance in the "running" tensors
    y, _, _ = torch.native_batch_norm(x, weight, bias, mean, var, training, float(training), eps)
    if training:
        n = x.numel() // x.shape[1]
        var.mul_((n - 1) / n)
    if residual is not None:
        y.add_(residual)
    return (y.relu_() if act == "relu" else y), mean, var


def by_stock(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    act: str,
    momentum: float = 0.0,
) -> Tensor:
    """y by PyTorch's operators, the statistics moved; out of place, as a batch may be of some tensors only."""
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return torch.relu(y) if act == "relu" else y


def statistics(x: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """New tensors [C] for the statistics that backward uses: copies, or zeros where the batch's are to be written."""
    new = (x.new_zeros(x.shape[1], dtype=stats_dtype(x)) if t is None else t.clone() for t in (mean, var))
    return next(new), next(new)


def reference_backward(
    dy: Tensor,  # [N, C, H, W]
    x: Tensor,  # [N, C, H, W]
    y: Tensor | None,  # [N, C, H, W], None for act="none"
    weight: Tensor | None,  # [C]
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    *,
    training: bool,
    eps: float,
    act: str,
    needs: Sequence[bool],
) -> Grads:
    needs_x, needs_weight, needs_bias, needs_residual = needs
    g = dy if y is None else torch.ops.aten.threshold_backward.default(dy, y, 0)
    dx = dweight = dbias = None
    if needs_x or needs_weight or needs_bias:
        wanted = [needs_x, needs_weight or needs_bias, needs_weight or needs_bias]
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward.default(
            g, x, weight, mean, var, mean, torch.rsqrt(var + eps), training, eps, wanted
        )
    dresidual = g.clone() if needs_residual and g is dy else g
    return [t if need else None for t, need in zip((dx, dweight, dbias, dresidual), needs, strict=True)]


def native_forward(*tensors: Tensor | None, training: bool, eps: float, act: str) -> Outputs:
    found: Outputs = NATIVE(*tensors, None, training, 0.0, eps, act == "relu", False)
    return found


def native_backward(*tensors: Tensor | None, training: bool, eps: float, act: str, needs: Sequence[bool]) -> Grads:
    dy, x, y, weight, mean, var = tensors
    bits = sum(need << bit for bit, need in enumerate(needs))
    grads: Grads = NATIVE_BACKWARD(dy, x, y, weight, None, mean, var, training, eps, act == "relu", bits, False)
    return grads


def triton_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    *,
    training: bool,
    eps: float,
    act: str,
) -> Outputs:
    from fastres.kernels.bn_act import bn_act_forward

    y, channels_last, (mean, var) = torch.empty_like(x), is_channels_last(x), statistics(x, mean, var)
    bn_act_forward(
        x, weight, bias, residual, y, mean, var, channels_last=channels_last, training=training, eps=eps, act=act
    )
    return y, mean, var


def triton_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *,
    training: bool,
    eps: float,
    act: str,
    needs: Sequence[bool],
) -> Grads:
    from fastres.kernels.bn_act import bn_act_backward

    like = x, mean, mean, x
    grads = [torch.empty_like(t) if need else None for t, need in zip(like, needs, strict=True)]
    how = {"channels_last": is_channels_last(x), "training": training, "eps": eps, "act": act}
    bn_act_backward(dy, x, y, weight, mean, var, *grads, **how)
    return grads


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
