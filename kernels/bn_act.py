"""Batch normalization, residual addition and activation in one operator: the launches.

Formula, per channel over the n = N*H*W elements of x [N, C, H, W]:

    training:  mean = sum x / n,  var = sum (x - mean)^2 / n        (biased; written)
    eval:      mean, var are given
    rstd  = 1 / sqrt(var + eps)
    x_hat = (x - mean) * rstd
    z     = weight * x_hat + bias [+ residual]                      in fp32, rounded once to x's dtype
    y     = z < 0 ? 0 : z  for "relu" (NaN and -0.0 pass, as in torch.relu),  z for "none"

Gradient:

    g       = dy where y > 0 or y is NaN, else 0 ("relu");  dy ("none")
    dbias   = sum g
    dweight = sum g * x_hat
    dx      = weight * rstd * (g - dbias / n - x_hat * dweight / n)  in training,  weight * rstd * g  in eval
    dresidual = g

Launches and bytes, in units of the tensor: training forward 3 launches (statistics, merge, normalize), 2 reads of x, 1
write [+ 1 read of residual]; eval forward 1 launch, 1 read, 1 write [+ 1]. Training backward 3 launches (sums, merge,
dx): dy, y, x twice and dx once; with a residual gradient the first pass writes g and the second reads it in place of dy
and y, 7 either way. Eval backward 2 launches, dx being written by the pass that sums, or 1 when no parameter needs a
gradient. The merges move a few hundred KB.

Sums have two stages: programs write partial results to scratch memory, and one more launch adds them in a fixed order.
There are no atomics: the same input gives the same bits. The partition of a tensor depends only on its shape and the
table of configs.

It stops being good where the tensor is so small that three launches show (below about a million elements a single-pass
kernel per channel would win), in NCHW with C*H*W below a few hundred (tiles are mostly empty), and where the preceding
convolution could compute the statistics in its epilogue, which saves a read of x.
"""

import torch
import triton

from . import configs
from .bn_act_backward import bn_act_backward_kernel, bn_act_backward_merge_kernel, bn_act_backward_sums_kernel
from .bn_act_forward import bn_act_forward_kernel, bn_statistics_kernel, bn_statistics_merge_kernel
from .image import Image, image, reduction, sweep
from .launch import architecture, device_guard


def _merge_blocks(kernel: str, arch: int, parts: int, channels: int) -> tuple[tuple[int], dict[str, int]]:
    config = configs.config(kernel, arch, configs.merge_class(parts))
    constants = {"BLOCK_P": config.tile // config.line, "BLOCK_C": config.line, "num_warps": config.num_warps}
    return (triton.cdiv(channels, config.line),), constants


def _statistics(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, view: Image, arch: int) -> None:
    plan = reduction(view, "bn_statistics_kernel", arch)
    c, unit = view.channels, plan.constants["UNIT"]
    scratch = torch.empty(plan.parts * (2 * c + 1), dtype=torch.float32, device=x.device)
    bn_statistics_kernel[(plan.programs,)](
        x, scratch, view.outer, c, view.length // unit, plan.line_blocks, plan.splits, plan.parts, **plan.constants
    )
    grid, constants = _merge_blocks("bn_statistics_merge_kernel", arch, plan.parts, c)
    channel_stride = 1 if view.channels_last else view.length
    bn_statistics_merge_kernel[grid](
        x, scratch, mean, var, channel_stride, plan.parts, c, view.per_channel, **constants
    )


def bn_act_forward(
    x: torch.Tensor,  # [N, C, H, W] float32, float16 or bfloat16; dense in the order that channels_last says
    weight: torch.Tensor | None,  # [C] fp32; None: 1
    bias: torch.Tensor | None,  # [C] fp32; None: 0
    residual: torch.Tensor | None,  # like x; may be x itself
    y: torch.Tensor,  # like x, written
    mean: torch.Tensor,  # [C] fp32, written in training, else read
    var: torch.Tensor,  # [C] fp32, likewise; biased
    *,
    channels_last: bool,
    training: bool,
    eps: float,
    act: str,
) -> None:
    """y = act(weight * (x - mean) * rstd + bias [+ residual]): three launches in training, one in eval."""
    view, arch = image(x, channels_last), architecture(x)
    with device_guard(x):
        if training:
            _statistics(x, mean, var, view, arch)
        plan = sweep(view, "bn_act_forward_kernel", arch)
        bn_act_forward_kernel[(plan.programs,)](
            x, weight, bias, mean, var, residual, y,
            view.rows, view.channels, view.length // plan.constants["UNIT"], plan.line_blocks, eps,
            RELU=act == "relu", **plan.constants,
        )  # fmt: skip


def bn_act_backward(
    dy: torch.Tensor,  # [N, C, H, W], like x
    x: torch.Tensor,  # [N, C, H, W]
    y: torch.Tensor | None,  # like x: the forward's output; read only for "relu"
    weight: torch.Tensor | None,  # [C] fp32; None: 1
    mean: torch.Tensor,  # [C] fp32: what the forward normalized with
    var: torch.Tensor,  # [C] fp32
    dx: torch.Tensor | None,  # like x, written; None: not wanted, as for the next three
    dweight: torch.Tensor | None,  # [C] fp32, written
    dbias: torch.Tensor | None,  # [C] fp32, written
    dresidual: torch.Tensor | None,  # like x, written
    *,
    channels_last: bool,
    training: bool,
    eps: float,
    act: str,
) -> None:
    """Compute the wanted gradients in at most three launches; nothing is computed or written for the others."""
    if all(wanted is None for wanted in (dx, dweight, dbias, dresidual)):
        return
    view, arch = image(x, channels_last), architecture(x)
    c = view.channels
    masked_y = y if act == "relu" else None
    couples = training and dx is not None  # dx of one element depends on the sums over its channel
    with device_guard(x):
        coefficients = None
        if couples or dweight is not None or dbias is not None:
            plan = reduction(view, "bn_act_backward_sums_kernel", arch)
            summed_x = x if couples or dweight is not None else None
            scratch = torch.empty(2 * plan.parts * c, dtype=torch.float32, device=x.device)
            bn_act_backward_sums_kernel[(plan.programs,)](
                dy, summed_x, masked_y, weight, mean, var, None if training else dx, dresidual, scratch,
                view.outer, c, view.length // plan.constants["UNIT"], plan.line_blocks, plan.splits, plan.parts, eps,
                **plan.constants,
            )  # fmt: skip
            if couples:
                coefficients = torch.empty(2 * c, dtype=torch.float32, device=x.device)
            grid, constants = _merge_blocks("bn_act_backward_merge_kernel", arch, plan.parts, c)
            bn_act_backward_merge_kernel[grid](
                scratch, var, coefficients, dweight, dbias, plan.parts, c, view.per_channel, eps,
                HAS_X=summed_x is not None, **constants,
            )  # fmt: skip
            if not couples:
                return
            if dresidual is not None:  # it has g: one read instead of dy and y
                dy, masked_y, dresidual = dresidual, None, None
        sweep_plan = sweep(view, "bn_act_backward_kernel", arch)
        bn_act_backward_kernel[(sweep_plan.programs,)](
            dy, x if couples else None, masked_y, weight, mean, var, coefficients, dx, dresidual,
            view.rows, c, view.length // sweep_plan.constants["UNIT"], sweep_plan.line_blocks, eps,
            **sweep_plan.constants,
        )  # fmt: skip
