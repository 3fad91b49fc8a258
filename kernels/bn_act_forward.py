"""Forward kernels of bn_act: statistics, their merge, and the normalization. The formula is in bn_act.py."""

import triton
import triton.language as tl

from .element import reciprocal_std, relu
from .image import across_channels, along_channels, reduction_tiles, sweep_tile


@triton.jit(do_not_specialize=["outer", "channels", "units", "line_blocks", "splits", "parts"])
def bn_statistics_kernel(
    x_ptr,  # [R, L]
    scratch_ptr,  # written: means - first value [parts, C], m2 [parts, C], counts [parts]
    outer,
    channels,
    units,  # L / UNIT
    line_blocks,
    splits,
    parts,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Count, mean and M2 = sum (x - mean)^2 of each channel over one program's tiles.

    Each lane of the tile runs its own Welford recurrence, so the loop has no reduction and no barrier; the lanes are
    merged once, at the end. Everything is relative to the first value of the channel. Where |mean| >> std, fp32 cannot
    represent the running mean and the means of the parts closely enough, but it can represent their differences from a
    sample; and in a constant channel the differences, and with them the variance, are exactly 0. A first value far from
    the rest does no harm: it is one of the values, so it raises the variance as much as its distance costs in accuracy.
    """
    length = units * UNIT
    base, step, iterations, local, in_line, rows_left, row_step, part, channel, channel_valid = reduction_tiles(
        outer, channels, length, line_blocks, splits, CHANNELS_LAST, BLOCK_R, BLOCK_L
    )
    lane_r = tl.arange(0, BLOCK_R)
    if CHANNELS_LAST:
        count = tl.cdiv(tl.maximum(rows_left - lane_r, 0), row_step).to(tl.float32)  # [BLOCK_R]
        first = x_ptr + channel
        AXIS: tl.constexpr = 0
    else:
        count = tl.where(in_line, iterations, 0).to(tl.float32)  # [BLOCK_L]
        first = x_ptr + channel * length
        AXIS: tl.constexpr = 1
    shift = along_channels(tl.load(first, channel_valid, other=0.0).to(tl.float32), CHANNELS_LAST)

    mean = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
    m2 = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
    k = 0.0
    for _ in range(iterations):
        valid = (lane_r < rows_left)[:, None] & in_line[None, :]
        x = tl.load(x_ptr + base + local, valid, other=0.0).to(tl.float32) - shift
        k += 1.0
        delta = tl.where(valid, x - mean, 0.0)
        mean += delta * (1.0 / k)
        m2 += delta * (x - mean)
        base += step
        rows_left -= row_step

    # Chan's merge of all lanes at once; a lane without elements has count, mean and m2 of 0.
    n = tl.sum(count, 0)
    weight = across_channels(count, CHANNELS_LAST)
    part_mean = tl.sum(weight * mean, AXIS) / n  # [BLOCK_L] or [BLOCK_R]
    deviation = mean - along_channels(part_mean, CHANNELS_LAST)
    part_m2 = tl.sum(m2 + weight * deviation * deviation, AXIS)
    size = tl.cast(parts, tl.int64) * channels
    row = scratch_ptr + part.to(tl.int64) * channels
    tl.store(row + channel, part_mean, channel_valid)
    tl.store(row + size + channel, part_m2, channel_valid)
    # every channel of a part has the same count: the program with channel 0 writes it
    if tl.min(channel, 0) == 0:
        tl.store(scratch_ptr + 2 * size + part, n)


@triton.jit(do_not_specialize=["channel_stride", "parts", "channels", "n"])
def bn_statistics_merge_kernel(
    x_ptr,  # [R, L]; only the first value of each channel is read
    scratch_ptr,  # means - first value [parts, C], m2 [parts, C], counts [parts]
    mean_ptr,  # [C] fp32, written
    var_ptr,  # [C] fp32, written: biased
    channel_stride,  # of x
    parts,
    channels,
    n,  # elements per channel
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge all parts by Chan's formula, in a fixed order, in two passes over results in the L2 cache."""
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    lane = tl.arange(0, BLOCK_P)
    size = tl.cast(parts, tl.int64) * channels

    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + lane
        valid = (part < parts)[:, None] & (channel < channels)[None, :]
        row = part.to(tl.int64)[:, None] * channels + channel[None, :]  # [BLOCK_P, BLOCK_C]
        count = tl.load(scratch_ptr + 2 * size + part, part < parts, other=0.0)[:, None]
        part_mean = tl.load(scratch_ptr + row, valid, other=0.0)
        total += count * part_mean
    mean = tl.sum(total, 0) / n.to(tl.float32)  # [BLOCK_C], relative to the first value

    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + lane
        valid = (part < parts)[:, None] & (channel < channels)[None, :]
        row = part.to(tl.int64)[:, None] * channels + channel[None, :]
        count = tl.load(scratch_ptr + 2 * size + part, part < parts, other=0.0)[:, None]
        deviation = tl.load(scratch_ptr + row, valid, other=0.0) - mean[None, :]
        part_m2 = tl.load(scratch_ptr + size + row, valid, other=0.0)
        m2 += part_m2 + count * deviation * deviation  # count and m2 are 0 where not valid
    first = tl.load(x_ptr + channel * channel_stride, channel < channels, other=0.0).to(tl.float32)
    tl.store(mean_ptr + channel, first + mean, channel < channels)
    tl.store(var_ptr + channel, tl.sum(m2, 0) / n.to(tl.float32), channel < channels)


@triton.jit(do_not_specialize=["rows", "channels", "units", "line_blocks"])
def bn_act_forward_kernel(
    x_ptr,  # [R, L]
    weight_ptr,  # [C] fp32 or None
    bias_ptr,  # [C] fp32 or None
    mean_ptr,  # [C] fp32
    var_ptr,  # [C] fp32
    residual_ptr,  # [R, L] or None
    y_ptr,  # [R, L], written
    rows,
    channels,
    units,
    line_blocks,
    eps,
    RELU: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    length = units * UNIT
    base, local, valid, channel, channel_valid = sweep_tile(
        rows, channels, length, line_blocks, CHANNELS_LAST, BLOCK_R, BLOCK_L
    )
    mean = tl.load(mean_ptr + channel, channel_valid, other=0.0)
    scale = reciprocal_std(tl.load(var_ptr + channel, channel_valid, other=1.0), eps)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, channel_valid, other=0.0)
    x = tl.load(x_ptr + base + local, valid, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_L]
    # (x - mean) first: folding the mean into the bias would cancel where |mean| >> std
    z = (x - along_channels(mean, CHANNELS_LAST)) * along_channels(scale, CHANNELS_LAST)
    if bias_ptr is not None:
        z += along_channels(tl.load(bias_ptr + channel, channel_valid, other=0.0), CHANNELS_LAST)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + base + local, valid, other=0.0).to(tl.float32)
    if RELU:
        z = relu(z)
    tl.store(y_ptr + base + local, z.to(y_ptr.dtype.element_ty), valid)
