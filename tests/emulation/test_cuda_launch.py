"""csrc/element.h and csrc/cuda/launch.h on the host: the maths of one element against torch, and the arithmetic of
launches against a plain index model, exhaustively for small tensors and at random places up to 2^33 elements.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import random

import pytest
import torch

import emulation
from emulation import pointer

NAN, INF = math.nan, math.inf
TINY = 2.0**-149
SPECIAL = [NAN, INF, -INF, 0.0, -0.0, TINY, -TINY, 2.0**-126, -(2.0**-126), 1.0, -1.0, 3.4e38, -3.4e38, 1e-30, -7.5]
PLAN = "lanes width height tiles splits span rows line chunks row_tiles blocks threads".split()


def pairs():
    a, b = torch.tensor(list(itertools.product(SPECIAL, SPECIAL))).unbind(1)
    return a.contiguous(), b.contiguous()


def elementwise(name, *arguments):
    """A function of element.h over arrays: tensors and numbers, in its order."""
    first = arguments[0]
    out = torch.empty_like(first)
    converted = [pointer(a) if isinstance(a, torch.Tensor) else ctypes.c_float(a) for a in arguments]
    getattr(emulation.library(), name)(*converted, pointer(out), ctypes.c_int64(first.numel()))
    return out


def assert_same_bits(got, want):
    """NaN for NaN, and everything else to the bit: the sign of zero too."""
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int32), want[~nan].view(torch.int32))


# ---- element.h


def test_relu_is_torchs_to_the_bit():
    z = torch.tensor(SPECIAL)
    got = elementwise("relu", z)
    assert torch.equal(got.isnan(), z.isnan()) and torch.equal(got[~z.isnan()], torch.relu(z)[~z.isnan()])
    kept = ~(z < 0)  # what ReLU lets through comes back as it was, subnormals and -0.0 among it
    assert_same_bits(got[kept], z[kept])
    z = sum(pairs())
    torch.testing.assert_close(elementwise("relu", z), torch.relu(z), rtol=0, atol=0, equal_nan=True)


def test_relu_s_gradient_is_threshold_backward_to_the_bit():
    dy, y = pairs()
    assert_same_bits(elementwise("relu_gradient", dy, y), torch.ops.aten.threshold_backward(dy, y, 0))


def test_affine_subtracts_the_mean_first():
    x = torch.tensor(SPECIAL)
    for mean, scale, bias in itertools.product((0.0, 1.0, -3e38, INF), (1.0, -2.0, 0.0, INF), (0.0, -0.0, 5.0)):
        want = (x - mean) * scale + bias
        torch.testing.assert_close(elementwise("affine", x, mean, scale, bias), want, rtol=0, atol=0, equal_nan=True)
    # a constant channel: exactly its bias, whatever the scale
    exact = elementwise("affine", torch.full((3,), 12345.678), float(torch.tensor(12345.678)), 1e30, 0.25)
    assert torch.equal(exact, torch.full((3,), 0.25))


def test_input_gradient_has_the_referee_s_value():
    torch.manual_seed(0)
    g, x = torch.randn(2, 4096)
    mean, scale, mean_g, slope = 0.3, 1.7, -0.2, 0.9
    got = elementwise("input_gradient", g, x, mean, scale, mean_g, slope)
    m, s, mg, k = (float(torch.tensor(v)) for v in (mean, scale, mean_g, slope))
    want = ((g.double() - mg) - (x.double() - m) * k) * s
    assert (got - want).abs().max() <= 4 * torch.finfo(torch.float32).eps * want.abs().max()
    # slope times scale alone would overflow here; the product with x - mean first does not
    far = elementwise("input_gradient", torch.zeros(1), torch.tensor([1e-20]), 0.0, 1e25, 0.0, 1e25)
    assert torch.equal(far.isfinite(), torch.tensor([True]))


def test_reciprocal_std_is_correctly_rounded_twice():
    var = torch.cat([torch.rand(4096) * 10.0 ** torch.randint(-30, 30, (4096,)), torch.tensor([0.0, TINY, INF, NAN])])
    for eps in (0.0, 1e-5, 1e-3):
        root = (var + torch.tensor(eps)).double().sqrt().float()  # by way of fp64: the nearest fp32
        want = (1 / root.double()).float()
        torch.testing.assert_close(elementwise("reciprocal_std", var, eps), want, rtol=0, atol=0, equal_nan=True)


def welford(values, parts, at_once=True):
    out = torch.empty(3)
    sizes = ctypes.c_int64(values.numel()), ctypes.c_int64(parts), ctypes.c_int(at_once)
    emulation.library().welford(pointer(values), *sizes, pointer(out))
    return out.tolist()


@pytest.mark.parametrize("at_once", [True, False], ids=["four", "one"])
@pytest.mark.parametrize("parts", [1, 2, 7, 64, 1000])
def test_welford_merges_to_the_moments(parts, at_once):
    torch.manual_seed(parts)
    for values in (torch.randn(999), torch.randn(64) * 100 + 3, torch.tensor([2.0]), torch.full((50,), 0.1)):
        count, mean, m2 = welford(values, parts, at_once)
        var, want_mean = torch.var_mean(values.double(), correction=0)
        assert count == values.numel() and math.isclose(mean, want_mean, rel_tol=1e-5, abs_tol=1e-6)
        assert math.isclose(m2 / count, var, rel_tol=2e-5, abs_tol=1e-12)


def test_welford_of_parts_that_saw_nothing_is_not_nan():
    """0 * inf: a part without elements must not touch one whose square overflows."""
    assert welford(torch.tensor([1e30, -1e30]), 100) == [2, 0, INF]
    assert welford(torch.full((2,), 2.0**70), 100) == [2, 2.0**70, 0]


@pytest.mark.parametrize("parts", [1, 3])
def test_welford_of_what_overflows_is_infinite_and_of_nan_is_nan(parts):
    torch.manual_seed(parts)
    for scale in (1e25, 1e30, 1e37):
        count, mean, m2 = welford(torch.randn(50) * scale, parts)
        assert math.isfinite(mean) and m2 == INF
    for special in (NAN, INF, -INF):
        _, mean, m2 = welford(torch.tensor([1.0, 2.0, 3.0, special, 4.0, 5.0]), parts)
        assert not math.isfinite(mean) and math.isnan(m2)


def test_welford_of_a_first_value_far_from_the_others():
    """The first batch's differences cancel; what that costs is small beside what the value adds to the variance."""
    torch.manual_seed(0)
    values = torch.randn(4000)
    values[0] = 1e4
    _, _, m2 = welford(values, 20)
    assert math.isclose(m2 / 4000, values.double().var(correction=0), rel_tol=4e-6)


# ---- flat arrays


class Flat:
    """The launch of a flat array: what is before its vectors, how many there are, what is behind them."""

    def __init__(self, n, address, size, lanes):
        out = torch.empty(4, dtype=torch.int64)
        self.arguments = ctypes.c_int64(n), ctypes.c_uint64(address), ctypes.c_int64(size), ctypes.c_int(lanes)
        emulation.library().flat(*self.arguments, pointer(out))
        self.head, self.vectors, self.tail, self.blocks = out.tolist()

    def block(self, block):
        """Where the threads of a block begin: vectors [threads * 4] and single elements [threads], -1 for none."""
        starts, singles = torch.empty(256 * 4, dtype=torch.int64), torch.empty(256, dtype=torch.int64)
        where = ctypes.c_int(4), ctypes.c_int64(block), pointer(starts), pointer(singles)
        emulation.library().flat_block(*self.arguments, *where)
        return starts, singles


@pytest.mark.parametrize("size", [2, 4])
def test_flat_arrays_are_covered_once_and_vectors_are_aligned(size):
    lanes = 16 // size
    for n, offset, width in itertools.product([*range(1, 40), 1023, 4097, 9001], range(lanes), (lanes, 1)):
        address = 4096 + offset * size
        flat = Flat(n, address, size, width)
        assert flat.head + flat.vectors * width + flat.tail == n and flat.head < lanes and flat.tail < lanes
        hits = torch.zeros(n, dtype=torch.int64)
        for block in range(flat.blocks):
            starts, singles = flat.block(block)
            starts = starts[starts >= 0]
            assert width == 1 or ((address + starts * size) % 16 == 0).all()
            for k in range(width):
                hits.index_add_(0, starts + k, torch.ones_like(starts))
            hits.index_add_(0, singles[singles >= 0], torch.ones(1, dtype=torch.int64).expand((singles >= 0).sum()))
        assert (hits == 1).all(), (n, offset, width)


@pytest.mark.parametrize("numel", [2**31 - 1, 2**31 + 4096, 2**32 + 5, 2**33])
def test_flat_arrays_beyond_int32(numel):
    rng = random.Random(numel)
    for size, misaligned in itertools.product((2, 4), (0, 1)):
        lanes = 16 // size
        flat = Flat(numel, (1 << 40) + misaligned * size, size, lanes)
        assert flat.head + flat.vectors * lanes + flat.tail == numel
        assert flat.blocks == -(-flat.vectors // 1024) < 2**31
        for block in (0, 1, flat.blocks - 1, *(rng.randrange(flat.blocks) for _ in range(20))):
            thread, u = torch.arange(256)[:, None], torch.arange(4)
            want = (block * 4 + u) * 256 + thread
            want = torch.where(want < flat.vectors, flat.head + want * lanes, -1)
            assert torch.equal(flat.block(block)[0].view(256, 4), want)
        singles = flat.block(0)[1]
        assert singles[singles >= 0].tolist() == [*range(flat.head), *range(numel - flat.tail, numel)]


def test_fast_division_is_exact():
    rng = random.Random(0)
    divisors = [1, 2, 3, 5, 7, 49, 196, 255, 256, 257, 12544, 65537, 2**30, 2**30 + 1, 2**31 - 1]
    for divisor in divisors + [rng.randrange(1, 2**31) for _ in range(200)]:
        multiples = [k * divisor + off for k in (1, 2, 3, (2**31 - 1) // divisor) for off in (-1, 0, 1)]
        for n in [0, 1, 2**31 - 1, *multiples, *(rng.randrange(2**31) for _ in range(50))]:
            if 0 <= n < 2**31:
                got = emulation.library().fast_divide(ctypes.c_uint32(n), ctypes.c_int64(divisor))
                assert got == n // divisor, (n, divisor)


# ---- images


def plan(shape, channels_last, size=2, aligned=True, unroll=4, widest=128, wanted=40):
    n, c, h, w = shape
    out = torch.empty(len(PLAN), dtype=torch.int64)
    sizes = [ctypes.c_int64(v) for v in (n, c, h * w)]
    emulation.library().plan(
        *sizes, ctypes.c_int(channels_last), ctypes.c_int64(size), ctypes.c_int(aligned), ctypes.c_int(unroll),
        ctypes.c_int64(widest), ctypes.c_int64(wanted), pointer(out),
    )  # fmt: skip
    found = dict(zip(PLAN, out.tolist(), strict=True))
    assert found["threads"] % 32 == 0 and found["width"] * found["height"] <= found["threads"] <= 256
    assert 0 < found["blocks"] == found["tiles"] * found["splits"] < 2**31
    assert found["splits"] <= max(found["row_tiles"], 1)
    return found


CHANNELS = (1, 2, 3, 6, 8, 10, 16, 17, 24, 33, 64, 65, 100, 256, 520)
PLANES = (1, 2, 3, 4, 7, 8, 12, 16, 30, 49, 64, 196, 784, 2048, 2056, 2064, 3136)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_every_element_has_one_thread_and_its_channel(channels_last):
    vectors = 0
    for c, plane, (n, size, aligned) in itertools.product(
        CHANNELS, PLANES, ((1, 2, True), (3, 4, True), (5, 2, False))
    ):
        if n * c * plane > 200_000:
            continue
        found = plan((n, c, plane, 1), channels_last, size, aligned)
        numel = n * c * plane
        hits, channels = torch.zeros(numel, dtype=torch.int32), torch.full((numel,), -1)
        emulation.library().cover(pointer(hits), pointer(channels))
        index = torch.arange(numel)
        want = index % c if channels_last else index // plane % c
        assert (hits == 1).all() and torch.equal(channels, want), (c, plane, n, size, found)
        vectors += found["lanes"] > 1
    assert vectors > 100


LARGE = [
    (256, 256, 56, 56), (256, 64, 112, 112), (64, 2048, 7, 7), (32, 1024, 14, 14), (2**17 + 1, 1, 1, 1),
    (1, 3, 2**15, 2**15), (3, 2, 2**15, 2**14), (2**15 + 1, 64, 32, 32), (2**23, 1024, 1, 1), (2**21, 64, 8, 8),
    (1, 1, 2**17, 2**16), (2**20, 3, 50, 54), (1, 2**23, 32, 32), (7, 100_003, 99, 101), (2**18, 127, 16, 16),
]  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_places_in_tensors_up_to_two_to_the_33(shape, channels_last):
    """A model in Python's integers says which thread has an element; the C++ must find the element there."""
    rng = random.Random(repr(shape))
    n, c, h, w = shape
    numel, plane = n * c * h * w, h * w
    assert numel <= 2**33 + 2**30
    for size, unroll, widest, wanted in ((2, 4, 128, 3 * 132), (4, 2, 256, 16 * 132), (2, 8, 256, 8)):
        t = plan(shape, channels_last, size, True, unroll, widest, wanted)
        lanes, width, height, line = t["lanes"], t["width"], t["height"], t["line"]
        assert t["rows"] * line == numel * t["chunks"] and t["tiles"] * t["span"] >= line
        for index in [0, numel - 1, numel // 2, *(rng.randrange(numel) for _ in range(200))]:
            image, position = divmod(index, line)
            tile, within = divmod(position, t["span"])
            vector, lane = divmod(within, lanes)
            chunk, x = divmod(vector, width)
            row_tile, rest = divmod(image * t["chunks"] + chunk, height * unroll)
            u, y = divmod(rest, height)
            block, thread = row_tile % t["splits"] * t["tiles"] + tile, y * width + x
            found = emulation.library().element(
                ctypes.c_int64(block), ctypes.c_int(thread), ctypes.c_int64(row_tile), ctypes.c_int(u)
            )
            assert found == index - lane and row_tile < t["row_tiles"]
            channel = emulation.library().channel(ctypes.c_int64(block), ctypes.c_int(thread), ctypes.c_int(lane))
            assert channel == (index % c if channels_last else index // plane % c)


def test_resnet_s_shapes_take_vectors_and_fill_the_gpu():
    """Every stage in both layouts and both sizes of elements; blocks for each of 132 multiprocessors."""
    stages = (64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)
    for size, channels_last in itertools.product((2, 4), (False, True)):
        for c, side in stages:
            found = plan((256, c, side, side), channels_last, size, True, 4, 128, 3 * 132)
            assert found["lanes"] == 16 // size, (c, side, size, channels_last)
            assert found["blocks"] >= 0.8 * 3 * 132, (c, side, size, channels_last, found)
            assert found["width"] * found["height"] >= 192, (c, side, found)  # threads with work, of 256


def test_a_wave_that_would_leave_multiprocessors_idle_is_several():
    """64 channels of 56x56 in NCHW: 64 tiles or so want 396 blocks; 6 waves' worth of them are balanced better."""
    found = plan((256, 100, 56, 56), False, 2, True, 4, 128, 396)
    whole = found["splits"] * found["tiles"]
    assert whole >= 0.8 * 396
