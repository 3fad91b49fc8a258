"""Offsets of tensors above 2^31 elements, computed by the shipped device functions for tensors that need not exist."""

import pytest
import torch
import triton
import triton.language as tl

from fastres.kernels import configs
from fastres.kernels.image import image, reduction, reduction_tiles, sweep, sweep_tile


@triton.jit
def sweep_kernel(out_ptr, rows, channels, length, line_blocks, CL: tl.constexpr, R: tl.constexpr, L: tl.constexpr):
    base, local, valid, channel, channel_valid = sweep_tile(rows, channels, length, line_blocks, CL, R, L)
    tl.store(out_ptr + 2 * tl.program_id(0), base + tl.min(local))
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, tl.max(tl.where(valid, base + local, -1)))


@triton.jit
def reduction_kernel(
    out_ptr, outer, channels, length, line_blocks, splits, CL: tl.constexpr, R: tl.constexpr, L: tl.constexpr
):
    base, step, iterations, local, in_line, rows_left, row_step, part, channel, channel_valid = reduction_tiles(
        outer, channels, length, line_blocks, splits, CL, R, L
    )
    last = base + (iterations - 1) * step
    rows = tl.arange(0, R) < rows_left - (iterations - 1) * row_step
    valid = rows[:, None] & in_line[None, :]
    tl.store(out_ptr + 2 * tl.program_id(0), base)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, tl.max(tl.where(valid, last + local, -1)))


BIG = [
    ((5, 2**14, 2**8, 2**8), True),  # 5 * 2^30 elements
    ((5, 2**14, 2**8, 2**8), False),
    ((3, 1, 2**15, 2**15 + 1), False),
    ((1, 1, 2**16, 2**16 + 3), True),
    ((1, 2**14 + 1, 2**9, 2**9), True),
]


@pytest.mark.parametrize("shape, channels_last", BIG)
def test_row1_offsets_above_two_to_the_31(monkeypatch, shape, channels_last):
    numel = torch.Size(shape).numel()
    # so few and so wide tiles that the interpreter can visit all of them
    big = configs.Config(tile=2**18, num_warps=4, line=2**16, programs=48)
    monkeypatch.setattr(configs, "config", lambda *_: big)
    monkeypatch.setattr(configs, "image_class", lambda *_: "rows")
    view = image(torch.empty(shape, device="meta"), channels_last)
    assert view.numel == numel
    plan = reduction(view, "bn_statistics_kernel", 0)
    blocks = [plan.constants[k] for k in ("CHANNELS_LAST", "BLOCK_R", "BLOCK_L")]
    if plan.programs <= 600:
        out = torch.full((plan.programs, 2), -7)
        args = (view.outer, view.channels, view.length, plan.line_blocks, plan.splits, *blocks)
        reduction_kernel[(plan.programs,)](out, *args)
        assert out[:, 0].min() == 0 and out[:, 1].max() == numel - 1 and (out >= 0).all() and (out < numel).all()


@pytest.mark.parametrize("block_r", (1, 2))
@pytest.mark.parametrize("channels_last", (True, False))
def test_row1_sweep_offsets_above_two_to_the_31(channels_last, block_r):
    rows, length, block_l = 7, 2**30 - 24, 16  # one block at each end of every row
    out = torch.full((7, 2), -7)
    sweep_kernel[(7,)](out, rows, 3, length, 1, channels_last, block_r, block_l)
    first = torch.arange(6, -1, -1) * block_r * length  # the first program has the last tile
    assert torch.equal(out[:, 0], first)
    inside = first < rows * length
    last_row = torch.minimum(torch.arange(6, -1, -1) * block_r + block_r, torch.tensor(rows)) - 1
    assert torch.equal(out[inside, 1], (last_row * length + block_l - 1)[inside])


def test_row2_grids_of_one_axis_below_the_limit():
    for shape in ((2**17 + 1, 1, 1, 1), (2, 100_003, 1, 1), (2**17 + 1, 3, 1, 2), (1, 1, 2**16, 2**16), (2, 3, 2**15, 1)):
        for channels_last in (True, False):
            view = image(torch.empty(shape, device="meta"), channels_last)
            assert view.numel == torch.Size(shape).numel()
            for kernel in ("bn_statistics_kernel", "bn_act_backward_sums_kernel"):
                plan = reduction(view, kernel, 0)
                assert 0 < plan.programs < 2**31 and plan.parts <= plan.programs
            assert 0 < sweep(view, "bn_act_forward_kernel", 0).programs < 2**31
