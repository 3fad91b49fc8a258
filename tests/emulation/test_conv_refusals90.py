"""The convolutions that the kernels for sm_90a refuse, against the driver's rules for tensor maps said again in
Python: launches around every limit, up to tensors that no machine holds, planned on the emulated GPU and not run.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

import emulation90
from fastres.ops._conv_backends import output_size

pytestmark = pytest.mark.xdist_group("emulated90")  # one worker: the library's build takes gigabytes
MULTIPROCESSORS = 132
RULES = ("channels", "empty", "stride", "corner", "offset", "sizes", "bytes")


@dataclass(frozen=True)
class Conv:
    """x [n, h, w, c], weight [k, r, s, c]; pairs are of the height and the width."""

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int = 1
    s: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def out(self):
        return output_size((self.h, self.w), (self.r, self.s), self.stride, self.padding, self.dilation)

    @property
    def pixels(self):
        return self.n * self.out[0] * self.out[1]

    @property
    def pointwise(self):
        return (self.r, self.s, self.stride, self.padding) == (1, 1, (1, 1), (0, 0))

    def numbers(self):
        shape = self.n, self.h, self.w, self.c, self.k, self.r, self.s
        return *shape, *self.out, *self.stride, *self.padding, *self.dilation


def refused_by_rule(conv, size):
    """Why the driver or a kernel's 32-bit numbers do not take a convolution, said without looking at its code."""
    n, h, w = (1, 1, conv.pixels) if conv.pointwise else (conv.n, conv.h, conv.w)
    corners, reach = (), []
    for taps, padding, dilation in zip((conv.r, conv.s), conv.padding, conv.dilation, strict=True):
        reach.append((taps - 1) * dilation)
        corners += (-padding, padding - reach[-1])
    rules = {
        "channels": conv.c * size % 16 or conv.k * size % 16,
        "empty": min(n, h, w, conv.c, conv.k, conv.r, conv.s, *conv.out) < 1,
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
        c = max(conv.c, 1)
        largest = max(conv.n * conv.h * conv.w * c, conv.k * r * s * c, conv.pixels * conv.k)
        if min(conv.out) >= 1 and largest < 2**62:
            return conv


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.full)], ids=["some", "shipped"])
def test_what_is_not_refused_is_legal_and_what_is_legal_is_not_refused(everything):
    tiles, rng, seen = list(emulation90.tiles(everything).values()), random.Random(0), Counter()
    for i in range(20_000):
        conv, tile = random_conv(rng), tiles[i % len(tiles)]
        said, rules = tile.planned(conv.numbers(), i % 2, MULTIPROCESSORS), refused_by_rule(conv, tile.dtype.itemsize)
        seen.update(rules or ["none"])
        assert "cuTensorMap" not in said and "launch" not in said, (tile.label, conv, said)
        assert rules or stricter(conv) if said else not rules, (tile.label, conv, said, rules)
        if not said:
            assert 0 < tile.counted("blocks") <= MULTIPROCESSORS, (tile.label, conv)
    assert min(seen[name] for name in ("none", *RULES)) > 50, seen
