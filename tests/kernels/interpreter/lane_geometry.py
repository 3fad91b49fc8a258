"""Offsets of tensors above 2^31 elements, computed by the shipped device functions for tensors that need not exist."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fastres.kernels.image import image, reduction, reduction_tiles, sweep, sweep_tile
from triton.runtime.interpreter import TensorHandle, interpreter_builder


@triton.jit
def sweep_kernel(out_ptr, rows, channels, length, line_blocks, CL: tl.constexpr, R: tl.constexpr, L: tl.constexpr):
    base, local, valid, channel, channel_valid = sweep_tile(rows, channels, length, line_blocks, CL, R, L)
    tl.store(out_ptr, base + tl.min(local))
    tl.store(out_ptr + 1, tl.max(tl.where(valid, base + local, -1)))
    tl.store(out_ptr + 2, tl.min(channel))


@triton.jit
def reduction_kernel(
    out_ptr, outer, channels, length, line_blocks, splits, CL: tl.constexpr, R: tl.constexpr, L: tl.constexpr
):
    base, step, iterations, local, in_line, rows_left, row_step, part, channel, channel_valid = reduction_tiles(
        outer, channels, length, line_blocks, splits, CL, R, L
    )
    rows = tl.arange(0, R) < rows_left - (iterations - 1) * row_step
    tl.store(out_ptr, base + tl.min(local))
    last = base + (iterations - 1) * step + local
    tl.store(out_ptr + 1, tl.max(tl.where(rows[:, None] & in_line[None, :], last, -1)))
    tl.store(out_ptr + 2, tl.min(channel))


@pytest.fixture
def run_one(monkeypatch):
    """Runs one program of a grid that is too large to be run: -> first offset, last valid offset, first channel."""

    def run(kernel, program, programs, *args):
        def scalar(value):
            return lambda axis: TensorHandle(np.array([value], dtype=np.int32), tl.int32)

        monkeypatch.setattr(interpreter_builder, "create_get_program_id", scalar(program))
        monkeypatch.setattr(interpreter_builder, "create_get_num_programs", scalar(programs))
        out = torch.full((3,), -7)
        kernel[(1,)](out, *args)
        return out.tolist()

    return run


BIG = [  # shape, channels_last: more than 2^31 elements, and more than 2^31 in one line
    ((5, 2**14, 2**8, 2**8), True),
    ((5, 2**14, 2**8, 2**8), False),
    ((2**25 + 3, 3, 7, 7), False),
    ((2**31 + 9, 5, 1, 1), False),
    ((3, 1, 2**16, 2**15 + 1), False),
    ((1, 3, 2**16, 2**16 + 3), True),
    ((1, 3, 2**16, 2**16 + 3), False),
    ((9, 2**28, 1, 1), True),
]


def planned(make, kernel, shape, channels_last):
    """The view of a tensor, its launch, the constants CHANNELS_LAST, BLOCK_R, BLOCK_L, and some of the programs."""
    view = image(torch.empty(shape, device="meta"), channels_last)
    plan = make(view, kernel, 0)
    n = plan.programs
    some = sorted({0, 1, n // 3, n // 2, n - 2, n - 1} & set(range(n)))
    return view, plan, [plan.constants[k] for k in ("CHANNELS_LAST", "BLOCK_R", "BLOCK_L")], some


@pytest.mark.parametrize("shape, channels_last", BIG, ids=str)
def test_row1_offsets_of_a_sweep(run_one, shape, channels_last):
    view, plan, (cl, r, ln), programs = planned(sweep, "bn_act_forward_kernel", shape, channels_last)
    for program in programs:
        tile = plan.programs - 1 - program
        row, column = tile // plan.line_blocks * r, tile % plan.line_blocks * ln
        args = (view.rows, view.channels, view.length, plan.line_blocks, cl, r, ln)
        first, last, channel = run_one(sweep_kernel, program, plan.programs, *args)
        assert first == row * view.length + column
        assert last == (min(row + r, view.rows) - 1) * view.length + min(column + ln, view.length) - 1
        assert channel == (column if cl else min(c % view.channels for c in range(row, row + r)))


@pytest.mark.parametrize("shape, channels_last", BIG, ids=str)
def test_row1_offsets_of_a_reduction(run_one, shape, channels_last):
    view, plan, (cl, r, ln), programs = planned(reduction, "bn_statistics_kernel", shape, channels_last)
    for program in programs:
        block, column = program // plan.line_blocks, program % plan.line_blocks * ln
        if cl:
            row, most, step = block * r, view.rows, plan.splits * r
            last_row = row + (view.rows - 1 - row) // step * step
        else:
            row_blocks = -(-view.channels // r)
            split, in_image = block // row_blocks, block % row_blocks * r
            last_image = split + (view.outer - 1 - split) // plan.splits * plan.splits
            row, last_row = split * view.channels + in_image, last_image * view.channels + in_image
            most = (last_image + 1) * view.channels
        args = (view.outer, view.channels, view.length, plan.line_blocks, plan.splits, cl, r, ln)
        first, last, channel = run_one(reduction_kernel, program, plan.programs, *args)
        assert first == row * view.length + column
        assert last == (min(last_row + r, most) - 1) * view.length + min(column + ln, view.length) - 1
        assert channel == (column if cl else in_image)


def test_row2_grids_of_one_axis_below_the_limit():
    shapes = [(2**17 + 1, 1, 1, 1), (2, 100_003, 1, 1), (2**17 + 1, 3, 1, 2), (1, 1, 2**16, 2**16), (2, 3, 2**15, 1)]
    for shape in shapes:
        for channels_last in (True, False):
            view = image(torch.empty(shape, device="meta"), channels_last)
            assert view.numel == torch.Size(shape).numel()
            for kernel in ("bn_statistics_kernel", "bn_act_backward_sums_kernel"):
                plan = reduction(view, kernel, 0)
                assert 0 < plan.programs < 2**31 and plan.parts <= plan.programs
            assert 0 < sweep(view, "bn_act_forward_kernel", 0).programs < 2**31
