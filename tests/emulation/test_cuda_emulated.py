"""What the lane `emulated` of test_native.py leaves open: every path through a tile, the order of threads, GPUs of
other sizes, running statistics, launch counts. The sources are the shipped CUDA kernels (emulation.py)."""

from __future__ import annotations

import itertools

import pytest
import torch

import emulation
from native_case import Case, Lane, check, same

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
# Tiles of whole rows; many tiles; planes that share a tile, and vectors; a plane in chunks; scalar planes and rows
SHAPES = [(9, 64, 8, 8), (3, 520, 5, 5), (6, 48, 7, 7), (5, 24, 14, 14), (3, 2, 64, 72), (4, 6, 3, 3), (7, 35, 6, 5)]


@pytest.fixture
def lane():
    return Lane("emulated")


def everything(case):
    y, mean, var = case.forward()
    return y, mean, var, *case.backward(y, mean, var)


@TYPES
@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_every_path(lane, shape, channels_last, dtype):
    check(Case(lane, shape, dtype, channels_last))
    check(Case(lane, shape, dtype, channels_last, training=False, offset=1))


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_order_of_threads_between_barriers_changes_no_bit(lane, shape, channels_last):
    """The fibers of a block run once upwards, once downwards: a barrier that is missing shows."""
    case = Case(lane, shape, torch.float16, channels_last)
    upwards = everything(case)
    try:
        emulation.library().set_backwards(1)
        assert same(upwards, everything(case))
    finally:
        emulation.library().set_backwards(0)


@LAYOUTS
@pytest.mark.parametrize("multiprocessors", [1, 2, 40])
def test_gpus_of_other_sizes(lane, multiprocessors, channels_last):
    lane.ops = emulation.kernels(multiprocessors)
    for shape in SHAPES:
        check(Case(lane, shape, torch.float16, channels_last))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_variance_of_16_bit_values_far_from_zero(lane, dtype, channels_last):
    """No shift is taken for them: their own spacing, at this distance, is coarser than fp32's by 2^13 or more."""
    case = Case(lane, (16, 24, 28, 28), dtype, channels_last, act="none", residual=False)
    spacing = torch.finfo(dtype).eps * 4096
    for std in (0.3 * spacing, 3 * spacing):
        case.x.copy_(4096 + std * torch.randn(case.shape))
        exact = case.x.double().var((0, 2, 3), unbiased=False)
        torch.testing.assert_close(case.forward()[2].double(), exact, rtol=2e-5, atol=0)  # measured: 1.0e-5


@LAYOUTS
def test_running_statistics_move_in_the_launch_that_merges(lane, channels_last):
    case = Case(lane, (5, 24, 7, 7), torch.float32, channels_last)
    running = torch.randn(24), torch.rand(24) + 0.5, torch.tensor(41)
    mean, var, count = (t.clone() for t in running)
    given = case.x, case.weight, case.bias, None, *running
    _, got_mean, got_var = lane.ops._bn_act_native(*given, True, 0.3, 1e-5, True, False)
    assert running[2] == count + 1
    n = case.x.numel() // 24
    torch.testing.assert_close(running[0], 0.7 * mean + 0.3 * got_mean)
    torch.testing.assert_close(running[1], 0.7 * var + 0.3 * got_var * n / (n - 1))


def test_eval_mode_keeps_copies_of_the_statistics(lane):
    case = Case(lane, (3, 24, 5, 5), torch.float32, True, training=False)
    _, mean, var = case.forward()
    assert torch.equal(mean, case.mean) and torch.equal(var, case.var)


@LAYOUTS
def test_launch_counts(lane, channels_last):
    library = emulation.library()
    library.take_launches()
    for training, act in itertools.product((True, False), ("relu", "none")):
        case = Case(lane, (4, 16, 8, 8), torch.float16, channels_last, training=training, act=act)
        statistics = case.run(case.x)
        assert library.take_launches() == (3 if training else 1)
        for needs in itertools.product((True, False), repeat=4):
            case.backward(*statistics, needs)
            dx, dweight, dbias, dresidual = needs
            sums = dweight or dbias or (training and dx)
            want = 2 * sums + (dx and (training or not sums)) + (dresidual and not sums and not dx and act == "relu")
            assert library.take_launches() == want, (training, act, needs)


def test_more_blocks_than_a_grid_has_are_refused_by_name(lane):
    kind, elements = emulation.ctypes.c_int(0), emulation.ctypes.c_int64(4096 * 2**31)
    message = "add_relu: the tensor needs 2147483648 blocks, a grid has at most 2147483647"
    with pytest.raises(RuntimeError, match=message):
        lane.ops._run("add_relu", kind, None, None, None, elements)
