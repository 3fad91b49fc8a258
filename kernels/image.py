"""Image tensors as kernels see them: rows of contiguous lines, in either memory order.

                      rows R      line L    channel of an element       images in a row block
    channels_last     N*H*W       C         its place in the line       any
    NCHW              N*C         H*W       its row modulo C            any (element-wise), one (reductions)

So one kernel serves both orders: tiles are [BLOCK_R, BLOCK_L], coalesced along the line, per-channel vectors have the
shape [1, BLOCK_L] or [BLOCK_R, 1], and a reduction over a channel is one over axis 0 or axis 1. Several short planes
(7x7) share a tile; a long one is split into blocks.

A reduction gives every program a fixed set of tiles, strided over the whole tensor, so that all programs together sweep
memory from beginning to end: neighbors read adjacent pages, and the last tiles read are those that a second pass, which
runs backward, finds in the L2 cache.

Grids have one axis (y and z are limited to 65535). Offsets to a tile are int64, offsets within it int32
(configs.blocks).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import configs


@dataclass(frozen=True)
class Image:
    """A dense [N, C, H, W] tensor as rows of lines."""

    channels: int  # C
    outer: int  # the extent that a channel's elements repeat over: N*H*W rows (channels_last) or N images
    rows: int  # R
    length: int  # L
    channels_last: bool

    @property
    def numel(self) -> int:
        return self.rows * self.length

    @property
    def per_channel(self) -> int:
        return self.numel // self.channels  # n = N*H*W


def image(x: torch.Tensor, channels_last: bool) -> Image:
    n, c, h, w = x.shape
    plane = h * w
    # Where the two orders are the same memory, use the longer line: [N, C, 1, 1] has lines of C, and a single channel
    # has lines of H*W unless they are so short that rows of one element fill tiles better.
    if plane == 1:
        channels_last = True
    elif c == 1:
        channels_last = plane < 256
    if channels_last:
        return Image(c, n * plane, n * plane, c, True)
    return Image(c, n, n * c, plane, False)


@dataclass(frozen=True)
class Sweep:
    """An element-wise launch with one tile per program."""

    line_blocks: int
    programs: int
    constants: dict[str, int | bool]


def sweep(view: Image, kernel: str, arch: int) -> Sweep:
    config = configs.config(kernel, arch, configs.image_class(view.numel, view.length, view.channels_last))
    block_r, block_l = configs.blocks(config, None, view.length)
    line_blocks = triton.cdiv(view.length, block_l)
    return Sweep(line_blocks, triton.cdiv(view.rows, block_r) * line_blocks, _constants(view, config, block_r, block_l))


@dataclass(frozen=True)
class Reduction:
    """A launch that reduces every channel to `parts` partial results, one per program of that channel."""

    line_blocks: int
    splits: int  # programs that share the outer extent
    parts: int
    programs: int
    constants: dict[str, int | bool]


def reduction(view: Image, kernel: str, arch: int) -> Reduction:
    config = configs.config(kernel, arch, configs.image_class(view.numel, view.length, view.channels_last))
    block_r, block_l = configs.blocks(config, None if view.channels_last else view.channels, view.length)
    line_blocks = triton.cdiv(view.length, block_l)
    if view.channels_last:
        splits = _splits(config.programs, line_blocks, triton.cdiv(view.outer, block_r))
        parts, programs = splits, splits * line_blocks
    else:
        tiles = line_blocks * triton.cdiv(view.channels, block_r)  # of one image
        splits = _splits(config.programs, tiles, view.outer)
        parts, programs = splits * line_blocks, splits * tiles
    return Reduction(line_blocks, splits, parts, programs, _constants(view, config, block_r, block_l))


def _splits(programs: int, tiles: int, most: int) -> int:
    splits = programs // tiles
    if splits * tiles < 0.8 * programs:
        # several waves instead of one that leaves part of the GPU idle: the last is a smaller share of the work
        splits = triton.cdiv(4 * programs, tiles)
    return min(splits, most)


def _constants(view: Image, config: configs.Config, block_r: int, block_l: int) -> dict[str, int | bool]:
    return {
        "UNIT": configs.alignment_unit(view.length),
        "CHANNELS_LAST": view.channels_last,
        "BLOCK_R": block_r,
        "BLOCK_L": block_l,
        "num_warps": config.num_warps,
    }


# Per-channel values are loaded and computed as vectors of one axis, and only then laid along the tile: in the tile's
# own layout, each thread would load (and take the square root of) the same channel once per element it holds.


@triton.jit
def along_channels(vector, CHANNELS_LAST: tl.constexpr):
    """A per-channel vector to broadcast over the tile. [1, BLOCK_L] or [BLOCK_R, 1]"""
    return vector[None, :] if CHANNELS_LAST else vector[:, None]


@triton.jit
def across_channels(vector, CHANNELS_LAST: tl.constexpr):
    """The same for the other axis, which reductions sum over. [BLOCK_R, 1] or [1, BLOCK_L]"""
    return vector[:, None] if CHANNELS_LAST else vector[None, :]


@triton.jit
def sweep_tile(
    rows,  # R
    channels,  # C
    length,  # L, known to be a multiple of UNIT
    line_blocks,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Return base (int64), local and valid [BLOCK_R, BLOCK_L], channel [BLOCK_L] or [BLOCK_R], and its mask.

    The elements of the tile are at base + local. The first program gets the last tile, because it was read last.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (tile // line_blocks).to(tl.int64) * BLOCK_R
    column = (tile % line_blocks).to(tl.int64) * BLOCK_L
    lane_r = tl.arange(0, BLOCK_R)
    lane_l = tl.arange(0, BLOCK_L)
    in_line = lane_l < length - column
    valid = (lane_r < rows - row)[:, None] & in_line[None, :]
    local = lane_r[:, None] * length + lane_l[None, :]
    if CHANNELS_LAST:
        channel = column + lane_l
    else:
        channel = (((row % channels).to(tl.int32) + lane_r) % channels).to(tl.int64)
    return row * length + column, local, valid, channel, channel < channels


@triton.jit
def reduction_tiles(
    outer,
    channels,  # C
    length,  # L
    line_blocks,
    splits,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Return base, step (int64), iterations, local [BLOCK_R, BLOCK_L], in_line [BLOCK_L], rows_left (int64), row_step
    (int64), part, channel [BLOCK_L] or [BLOCK_R], and its mask.

    In iteration i the tile is at base + i * step + local, and its lanes are in_line & (row < rows_left - i * row_step):
    only rows of channels_last run out; the channels of a row block of NCHW are the same in each image.
    """
    program = tl.program_id(0)
    line_block = program % line_blocks
    column = line_block.to(tl.int64) * BLOCK_L
    lane_r = tl.arange(0, BLOCK_R)
    lane_l = tl.arange(0, BLOCK_L)
    local = lane_r[:, None] * length + lane_l[None, :]
    in_line = lane_l < length - column
    if CHANNELS_LAST:
        part = program // line_blocks
        row = part.to(tl.int64) * BLOCK_R
        row_step = tl.cast(splits, tl.int64) * BLOCK_R
        step = row_step * length
        rows_left = outer - row
        iterations = tl.cdiv(rows_left, row_step).to(tl.int32)
        channel = column + lane_l
    else:
        row_blocks = tl.cdiv(channels, BLOCK_R)
        row_block = (program // line_blocks) % row_blocks
        split = (program // line_blocks) // row_blocks
        part = split * line_blocks + line_block
        row = split.to(tl.int64) * channels + row_block * BLOCK_R
        row_step = tl.cast(0, tl.int64)
        step = tl.cast(splits, tl.int64) * channels * length
        rows_left = (channels - row_block * BLOCK_R).to(tl.int64)
        iterations = tl.cdiv(outer - split, splits)
        channel = (row_block * BLOCK_R + lane_r).to(tl.int64)
    base = row * length + column
    return base, step, iterations, local, in_line, rows_left, row_step, part, channel, channel < channels
