"""conv_act's kernels for sm_90a, the shipped sources and CUTLASS down to single instructions, on an emulated GPU
(emulation90.py): exact against conv2d in fp64 on integers, in every order of threads, blocks and copies.

The emulator knows what a GPU would do with these instructions by NVIDIA's documents alone. It makes copies and products
at a random time between what asks for them and what waits for them, and refuses shared memory that was never a barrier,
stores without a fence, wgmma without one, and copies that a tensor map cannot describe.
"""

from __future__ import annotations

import random

import pytest
import torch

import emulation90
from conv_cases import eager
from conv_emulation import problem

STREAM_K = "half, sm90_128x128_streamk"
LABELS = ("half, sm90_128x256_cluster2", STREAM_K, "float, sm90_128x64_pingpong")
KINDS = ("128x256_cluster2", "256x128", "128x128_pingpong", "128x64_pingpong", "64x128_pingpong", "128x128_streamk")
SHIPPED = [f"{dtype}, sm90_{kind}" for kind in KINDS for dtype in ("half", "bfloat16", "float")]
SHIPPED = [one for one in SHIPPED if not (one.startswith("float") and one.split("_", 1)[1] in KINDS[:2] + KINDS[4:5])]
TILES = pytest.mark.parametrize("label", LABELS)
pytestmark = pytest.mark.xdist_group("emulated90")  # one worker: the library's build takes gigabytes

# n, h, w, c, k, kernel, stride, padding, dilation, bias, residual, act, multiprocessors
CASES = {
    "3x3": (2, 9, 11, 72, 72, (3, 3), 1, 1, 1, True, True, "relu", 2),
    "1x1 as a line": (3, 7, 9, 136, 200, (1, 1), 1, 0, 1, False, False, "relu6", 3),
    "1x1 in steps of 2": (3, 9, 7, 40, 72, (1, 1), 2, 0, 1, True, False, "none", 2),
    "1x1 with a border": (1, 5, 6, 64, 64, (1, 1), 1, (1, 2), 1, True, True, "none", 2),
    "7x7": (2, 21, 17, 8, 64, (7, 7), 2, 3, 1, True, False, "relu", 4),
    "5x5": (1, 10, 12, 24, 264, (5, 5), 1, 2, 1, False, True, "relu6", 3),
    "3x5, uneven": (2, 13, 17, 72, 136, (3, 5), (2, 1), (1, 3), (1, 2), True, True, "relu6", 3),
    "5x1, uneven": (2, 11, 6, 16, 24, (5, 1), (1, 2), (0, 1), (2, 1), True, False, "relu", 2),
    "3x3 dilated": (2, 12, 10, 128, 64, (3, 3), 2, 2, 2, False, True, "none", 2),
    "3x3 inside": (1, 8, 15, 64, 8, (3, 3), 1, 0, 1, False, False, "none", 2),
    "one pixel": (1, 3, 3, 8, 8, (3, 3), 1, 0, 1, True, True, "relu", 2),
    "more blocks than tiles": (1, 6, 5, 200, 72, (3, 3), 1, 1, 1, True, True, "relu", 9),
    "many tiles a block": (3, 19, 18, 16, 328, (3, 3), 1, 1, 1, True, True, "relu", 2),
    "few tiles, deep": (2, 7, 7, 200, 136, (3, 3), 1, 1, 1, True, True, "relu", 8),
}


def tile_of(label, everything=False):
    return emulation90.tiles(everything)[f"conv_act<{label}>"]


def integers(generator, dtype, *shape, most=3):
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def normal(generator, dtype, *shape):
    return torch.randn(shape, generator=generator).to(dtype)


def exact_of(*tensors_and_act, **how):
    *tensors, act = tensors_and_act
    return eager(*(None if t is None else t.double() for t in tensors), act=act, **how)


def operands(dtype, case, seed, make=integers):
    n, h, w, c, k, kernel, stride, padding, dilation, bias, residual, act, multiprocessors = case
    g = torch.Generator().manual_seed(seed)
    x, weight = make(g, dtype, n, c, h, w), make(g, dtype, k, c, *kernel)
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    size = problem(x.shape, weight.shape, **how)[7:9]
    bias = make(g, dtype, k) if bias else None
    residual = make(g, dtype, n, k, *size) if residual else None
    return (x, weight, bias, residual, act), how, multiprocessors


def check(tile, case, seed):
    given, how, multiprocessors = operands(tile.dtype, case, seed)
    y = tile.run(*given, **how, multiprocessors=multiprocessors, seed=seed)
    exact = exact_of(*given, **how)
    assert exact.abs().max() < 2**24  # what fp32 adds up without rounding
    wrong = y.double() != exact.to(tile.dtype).double()
    assert not wrong.any(), f"{int(wrong.sum())} of {y.numel()}, the first at {wrong.nonzero()[0].tolist()}"


@TILES
@pytest.mark.parametrize("case", CASES)
def test_is_conv2d(label, case):
    tile = tile_of(label)
    check(tile, CASES[case], seed=list(CASES).index(case))
    assert tile.counted("launches") == 1 and tile.counted("im2col loads") > 0
    assert (tile.counted("copies to several blocks") > 0) == (tile.cluster > 1)


def test_every_block_and_tile_has_its_turn():
    """The persistent loop, and the blocks that find nothing to do."""
    for label in LABELS:
        tile = tile_of(label)
        n, h, w, _, k, *_, multiprocessors = CASES["many tiles a block"]
        tiles = -(-n * h * w // tile.rows) * -(-k // tile.columns)
        assert n * h * w % tile.rows and k % tile.columns and tiles > 2 * multiprocessors / tile.cluster, label


@TILES
def test_no_order_changes_a_bit(label):
    """Threads, blocks, copies and products in other orders. The taps cancel, so that nothing but the rounding of fp32
    is left of y: another order of a sum is another y. With stream-K four blocks and more add up a tile in memory."""
    tile = tile_of(label)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 200, 1, 1, generator=g).to(tile.dtype).expand(-1, -1, 9, 9)
    weight = torch.randn(136, 200, 9, generator=g).to(tile.dtype)
    weight[:, :, 4] = 0
    weight[:, :, 5:] = -weight[:, :, :4].flip(2)
    weight = weight.view(136, 200, 3, 3)
    first = tile.run(x, weight, None, None, multiprocessors=13, seed=0)
    assert (tile.counted("additions to memory") > 0) == tile.splits_depth
    magnitude = exact_of(x.abs(), weight.abs(), None, None, "none")
    assert 0 < first.abs().max() < 2**-24 * 1800 * magnitude.max()
    for seed in range(1, 5 if tile.splits_depth else 3):
        assert torch.equal(first, tile.run(x, weight, None, None, multiprocessors=13, seed=seed)), seed


@TILES
def test_rounds_as_it_may(label):
    tile = tile_of(label)
    given, how, multiprocessors = operands(tile.dtype, CASES["3x5, uneven"], 1, normal)
    y = tile.run(*given, **how, multiprocessors=multiprocessors)
    x, weight, bias, residual, _ = given
    magnitude = exact_of(x.abs(), weight.abs(), bias.abs(), residual.abs(), "none", **how)
    # TF32 rounds both factors, to 11 bits; every addition in fp32 rounds to 24.
    rounding = 2**-10 if tile.dtype == torch.float32 else weight[0].numel() * 2**-24
    exact = exact_of(*given, **how)
    bound = rounding * magnitude + torch.finfo(tile.dtype).eps * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("multiprocessors", "parts"), [(2, 0), (3, 0), (5, 6), (6, 8), (8, 12), (13, 12)])
def test_stream_k_with_any_number_of_blocks(multiprocessors, parts):
    """Two tiles, whole or in parts, which begin in the middle of a tap's channels; more blocks than there are parts."""
    tile = tile_of(STREAM_K)
    check(tile, (*CASES["few tiles, deep"][:-1], multiprocessors), seed=multiprocessors)
    assert tile.counted("additions to a flag") == parts  # by both warpgroups of a block


@TILES
@pytest.mark.parametrize("act", ["none", "relu6"])
def test_nan_and_infinity_pass(label, act):
    tile = tile_of(label)
    (x, weight, bias, residual, _), how, multiprocessors = operands(tile.dtype, CASES["3x3"], 5)
    x[0, 3, 4, 5] = float("nan")
    bias[7] = float("nan")
    residual[1, 9, 2, 2] = float("nan")
    residual[1, 9, 2, 3], residual[1, 10, 2, 3] = float("inf"), -float("inf")
    y = tile.run(x, weight, bias, residual, act, **how, multiprocessors=multiprocessors)
    exact = exact_of(x, weight, bias, residual, act, **how)
    assert torch.equal(y.isnan(), exact.isnan()) and exact.isnan().sum() > 9 * 72
    assert torch.equal(y.nan_to_num(-1), exact.to(tile.dtype).nan_to_num(-1))


# ---- Every kernel that is shipped.


@pytest.mark.full
def test_all_that_is_shipped_is_here():
    assert sorted(emulation90.tiles(everything=True)) == sorted(f"conv_act<{label}>" for label in SHIPPED)


def random_case(draw):
    """A convolution that no one picked: channels, sizes, kernels, steps and borders at random."""
    while True:
        h, w, kernel = draw.randint(1, 20), draw.randint(1, 20), (draw.choice([1, 2, 3, 5, 7]), draw.choice([1, 3, 4]))
        stride, dilation = [(draw.randint(1, most), draw.randint(1, most)) for most in (3, 2)]
        padding = draw.randint(0, 3), draw.randint(0, 3)
        reach = [1 + (k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        if h + 2 * padding[0] >= reach[0] and w + 2 * padding[1] >= reach[1]:
            break
    c, k = 8 * draw.randint(1, 18), 8 * draw.randint(1, 36)
    flags = draw.random() < 0.5, draw.random() < 0.5, draw.choice(["none", "relu", "relu6"])
    return draw.randint(1, 3), h, w, c, k, kernel, stride, padding, dilation, *flags, draw.randint(2, 9)


@pytest.mark.full
@pytest.mark.parametrize("label", SHIPPED)
def test_every_shipped_kernel_is_conv2d(label):
    tile = tile_of(label, everything=True)
    for seed, case in enumerate([*CASES.values(), *(random_case(random.Random(seed)) for seed in range(15))]):
        check(tile, case, 100 + seed)
