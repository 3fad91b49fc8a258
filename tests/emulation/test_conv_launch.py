"""The convolutions for sm_90a at sizes that no emulator runs: the shipped code says what it hands to the copy engine
(native/conv_launch.cpp); places against plain division, descriptors against the driver's rules (hopper.py). What comes
of it down to the instruction, at small sizes: test_conv_emulated90.py.
"""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

import hopper
from hopper import Conv, illegal

# The library is compiled once, in half a minute. What the default run has instead is test_conv_emulated90.py.
pytestmark = [pytest.mark.xdist_group("conv_launch"), pytest.mark.full]
MULTIPROCESSORS = 132


def distinct():
    """One of the tiles with the same places and coordinates: bf16 is fp16 but for the type."""
    return [tile for tile in hopper.tiles() if tile.type != 1]


# ---- the library


def test_every_shipped_tile_is_here():
    text = "".join(path.read_text() for path in hopper.SHIPPED)
    assert len(hopper.tiles()) == len(re.findall(r"list_conv_sm90<", text)) == 15
    included = re.findall(r'#include "cuda/(conv_sm90_\w+\.cu)"', hopper.SOURCE.read_text())
    assert included == [path.name for path in hopper.SHIPPED]


# ---- coordinates


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


# ---- descriptors


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
