"""Convolution, bias, residual addition and activation in one operator, forward only: launch and refusals.

Formula, x [N, C, H, W], weight [K, C / groups, R, S], per output pixel (n, p, q) and output channel k of group g:

    h = p * stride_h - padding_h + r * dilation_h,   w = q * stride_w - padding_w + s * dilation_w
    conv = sum over r, s, c of x[n, g * C / groups + c, h, w] * weight[k, c, r, s]  x is 0 outside the image
    z = [scale[k] *] conv [+ bias[k]] [+ residual[n, k, p, q]]                      in fp32, rounded once to x's dtype
    act(z) = z < 0 ? 0 : z  for "relu" (NaN and -0.0 pass, as in torch.relu);  z  for "none"
             min(max(z, 0), 6)  for "relu6";  z * relu6(z + 3) / 6  for "hardswish";  z / (1 + exp(-z))  for "silu"
    y = act(z)

Gradient, with g the gradient of z (masked by y's sign for "relu"): aten's convolution_backward; dresidual = g.

One launch; one program per tile of y and group, an implicit GEMM (conv_act_forward.py). Products are of the tensors'
dtype, for fp32 TF32 or, where that is not allowed, IEEE on the ordinary cores; sums are fp32, in an order that depends
on the shapes, the layouts and the table of configs alone: the same input gives the same bits.

channels_last x and weights are read 16 bytes at a time where C / groups is a multiple of 8 (4 in fp32). It stops being
good in NCHW (with other than pointwise convolutions single elements are read), where C / groups is odd, where y has few
pixels (batch 1 at 7x7 gives a GPU a handful of programs, the depth is not split), and in fp32 without TF32. Padding is
multiplied like pixels are: an infinite weight makes NaN of it.
"""

import torch
import triton

from . import configs
from .conv_act_forward import conv_act_forward_kernel
from .launch import architecture, device_guard

FLAT_BELOW = 16  # channels of a group: with fewer, taps and channels share the axis of the dot
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _is_last(t: torch.Tensor) -> bool:
    """Dense in channels_last order. True also where both orders are the same memory."""
    return t.is_contiguous(memory_format=torch.channels_last)


def _out(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def why_not(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [K, C / groups, R, S]
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> list[str]:
    """The reasons why conv_act_forward can't take this convolution, as sentences; empty when it can."""
    if x.dim() != 4 or weight.dim() != 4:
        return [f"only 2-d convolutions of a batch: x has {x.dim()} dimensions and weight {weight.dim()}, not 4 and 4"]
    reasons = []
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        reasons.append(
            f"x is {x.dtype} and weight {weight.dtype}: both must be float32, float16 or bfloat16, and alike"
        )
    if not (x.is_contiguous() or _is_last(x)):
        reasons.append(f"x is dense neither in NCHW nor in channels_last order: its strides are {tuple(x.stride())}")
    (height, width), (k, c, r, s) = x.shape[2:], weight.shape
    if groups > 1 and min(c, k // groups) < 16:
        reasons.append(f"groups of {c} to {k // groups} channels: a matrix product needs 16 of each")
    out = [_out(*axis) for axis in zip((height, width), (r, s), stride, padding, dilation, strict=True)]
    if height + 2 * padding[0] >= 2**31 or width + 2 * padding[1] >= 2**31 or out[0] * out[1] >= 2**31:
        reasons.append(f"images of {height} x {width} to {out[0]} x {out[1]} pixels: a plane must have fewer than 2^31")
    if c * r * s >= 2**31:
        reasons.append(f"{c * r * s} products to an output: must be fewer than 2^31")
    return reasons


def conv_act_forward(
    x: torch.Tensor,  # [N, C, H, W] float32, float16 or bfloat16; dense, channels_last or NCHW
    weight: torch.Tensor,  # [K, C / groups, R, S], x's dtype, any strides
    bias: torch.Tensor | None,  # [K], any floating dtype; None: 0
    residual: torch.Tensor | None,  # [N, K, P, Q], y's dtype and strides; None: 0
    y: torch.Tensor,  # [N, K, P, Q], x's dtype, written; dense, channels_last or NCHW
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    scale: torch.Tensor | None = None,  # [K], any floating dtype; None: 1
    act: str,
    tf32: bool,
) -> None:
    """y = act([scale *] conv2d(x, weight) [+ bias] [+ residual]), one launch. `tf32`: fp32 products may be TF32."""
    _, _, height, width = x.shape
    n, k, out_height, out_width = y.shape
    if y.numel() == 0:
        return
    c, r, s = weight.shape[1:]
    pixels, out_channels = n * out_height * out_width, k // groups
    x_last, weight_last, y_last = _is_last(x), _is_last(weight), _is_last(y)
    unit, out_unit = configs.alignment_unit(c), configs.alignment_unit(out_channels)
    flat = c < FLAT_BELOW
    shape = configs.Gemm(
        pixels,
        out_channels,
        depth=c * r * s if flat else c,
        groups=groups,
        vectors=x_last and weight_last and y_last and not flat and min(unit, out_unit) * x.element_size() >= 8,
        residual=residual is not None,
        precision="" if x.dtype != torch.float32 else "_tf32" if tf32 else "_ieee",
    )
    plan = configs.gemm("conv_act_forward_kernel", architecture(x), shape)
    tiles_m, tiles_n = triton.cdiv(pixels, plan.block_m), triton.cdiv(out_channels, plan.block_n)
    pointwise = (r, s, *stride, *padding) == (1, 1, 1, 1, 0, 0)
    with device_guard(x):
        conv_act_forward_kernel[(tiles_m * tiles_n * groups,)](
            x, weight, bias, residual, scale, y,
            height, width, c // unit, groups, pixels, out_height, out_width, out_channels // out_unit,
            *stride, *padding, *dilation, *weight.stride(), tiles_m, tiles_n,
            R=r, S=s, POINTWISE=pointwise, FLAT=flat, X_LAST=x_last, WEIGHT_LAST=weight_last, Y_LAST=y_last,
            ACT=act, PRECISION="tf32" if shape.precision == "_tf32" else "ieee", UNIT=unit, OUT_UNIT=out_unit,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, GROUP_M=plan.group_m,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
