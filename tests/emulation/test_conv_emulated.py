"""conv_act's sm_80 kernels, as they are shipped, on a machine without a GPU (conv_emulation.py) against conv2d.

Every tensor lies between bands of NaN, y holds NaN, and the emulator refuses each access that is unaligned or outside
of the tensors. Integers must be exact: sums of them are, and y is rounded once. What a tensor core makes of sums that
are not exact, its order and its rounding, only a GPU shows.
"""

from __future__ import annotations

import itertools
import math
import mmap
import random

import pytest
import torch

from conv_cases import EAGER, eager
from conv_emulation import bounded, conv_act, order, problem, refusal, tiles
from native_case import dense, edges_untouched
from referee import assert_as_good

NAMES = ("sm80_64x64", "sm80_128x128")
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
KERNELS = list(itertools.product(NAMES, TYPES))
BOUNDS = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0), "none": (-float("inf"), float("inf"))}
SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}
POINT, THREE = (1, 1, 0, 1), (3, 1, 1, 1)  # kernel, stride, padding, dilation of an axis
AXES = list(itertools.product(range(1, 8), (1, 2, 3), (0, 1, 2, 3), (1, 2)))


def one_tile(name, dtype):
    """A parameter; bf16's kernels are fp16's but for the type, and run with `full`."""
    return pytest.param((name, TYPES[dtype]), marks=[pytest.mark.full] * (dtype == "bf16"), id=f"{name}-{dtype}")


@pytest.fixture(params=[one_tile(*kernel) for kernel in KERNELS])
def tile(request):
    return tiles()[request.param]


def tf32(t):
    """To the nearest number with 10 bits after the point, halves away from zero; what is not finite stays."""
    rounded = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(t.isfinite(), rounded, t)


def bits(t):
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def geometry(n, c, k, size, axes):
    """Shapes of x and weight and the keywords of a call, for a y of `size`, or of the least size above it."""
    rows = [max((out - 1) * st + d * (ks - 1) + 1 - 2 * p, 1) for out, (ks, st, p, d) in zip(size, axes, strict=True)]
    kernel, *how = zip(*axes, strict=True)
    return (n, c, *rows), (k, c, *kernel), dict(zip(("stride", "padding", "dilation"), how, strict=True))


class Case:
    """A call's tensors: integers, whose sums fp16 and bf16 have to round, or draws from a normal distribution."""

    def __init__(self, tile, x, weight, how, bias=True, residual=True, integers=True):
        self.tile, self.how = tile, how
        self.out = (x[0], weight[0], *problem(x, weight, **how)[7:9])

        def draw(shape, most, std=1.0):
            values = torch.randint(-most, most + 1, shape).float() if integers else torch.randn(shape) * std
            values = tf32(values) if tile.dtype == torch.float32 else values
            return dense(shape, tile.dtype, channels_last=len(shape) == 4).copy_(values)

        self.x, self.weight = draw(x, 16), draw(weight, 8, (weight[1] * weight[2] * weight[3]) ** -0.5)
        self.bias = draw(weight[:1], 16) if bias else None
        self.residual = draw(self.out, 16) if residual else None

    def tensors(self, change=lambda t: t):
        return [None if t is None else change(t) for t in (self.x, self.weight, self.bias, self.residual)]

    def run(self, act="relu"):
        y, before = dense(self.out, self.tile.dtype, channels_last=True), self.tensors(torch.clone)
        conv_act(self.tile, *self.tensors(), y, **self.how, act=act)
        assert edges_untouched(y)
        for t, old in zip(self.tensors(), before, strict=True):
            assert t is None or (edges_untouched(t) and torch.equal(bits(t), bits(old)))
        return y

    def exact(self, act="relu"):
        return eager(*self.tensors(torch.Tensor.double), **self.how, act=act)

    def check_exact(self, act="relu"):
        got, want = self.run(act), self.exact(act).to(self.tile.dtype)
        assert torch.equal(got, want), (self.tile, self.x.shape, self.weight.shape, self.how, act)

    def check_random(self, act="relu"):
        magnitude = eager(*self.tensors(lambda t: t.double().abs()), **self.how, act="none")
        assert_as_good(
            self.run(act), eager(*self.tensors(), **self.how, act=act), self.exact(act), magnitude, f"{self.how}"
        )


# ---- forward ---------------------------------------------------------------------------------------------------------


def test_all_kernels_of_the_build_are_here():
    assert set(tiles()) == {(name, TYPES[dtype]) for name, dtype in KERNELS}
    for tile in tiles().values():
        assert tile.name == f"sm80_{tile.pixels}x{tile.channels}"
        assert tile.shared_bytes <= 99 << 10  # what sm_86 and sm_89 have for a block


def test_integers_are_exact_over_kernels_strides_paddings_and_dilations(tile):
    """Every combination on each axis, beside another one on the other axis; each on a third of the kernels."""
    others = random.Random(0).sample(AXES, len(AXES))
    for i, axes in enumerate(zip(AXES, others, strict=True)):
        if (i + tile.index) % 3 == 0:
            call = geometry(2, (8, 24, 40)[i % 3], (8, 72, 40)[i // 3 % 3], (3, 5), axes)
            Case(tile, *call, bias=i % 5 > 0, residual=i % 7 > 0).check_exact(list(BOUNDS)[i // 2 % 3])


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 15), (3, 43), (20, 13)], ids=str)
def test_integers_are_exact_where_tiles_end(tile, size):
    """From one pixel to several tiles of them, from one vector of channels to several tiles, and so with the depth."""
    one, step = 16 // tile.dtype.itemsize, tile.depth
    depths = (one, step - one, step, step + one, 5 * step)
    for i, k in enumerate((one, 64 - one, 64, 64 + one, 128, 200, 264 + one)):
        call = geometry(1 + i % 3, depths[i % 5], k, size, [POINT, POINT] if i % 2 else [THREE, THREE])
        Case(tile, *call, bias=i % 3 > 0, residual=i % 4 > 0).check_exact()


def test_pointwise_convolutions_as_one_line_of_pixels_and_not(tile):
    for n, size, stride, padding in [(3, (7, 9), 1, 0), (2, (9, 7), 2, 0), (2, (4, 6), 1, 1), (5, (1, 13), (1, 2), 0)]:
        how = {"stride": stride, "padding": padding, "dilation": 1}
        Case(tile, (n, 48, *size), (72, 48, 1, 1), how).check_exact()


def test_random_values_against_fp64(tile):
    epilogues = itertools.cycle(itertools.product((True, False), (True, False), BOUNDS))
    for (c, k), axis in itertools.product([(8, 136), (72, 40)], [THREE, (5, 2, 2, 2), POINT]):
        for bias, residual, act in itertools.islice(epilogues, 5):
            Case(tile, *geometry(2, c, k, (6, 7), [axis, axis]), bias, residual, integers=False).check_random(act)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounded", ["x", "weight"])
def test_tf32_is_rounded_to_the_nearest_on_sm_80(name, rounded):
    """Multiples of 2^-13 below 2, some of them halfway between two numbers of TF32, beside factors -1, 0 and 1."""
    case = Case(tiles()[name, torch.float32], *geometry(2, 40, 40, (6, 7), [THREE, THREE]))
    case.x.sign_()
    case.weight.sign_()
    fine = getattr(case, rounded)
    fine.copy_(torch.randint(-(1 << 14), 1 << 14, fine.shape) / 2**13)
    assert (tf32(fine) != fine).any()
    got = case.run("none")
    fine.copy_(tf32(fine))
    assert torch.equal(got, case.exact("none").float())


def test_row10_nan_and_infinity_as_eager(tile):
    for i, (value, act) in enumerate(itertools.product(SPECIAL.values(), BOUNDS)):
        case = Case(tile, *geometry(2, 40, 72, (5, 6), [(3, 1, 0, 1), THREE]))
        case.x[1, 24 + i, 2, 4] = value
        case.bias[i] = value  # on every lane of a vector
        case.residual[0, 16 + i, 1, 1] = value
        case.residual[1, 3, 2, 2] = SPECIAL["inf"]  # in the window of x's
        got, want = case.run(act), case.exact(act).to(tile.dtype)
        assert want.isfinite().any() and torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got[~got.isnan()], want[~want.isnan()]), (value, act)
    for value in SPECIAL.values():
        case = Case(tile, *geometry(1, 40, 72, (5, 6), [(3, 1, 0, 1), (2, 2, 0, 1)]))
        case.weight[70, 39, 1, 1] = value
        got, want = case.run("none"), case.exact("none").to(tile.dtype)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got[:, :70], want[:, :70])
        assert not got[:, 70].isfinite().any() and torch.equal(got[~got.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("name", NAMES)
def test_row12_sums_beyond_fp16_are_infinite_and_row10_what_vanishes_keeps_its_sign(name):
    case = Case(tiles()[name, torch.float16], *geometry(1, 40, 48, (4, 4), [POINT, POINT]), bias=False, residual=False)
    for x, weight in ((100.0, 100.0), (2.0**-24, 2.0**-10)):
        case.x.fill_(x)
        case.weight.copy_(case.weight.sign() * weight)
        case.weight[:2] = torch.tensor([weight, -weight]).view(2, 1, 1, 1)
        for act in BOUNDS:
            got, want = case.run(act), case.exact(act).half()
            assert torch.equal(bits(got), bits(want)), (x, act)
        assert torch.equal(got[0, :2, 0, 0].isinf(), torch.tensor([x > 1, x > 1])) and got[0, 1, 0, 0].signbit()


def test_row10_bounds_let_nan_and_the_sign_of_zero_pass():
    z = torch.tensor([*SPECIAL.values(), 0.0, -0.0, 1e-40, -1e-40, 3.0, -3.0, 6.0, 6.0000005, 1e30, -1e30])
    for act, (lower, upper) in BOUNDS.items():
        got, want = bounded(z, lower, upper), EAGER[act](z)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(bits(got)[1:], bits(want)[1:]), act


# ---- what no result of one run shows ---------------------------------------------------------------------------------


def test_neither_the_order_of_threads_nor_the_moment_of_copies_changes_a_bit(tile):
    """cp.async as late as the wait for it, and as early as itself: a wait or a barrier that is missing shows."""
    case = Case(tile, *geometry(1, 72, 136, (9, 15), [THREE, THREE]), integers=False)
    want = case.run()
    for backwards, at_once in ((True, False), (False, True), (True, True)):
        with order(backwards, at_once):
            assert torch.equal(bits(case.run()), bits(want)), (backwards, at_once)


def huge(shape, dtype):
    """A channels_last tensor of zeros, in memory that only those of its pages take that are written."""
    n, c, h, w = shape
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(n, h, w, c).permute(0, 3, 1, 2)


def test_the_last_pixels_of_tensors_just_below_2_gib(tile):
    """Pixels' offsets in x, residual and y: the last blocks of a launch alone, on the last rows of the last image."""
    c = 16 // tile.dtype.itemsize
    shape, how = (2047, c, 256, 256), {"stride": 1, "padding": 1, "dilation": 1}
    x, residual, y = (huge(shape, tile.dtype) for _ in range(3))
    small = Case(tile, (1, c, 256, 256), (c, c, 3, 3), how)
    x[-1], residual[-1] = small.x[0], small.residual[0]
    with order(last_blocks=2):
        conv_act(tile, x, small.weight, small.bias, residual, y, **how)
    want = small.exact().to(tile.dtype)[0].flatten(1)
    assert torch.equal(y[-1].flatten(1)[:, -2 * tile.pixels :], want[:, -2 * tile.pixels :])
    assert not y[-1].flatten(1)[:, : -2 * tile.pixels].any()


def test_the_last_channels_of_a_weight_just_below_2_gib(tile):
    c = 512
    k = (1 << 31) // (c * tile.dtype.itemsize) - 2 * tile.channels
    weight, how = huge((k, c, 1, 1), tile.dtype), {"stride": 1, "padding": 0, "dilation": 1}
    small = Case(tile, (1, c, 1, 3), (4 * tile.channels, c, 1, 1), how, residual=False, bias=False)
    weight[-small.weight.shape[0] :] = small.weight
    y = huge((1, k, 1, 3), tile.dtype)
    with order(last_blocks=4):
        conv_act(tile, small.x, weight, None, None, y, **how)
    last = 2 * tile.channels
    assert torch.equal(y[:, -last:], small.exact().to(tile.dtype)[:, -last:])


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(tile):
    one = 16 // tile.dtype.itemsize
    rows = (1 << 31) // (1 << 20)  # of 1 MiB
    assert refusal(tile, (1, one, 9, 9), (one, one, 3, 3)) == ""
    assert refusal(tile, (rows - 1, one, 256, 256), (one, one, 3, 3), padding=1) == ""
    assert refusal(tile, (1, one, 40, 40), (one, one, 32, 32)) == ""
    multiple, large = (
        f"must be a multiple of {one}, 16 bytes",
        "a tensor of 2147483648 bytes: must be smaller than 2 GiB",
    )
    taps = "a kernel of more than 32 taps along an axis"
    for x, weight, padding, message in (
        ((1, one + 1, 9, 9), (one, one + 1, 3, 3), 0, f"x has {one + 1} channels: {multiple}"),
        ((1, one, 9, 9), (one - 1, one, 3, 3), 0, f"y has {one - 1} channels: {multiple}"),
        ((rows, one, 256, 256), (one, one, 3, 3), 1, large),
        ((rows, one, 128, 128), (4 * one, one, 1, 1), 0, large),
        ((1, one, 40, 40), (one, one, 33, 1), 0, taps),
        ((1, one, 40, 40), (one, one, 1, 33), 0, taps),
    ):
        assert refusal(tile, x, weight, padding=padding) == message


def test_the_emulator_refuses_what_a_gpu_faults_on(tile):
    case = Case(tile, *geometry(1, 16, 16, (3, 3), [THREE, THREE]))
    case.x = dense(case.x.shape, tile.dtype, True, offset=1).copy_(case.x)
    with pytest.raises(RuntimeError, match="a load of 16 bytes is not aligned"):
        case.run()
