"""The convolutions for sm_90a up to the instruction, without a GPU: the shipped code says what it hands to the copy
engine (native/conv_launch.cpp), and a model of the engine and the driver's rules (hopper.py) what comes of it.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import hopper
from hopper import Conv, fetch, illegal

pytestmark = pytest.mark.xdist_group("conv_launch")  # the library is compiled once

CHANNELS = ((8, 136), (24, 72), (72, 24), (136, 8), (64, 64), (40, 264))
GEOMETRIES = [
    ((r, s), stride, padding, dilation)
    for (r, s), stride, padding, dilation in itertools.product(
        [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (1, 7), (3, 2)],
        [(1, 1), (2, 2), (1, 2)],
        [(0, 0), (1, 1), (2, 2), (3, 3), (0, 3), (2, 1)],
        [(1, 1), (2, 2), (2, 1)],
    )
    if (dilation == (1, 1) or max(r, s) > 1) and (max(r, s) < 5 or stride != (1, 2))
]
MULTIPROCESSORS = 132


def geometries():
    """One tile per geometry of convolution, in turn, and one number of channels."""
    for i, ((r, s), stride, padding, dilation) in enumerate(GEOMETRIES):
        c, k = CHANNELS[i % len(CHANNELS)]
        yield i, Conv(1 + i % 3, 9 + i % 5, 8 + i % 7, c, k, r, s, stride, padding, dilation)


def distinct():
    """One of the tiles with the same places and coordinates: bf16 is fp16 but for the type."""
    return [tile for tile in hopper.tiles() if tile.type != 1]


def integers(*shape):
    return torch.randint(-4, 5, shape)


def product(tile, conv, x, weight):
    """y [pixels, k] as the tile forms it: each block's pieces of work, from what the model fetches for them."""
    launch = tile.launch(conv)
    y = torch.full((conv.pixels + tile.rows, conv.k + tile.columns), torch.nan, dtype=torch.float64)
    sums, fetched = {}, {}
    memory = {launch.x: x.flatten(), launch.weight: weight.flatten()}

    def lines(copy, d):
        key = d.im2col, copy.coordinates, copy.offsets
        if key not in fetched:
            fetched[key] = fetch(d, memory[d], copy).double()
        return fetched[key]

    for work in tile.work():
        total = sums.setdefault((work.row_tile, work.column_tile), torch.zeros(tile.rows, tile.columns).double())
        ranks = range(tile.cluster)
        copies = [tile.load(work.row_tile, work.column_tile, work.step, work.steps, rank) for rank in ranks]
        own = copies[work.row_tile % tile.cluster]
        for step in range(work.steps):
            a = lines(own[2 * step], launch.x)
            b = torch.cat([lines(copies[rank][2 * step + 1], launch.weight) for rank in ranks])
            total += a @ b.T
        if work.last:
            rows, columns = work.row_tile * tile.rows, work.column_tile * tile.columns
            if rows < conv.pixels:
                y[rows : rows + tile.rows, columns : columns + tile.columns] = total
    assert not y[: conv.pixels, : conv.k].isnan().any()
    assert (y[conv.pixels :].nan_to_num() == 0).all(), "pixels beyond the last image must come as zeros"
    return y[: conv.pixels, : conv.k]


def expected(conv, x, weight):
    y = F.conv2d(
        x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double(),
        stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
    )  # fmt: skip
    return y.permute(0, 2, 3, 1).reshape(conv.pixels, conv.k)


# ---- the library


def test_every_shipped_tile_is_here():
    text = "".join(path.read_text() for path in hopper.SHIPPED)
    assert len(hopper.tiles()) == len(re.findall(r"list_conv_sm90<", text)) == 15
    included = re.findall(r'#include "cuda/(conv_sm90_\w+\.cu)"', hopper.SOURCE.read_text())
    assert included == [path.name for path in hopper.SHIPPED]


def test_the_model_of_the_engine_on_a_worked_example():
    """3x3, padding 1, over two images of 3x4: the column starts at the upper left and goes on into the next image."""
    x = torch.arange(2 * 3 * 4 * 8)
    d = hopper.Descriptor(
        True, 1, 1 << 20, (8, 4, 3, 2), (16, 64, 192), (64, 16), (1, 1, 1, 1), (-1, -1), (-1, -1), 0, 3, 0, 0
    )
    assert not illegal(d)
    first = fetch(d, x, hopper.Copy(0, 0, 0, (0, -1, -1, 0, 0), (0, 0), 0))
    assert first.shape == (16, 64) and (first[:, 8:] == 0).all()
    rows = first[:, 0].tolist()
    assert rows[:4] == [0, 0, 0, 0] and rows[4:8] == [0, 0, 8, 16] and rows[8:12] == [0, 32, 40, 48]
    assert rows[12:] == [0, 0, 0, 0]  # the next image's first row
    last = fetch(d, x, hopper.Copy(0, 0, 0, (0, 2, 1, 1, 0), (1, 1), 0))[:, 0].tolist()
    assert last == [(12 + 11) * 8] + [0] * 15  # the last pixel's middle tap; then there is no image


# ---- what the copies bring


@pytest.mark.parametrize("number", range(9))
def test_tiles_of_x_and_the_weight_multiply_to_the_convolution(number):
    torch.manual_seed(number)
    tile = distinct()[number]
    checked = 0
    for i, conv in geometries():
        if i % 9 != number or conv.p < 1 or conv.q < 1:
            continue
        assert tile.refusal(conv) == ""
        x, weight = integers(conv.n, conv.h, conv.w, conv.c), integers(conv.k, conv.r, conv.s, conv.c)
        assert torch.equal(product(tile, conv, x, weight), expected(conv, x, weight)), (tile.name, conv)
        checked += 1
    assert checked > 10


@pytest.mark.parametrize("number", range(9))
def test_large_coordinates(number):
    """Places in images of up to 2^31 pixels, against plain division; nothing is allocated."""
    tile, rng = distinct()[number], random.Random(number)
    for conv in LARGE:
        assert tile.refusal(conv) == "" and conv.pixels < 2**31
        tile.launch(conv)
        depth_steps = -(-conv.c // tile.depth)
        row_tiles, column_tiles = -(-conv.pixels // tile.rows), -(-conv.k // tile.columns)
        for row_tile in (0, row_tiles - 1, *(rng.randrange(row_tiles) for _ in range(20))):
            column_tile, rank = rng.randrange(column_tiles), row_tile % tile.cluster
            step = rng.randrange(depth_steps * conv.r * conv.s)
            x, weight = tile.load(row_tile, column_tile, step, 1, rank)
            rest, channel = divmod(step, depth_steps)
            r, s = divmod(rest, conv.s)
            line, first = conv.pointwise, row_tile * tile.rows
            n, p, q = (0, 0, first) if line else (first // conv.q // conv.p, first // conv.q % conv.p, first % conv.q)
            w, h = q * conv.stride[1] - conv.padding[1], p * conv.stride[0] - conv.padding[0]
            assert x.coordinates == (channel * tile.depth, w, h, n, 0), (conv, row_tile)
            assert x.offsets == (s * conv.dilation[1], r * conv.dilation[0])
            k = column_tile * tile.columns + rank * tile.columns // tile.cluster
            assert weight.coordinates == (channel * tile.depth, k, s, r, 0)


LARGE = [
    Conv(1, 32768, 65535, 8, 8),
    Conv(2**16, 181, 181, 16, 8),
    Conv(7, 17489, 17491, 8, 24, 3, 3, (1, 1), (1, 1)),
    Conv(2**21 - 1, 31, 33, 8, 64, 3, 3, (1, 1), (1, 1)),
    Conv(63, 5800, 5803, 8, 8, 7, 7, (2, 2), (3, 3)),
    Conv(1, 1, 2**31 - 2**10, 8, 8, 3, 3, (3, 1), (1, 1)),
    Conv(2**31 - 1, 1, 1, 8, 8, 3, 3, (1, 1), (1, 1)),
    Conv(3, 8, 9, 2**24, 2**24, 3, 5, (2, 1), (4, 7), (3, 2)),
]


# ---- shared memory


@pytest.mark.parametrize("number", range(9))
def test_the_products_look_where_the_copies_write(number):
    """The engine swizzles by address: bits 7 to 9 onto bits 4 to 6. The products' layout must say the same."""
    tile = distinct()[number]
    launch = tile.launch(Conv(2, 9, 11, 72, 136, 3, 3, (1, 1), (1, 1)))
    assert launch.x.swizzle == launch.weight.swizzle == 3 and launch.x.box[0] * tile.size == 128
    for places, start, lines in zip(tile.places(), (tile.x, tile.weight), (tile.rows, tile.columns), strict=True):
        stage, line, channel = (torch.arange(n) for n in (tile.stages, lines, tile.depth))
        address = (start + (stage * lines)[:, None, None] * 128 + line[:, None] * 128 + channel * tile.size).long()
        swizzled = address ^ (address >> 7 & 7) << 4
        assert torch.equal(start + places, swizzled)
        assert start % 1024 == 0  # or the products' descriptors would have to say by how much not
    assert tile.weight == tile.x + tile.stages * tile.rows * 128
    assert tile.weight + tile.stages * tile.columns * 128 <= tile.shared_bytes <= 227 * 1024


@pytest.mark.parametrize("number", range(9))
def test_each_step_fills_one_stage_and_its_bytes_are_what_the_block_waits_for(number):
    tile = distinct()[number]
    conv = Conv(2, 9, 11, 72, 136, 3, 3, (1, 1), (1, 1))
    launch = tile.launch(conv)
    steps = 9 * -(-72 // tile.depth)
    assert steps > 2 * tile.stages
    share = tile.columns * 128 // tile.cluster
    assert launch.step_bytes == tile.step_bytes == launch.x.bytes + launch.weight.bytes * tile.cluster
    assert (launch.x.bytes, launch.weight.bytes) == (tile.rows * 128, share)
    for rank in range(tile.cluster):
        copies = tile.load(rank, 0, 0, steps, rank)
        for i in range(steps):
            x, weight = copies[2 * i : 2 * i + 2]
            stage = i % tile.stages
            assert x.shared == tile.x + stage * tile.rows * 128
            assert weight.shared == tile.weight + stage * tile.columns * 128 + rank * share
            assert x.barrier == weight.barrier == copies[0].barrier + 8 * stage
            assert (x.multicast, weight.multicast) == (0, 0 if tile.cluster == 1 else 2**tile.cluster - 1)
            assert (x.descriptor, weight.descriptor) == (0, 1)


# ---- descriptors


def types(tile):
    """CUtensorMapDataType of the operands and of y: bits, but TF32, which the engine rounds fp32 to."""
    return {0: (11, 7), 1: (1, 9), 2: (1, 6)}[tile.type]


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_descriptors_cover_their_tensors(residual):
    for tile, (_, conv) in itertools.product(hopper.tiles(), list(geometries())[::23]):
        if conv.p < 1 or conv.q < 1:
            continue
        launch, size = tile.launch(conv, residual, bias=residual), tile.size
        x, weight, y = launch.x, launch.weight, launch.y
        n, h, w = (1, 1, conv.pixels) if conv.pointwise else (conv.n, conv.h, conv.w)
        operand, result = types(tile)
        assert (x.im2col, x.type, x.address, x.box) == (True, operand, 1 << 44, (tile.depth, tile.rows))
        assert x.dims == (conv.c, w, h, n) and x.strides == tuple(
            v * size for v in (conv.c, w * conv.c, h * w * conv.c)
        )
        taps = conv.r * conv.s * conv.c
        assert (weight.im2col, weight.type, weight.address) == (False, operand, 2 << 44)
        assert weight.dims == (conv.c, conv.k, conv.s, conv.r)
        assert weight.strides == tuple(v * size for v in (taps, conv.c, conv.s * conv.c))
        assert weight.box == (tile.depth, tile.columns // tile.cluster, 1, 1)
        assert (y.im2col, y.type, y.address) == (False, result, 5 << 44)
        assert y.dims == (conv.k, conv.pixels, 1) and y.strides == (conv.k * size, 0)
        assert tile.rows % y.box[1] == 0 and tile.columns % y.box[0] == 0
        source = launch.residual  # in y's place where there is none, and not read
        assert (source.address, launch.reads_residual) == ((4 << 44, True) if residual else (5 << 44, False))
        assert (source.dims, source.strides, source.type, source.box) == (y.dims, y.strides, y.type, y.box)
        assert launch.residual_bytes == source.bytes
        for d in (x, weight, source, y):
            assert illegal(d) == [], (tile.name, conv)


def refused_by_rule(conv, size):
    """Why the driver or a kernel's 32-bit numbers do not take a convolution, said without looking at its code."""
    n, h, w = (1, 1, conv.pixels) if conv.pointwise else (conv.n, conv.h, conv.w)
    corners, reach = (), []
    for taps, padding, dilation in zip((conv.r, conv.s), conv.padding, conv.dilation, strict=True):
        reach.append((taps - 1) * dilation)
        corners += (-padding, padding - reach[-1])
    rules = {
        "channels": conv.c * size % 16 or conv.k * size % 16,
        "empty": min(n, h, w, conv.c, conv.k, conv.r, conv.s, conv.p, conv.q) < 1,
        "stride": max(conv.stride) > 8,
        "corner": not conv.pointwise and not all(-128 <= v <= 127 for v in corners),
        "offset": max(reach) > 255,
        "sizes": max(conv.pixels, n * h * w, conv.k, conv.c * conv.r * conv.s, *conv.dilation) >= 2**31,
        "bytes": max(h * w * conv.c, conv.pixels * conv.k) * size >= 2**40,
    }
    return [name for name, broken in rules.items() if broken]


def stricter(conv):
    """Legal, but at the very edge, where the kernels refuse all the same: CUTLASS does, or the rule is simpler."""
    reach = [(taps - 1) * dilation for taps, dilation in zip((conv.r, conv.s), conv.dilation, strict=True)]
    return 255 in reach or 128 in conv.padding or 128 in [a - b for a, b in zip(reach, conv.padding, strict=True)]


def random_conv(rng):
    """Around every limit, with a y that has pixels, in tensors that 64 bits can count."""

    def near(*limits):
        return max(1, rng.choice(limits) + rng.choice((-1, 0, 0, 1)))

    while True:
        r, s = (rng.choice((1, 1, 2, 3, 7, 32, 128, 255, 256, 257)) for _ in range(2))
        big = [1] * 5
        if rng.random() < 0.5:
            big[rng.randrange(5)] = near(2**8, 2**16, 2**31, 2**32, 2**33)
        dilation = tuple(rng.choice((1, 1, 2, 64, 127, 128, 255, 2**31, 2**32)) for _ in range(2))
        n, h, w = rng.choice((1, 2, 2**10)), rng.choice((1, 7, 224, 2**12)), rng.choice((1, 7, 224, 300))
        c, k = rng.choice((0, 4, 8, 8, 12, 64, 2048)), rng.choice((4, 8, 8, 12, 64, 2048))
        stride = tuple(rng.choice((1, 1, 2, 7, 8, 9, 2**32)) for _ in range(2))
        padding = tuple(rng.choice((0, 0, 1, 3, 64, 126, 127, 128, 129, 254)) for _ in range(2))
        sizes = [a * b for a, b in zip((n, h, w, c, k), big, strict=True)]
        conv = Conv(*sizes, r, s, stride, padding, dilation)
        fits = (
            max(conv.n * conv.h * conv.w * max(conv.c, 1), conv.k * r * s * max(conv.c, 1), conv.pixels * conv.k)
            < 2**62
        )
        if conv.p >= 1 and conv.q >= 1 and fits:
            return conv


@pytest.mark.parametrize("part", range(4))
def test_what_is_not_refused_is_legal_and_what_is_legal_is_not_refused(part):
    rng, seen = random.Random(part), Counter()
    for i in range(10_000):
        conv, tile = random_conv(rng), hopper.tiles()[i % 15]
        said, rules = tile.refusal(conv), refused_by_rule(conv, tile.size)
        seen.update(rules or ["none"])
        if said:
            assert rules or stricter(conv), (tile.name, conv, said)
        else:
            assert not rules, (tile.name, conv, rules)
            launch = tile.launch(conv, residual=bool(i % 2))
            for d in (launch.x, launch.weight, launch.residual, launch.y):
                assert illegal(d) == [], (tile.name, conv, d)
            blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
            assert 0 < blocks <= MULTIPROCESSORS and launch.grid[0] % tile.cluster == 0, (tile.name, conv, launch.grid)
    assert all(
        seen[name] > 20 for name in ("none", "channels", "empty", "stride", "corner", "offset", "sizes", "bytes")
    ), seen
