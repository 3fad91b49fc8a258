"""Backward kernels of bn_act: the two sums over each channel, their merge, and dx. The gradient is in bn_act.py."""

import triton
import triton.language as tl

from .element import reciprocal_std, relu_gradient
from .image import along_channels, reduction_tiles, sweep_tile


@triton.jit(do_not_specialize=["outer", "channels", "units", "line_blocks", "splits", "parts"])
def bn_act_backward_sums_kernel(
    dy_ptr,  # [R, L]
    x_ptr,  # [R, L]; None when only sum g is needed
    y_ptr,  # [R, L]; None without ReLU
    weight_ptr,  # [C] fp32 or None
    mean_ptr,  # [C] fp32
    var_ptr,  # [C] fp32
    dx_ptr,  # [R, L], written: eval's dx = weight * rstd * g, which needs no sum; else None
    dresidual_ptr,  # [R, L], written: g; or None
    scratch_ptr,  # written: sum g [parts, C], sum g * (x - mean) [parts, C]
    outer,
    channels,
    units,
    line_blocks,
    splits,
    parts,
    eps,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    length = units * UNIT
    base, step, iterations, local, in_line, rows_left, row_step, part, channel, channel_valid = reduction_tiles(
        outer, channels, length, line_blocks, splits, CHANNELS_LAST, BLOCK_R, BLOCK_L
    )
    lane_r = tl.arange(0, BLOCK_R)
    mean = along_channels(tl.load(mean_ptr + channel, channel_valid, other=0.0), CHANNELS_LAST)
    if dx_ptr is not None:
        scale = reciprocal_std(tl.load(var_ptr + channel, channel_valid, other=1.0), eps)
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + channel, channel_valid, other=0.0)
        scale = along_channels(scale, CHANNELS_LAST)

    # one pair of sums per lane, so that the loop has no reduction and no barrier
    sum_g = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
    sum_gx = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
    for _ in range(iterations):
        valid = (lane_r < rows_left)[:, None] & in_line[None, :]
        g = tl.load(dy_ptr + base + local, valid, other=0.0).to(tl.float32)
        if y_ptr is not None:
            g = relu_gradient(g, tl.load(y_ptr + base + local, valid, other=0.0).to(tl.float32))
        sum_g += g
        if x_ptr is not None:
            # rstd is the same for all of them: the merge multiplies by it once
            sum_gx += g * (tl.load(x_ptr + base + local, valid, other=0.0).to(tl.float32) - mean)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + base + local, g.to(dresidual_ptr.dtype.element_ty), valid)
        if dx_ptr is not None:
            tl.store(dx_ptr + base + local, (g * scale).to(dx_ptr.dtype.element_ty), valid)
        base += step
        rows_left -= row_step

    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    row = scratch_ptr + part.to(tl.int64) * channels
    tl.store(row + channel, tl.sum(sum_g, AXIS), channel_valid)
    if x_ptr is not None:
        size = tl.cast(parts, tl.int64) * channels
        tl.store(row + size + channel, tl.sum(sum_gx, AXIS), channel_valid)


@triton.jit(do_not_specialize=["parts", "channels", "n"])
def bn_act_backward_merge_kernel(
    scratch_ptr,  # sum g [parts, C], sum g * (x - mean) [parts, C]
    var_ptr,  # [C] fp32
    coefficients_ptr,  # [2, C] fp32, written: dbias / n and rstd * dweight / n for dx; or None
    dweight_ptr,  # [C] fp32, written; or None
    dbias_ptr,  # [C] fp32, written; or None
    parts,
    channels,
    n,
    eps,
    HAS_X: tl.constexpr,  # there is a second sum
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the parts in a fixed order."""
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    in_channels = channel < channels
    lane = tl.arange(0, BLOCK_P)
    size = tl.cast(parts, tl.int64) * channels
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + lane
        valid = (part < parts)[:, None] & in_channels[None, :]
        row = part.to(tl.int64)[:, None] * channels + channel[None, :]  # [BLOCK_P, BLOCK_C]
        sum_g += tl.load(scratch_ptr + row, valid, other=0.0)
        if HAS_X:
            sum_gx += tl.load(scratch_ptr + size + row, valid, other=0.0)
    dbias = tl.sum(sum_g, 0)  # [BLOCK_C]
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channel, dbias, in_channels)
    if HAS_X:
        rstd = reciprocal_std(tl.load(var_ptr + channel, in_channels, other=1.0), eps)
        dweight = rstd * tl.sum(sum_gx, 0)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + channel, dweight, in_channels)
        if coefficients_ptr is not None:
            tl.store(coefficients_ptr + channel, dbias / n.to(tl.float32), in_channels)
            tl.store(coefficients_ptr + channels + channel, rstd * (dweight / n.to(tl.float32)), in_channels)


@triton.jit(do_not_specialize=["rows", "channels", "units", "line_blocks"])
def bn_act_backward_kernel(
    dy_ptr,  # [R, L]
    x_ptr,  # [R, L]; None when no dx is wanted, and in eval
    y_ptr,  # [R, L]; None when dy is already g
    weight_ptr,  # [C] fp32 or None
    mean_ptr,  # [C] fp32
    var_ptr,  # [C] fp32
    coefficients_ptr,  # [2, C] fp32; None in eval
    dx_ptr,  # [R, L], written; or None
    dresidual_ptr,  # [R, L], written; or None
    rows,
    channels,
    units,
    line_blocks,
    eps,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    length = units * UNIT
    base, local, valid, channel, channel_valid = sweep_tile(
        rows, channels, length, line_blocks, CHANNELS_LAST, BLOCK_R, BLOCK_L
    )
    g = tl.load(dy_ptr + base + local, valid, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_L]
    if y_ptr is not None:
        g = relu_gradient(g, tl.load(y_ptr + base + local, valid, other=0.0).to(tl.float32))
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + base + local, g.to(dresidual_ptr.dtype.element_ty), valid)
    if dx_ptr is not None:
        scale = reciprocal_std(tl.load(var_ptr + channel, channel_valid, other=1.0), eps)
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + channel, channel_valid, other=0.0)
        dx = g
        if coefficients_ptr is not None:
            mean = tl.load(mean_ptr + channel, channel_valid, other=0.0)
            mean_g = tl.load(coefficients_ptr + channel, channel_valid, other=0.0)
            slope = tl.load(coefficients_ptr + channels + channel, channel_valid, other=0.0)
            x = tl.load(x_ptr + base + local, valid, other=0.0).to(tl.float32)
            x_centered = x - along_channels(mean, CHANNELS_LAST)
            dx = g - along_channels(mean_g, CHANNELS_LAST) - x_centered * along_channels(slope, CHANNELS_LAST)
        dx *= along_channels(scale, CHANNELS_LAST)
        tl.store(dx_ptr + base + local, dx.to(dx_ptr.dtype.element_ty), valid)
