"""Image sizes: one capture is for all for which the network's code asks no other question (row 6)."""

import copy
import gc

import pytest
import torch
from torch.nn import functional as F

import fastres
from fastres.graph.questions import UnknownQuestion, hold, same_size, terms_of
from freeze_cases import Net, cifar, compare, freeze, images

SIZES = {
    "padded to even": lambda net, x: F.max_pool2d(net.first(F.pad(x, (0, 1)) if x.shape[-1] % 2 else x), 2),
    "large": lambda net, x: net.first(x) * 2 if x.shape[-2] > 10 else net.first(x),
    "area": lambda net, x: net.first(x) * 2 if x.shape[-2] * x.shape[-1] > 100 else net.first(x),
    "ratio": lambda net, x: net.first(x) * (2 if x.shape[-1] / x.shape[-2] > 1.5 else 1),
    "either": lambda net, x: net.first(x) * (2 if x.shape[-1] == 9 or x.shape[-2] > 11 else 1),
    "longest": lambda net, x: net.first(x) * (2 if max(x.shape[-2:]) > 10 else 1),
    "one of them": lambda net, x: net.first(x) * (2 if x.shape[-1] == 8 else 1),
    "loop": lambda net, x: sum(net.first(x)[..., i] for i in range(x.shape[-1])),
    "square": lambda net, x: net.first(x) + (net.first(x).transpose(2, 3) if x.shape[-1] == x.shape[-2] else 0),
}
SIZES |= {
    "asked after a rule has": lambda net, x: (lambda y: y * 2 if x.shape[-1] % 2 == 0 else y)(
        F.max_pool2d(net.first(x), 2)
    ),
    "resized where it must": lambda net, x: (
        lambda y: (
            (y if y.shape == x[:, :1].expand(-1, 4, -1, -1).shape else F.interpolate(y, x.shape[-2:])) + net.first(x)
        )
    )(F.interpolate(F.max_pool2d(net.first(x), 2), scale_factor=2.0)),
    "rounded up": lambda net, x: F.interpolate(x, F.max_pool2d(net.first(x), 3, 2, ceil_mode=True).shape[-2:]),
    "a pool behind a pool": lambda net, x: (lambda y: y.reshape(len(x), 4, y.shape[-1] * y.shape[-2]))(
        F.avg_pool2d(F.max_pool2d(net.first(x), 3, 2, ceil_mode=True), 2, 2, ceil_mode=True)
    ),
}
GROWS = {
    "resized": lambda net, x: F.interpolate(net.first(x), x.shape[-2:], mode="bilinear") + net.first(x),
    "grid": lambda net, x: net.first(x) + torch.arange(x.shape[-1]) / x.shape[-1],
    "halves": lambda net, x: torch.cat(net.first(x)[..., : x.shape[-1] // 2 * 2].chunk(2, -1), 1),
    "twice as large": lambda net, x: F.interpolate(F.max_pool2d(net.first(x), 2), scale_factor=2.0),
    "pixels": lambda net, x: net.first(x).sum((2, 3)) / (x.shape[-1] * x.shape[-2]),
    "size": lambda net, x: (net.first(x), x.shape[-1]),
}
PIXELS = ((8, 8), (9, 8), (8, 9), (12, 12), (7, 13), (20, 6))


@pytest.mark.parametrize("case", SIZES)
def test_row6_a_forward_that_asks_for_the_image_size_is_captured_for_each_answer(case):
    net = Net(SIZES[case])
    frozen = freeze(net, images(2, 8), tune=False)
    for height, width in PIXELS:
        compare(net, frozen, torch.randn(3, 3, height, width))
    assert frozen._variants or case == "rounded up"  # torch 2.15 asks nothing there: one capture serves every size


@pytest.mark.parametrize("case", GROWS)
def test_row6_one_capture_is_for_all_image_sizes(case):
    net = Net(GROWS[case])
    frozen = freeze(net, images(2, 8), tune=False)
    for height, width in PIXELS:
        compare(net, frozen, torch.randn(3, 3, height, width))
    assert not frozen._variants


def test_row6_a_backbone_in_the_place_of_its_source_takes_any_size(tmp_path):
    net, xs = cifar(), [images(2, size) for size in (16, 24, 13)]
    want = [net(x) for x in xs]
    frozen = freeze(net, xs[0], tune=False)
    del net
    gc.collect()
    frozen.save(tmp_path / "net.fastres")
    for made in (frozen, copy.deepcopy(frozen), fastres.load(tmp_path / "net.fastres")):
        for x, y in zip(xs, want, strict=True):
            torch.testing.assert_close(made(x), y, rtol=1e-4, atol=1e-4)


def test_questions_are_arithmetic_of_sizes_and_nothing_else():
    names = {"s0", "s1"}
    forms = "s0.real|s2 > 1|s0 if s1 else 2|s0 ** 9|(s0 := 3)|[s0]|f(s0)|s0 >|max()|max(s0, key=s1)|'a'|1 < s0 < 3"
    for question in (*forms.split("|"), "__import__('os')", "s0" + " + s0" * 1000):
        with pytest.raises(UnknownQuestion):
            terms_of([question], names)
    asked = terms_of(
        ["(s0 // 2) % 2 == 0 and not s1 > 5", "max(s0, s1) <= math.ceil(8.5)", "s0 / s1 != 1 or s0 == 9"], names
    )
    assert (
        hold(asked, {"s0": 8, "s1": 4}) and not hold(asked, {"s0": 8, "s1": 6}) and not hold(asked, {"s0": 6, "s1": 4})
    )
    assert not hold(terms_of(["s0 % s1 == 0"], names), {"s0": 1, "s1": 0})


def test_sizes_are_the_same_whatever_their_form():
    assert same_size("(s0 + 1)//2", "((s0 - 1)//2) + 1") and same_size(3, 3) and not same_size(3, "s0")
    assert not same_size("s0//2", "((s0 - 1)//2) + 1") and not same_size("s0", "s1") and not same_size("s0*s1", "s0*s0")
