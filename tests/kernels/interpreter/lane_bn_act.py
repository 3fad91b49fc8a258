"""bn_act's kernels in Triton's interpreter. Run by test_triton_interpreter.py, in a process of its own."""

import itertools

import pytest
import torch
from fastres.kernels import image
from fastres.kernels.bn_act import bn_act_backward, bn_act_forward

from guarded import EPS32, Arena, assert_close64, small_tiles
from referee import backward64, forward64, statistics64

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float16)
LAYOUTS = (True, False)  # channels_last
GRADIENTS = ("dx", "dweight", "dbias", "dresidual")


def forward(x, weight, bias, residual, stats, channels_last, eps=1e-5, act="relu", offset=0):
    """stats: (mean, var) for eval, None for training -> y, mean, var."""
    arena, c = Arena(), x.shape[1]
    placed = arena.input(x, channels_last, offset)
    args = [placed, arena.input(weight, offset=offset), arena.input(bias, offset=offset)]
    args.append(placed if residual is x else arena.input(residual, channels_last, offset))
    y = arena.output(x.shape, x.dtype, channels_last, offset)
    if stats is None:
        mean, var = (arena.output((c,), torch.float32, offset=offset) for _ in range(2))
    else:
        mean, var = (arena.input(s, offset=offset) for s in stats)
    bn_act_forward(*args, y, mean, var, channels_last=channels_last, training=stats is None, eps=eps, act=act)
    arena.check()
    return y, mean, var


def backward(dy, x, y, weight, mean, var, channels_last, training, wanted=GRADIENTS, eps=1e-5, act="relu", offset=0):
    arena, c = Arena(), x.shape[1]
    inputs = [arena.input(t, channels_last, offset) for t in (dy, x, y)]
    inputs += [arena.input(t, offset=offset) for t in (weight, mean, var)]
    grads = {
        name: None
        if name not in wanted
        else arena.output((c,), torch.float32, offset=offset)
        if name in ("dweight", "dbias")
        else arena.output(x.shape, x.dtype, channels_last, offset)
        for name in GRADIENTS
    }
    bn_act_backward(*inputs, *grads.values(), channels_last=channels_last, training=training, eps=eps, act=act)
    arena.check()
    return grads


def check(shape, dtype, channels_last, training, act="relu", affine=True, with_residual=True, offset=0):
    c = shape[1]
    x, residual, dy = (torch.randn(shape).mul(2).add(1).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(c), torch.randn(c)) if affine else (None, None)
    residual = residual if with_residual else None
    stats = None if training else (torch.randn(c), torch.rand(c) + 0.1)
    y, mean, var = forward(x, weight, bias, residual, stats, channels_last, act=act, offset=offset)
    if training:
        mean64, var64 = statistics64(x)
        scale = x.double().abs().mean((0, 2, 3)) + var64.sqrt()
        assert ((mean.double() - mean64).abs() <= 2 * EPS32 * scale).all()
        assert ((var.double() - var64).abs() <= 4 * EPS32 * var64 + 1e-30).all()
    assert_close64(y, *forward64(x, weight, bias, residual, mean, var, 1e-5, act), f"y of {shape}")
    saved = y if act == "relu" else None
    grads = backward(dy, x, saved, weight, mean, var, channels_last, training, act=act, offset=offset)
    for name, (exact, magnitude) in backward64(dy, x, y, weight, mean, var, training, 1e-5, act).items():
        assert_close64(grads[name], exact, magnitude, f"{name} of {shape}")
    return grads


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_row9_any_number_of_channels_and_pixels(monkeypatch, channels_last):
    small_tiles(monkeypatch, tile=512, line=64)
    for i, c in enumerate((1, 2, 3, 5, 7, 17, 33, 65)):
        plane, other = ((1, 1), (1, 3), (7, 7))[i % 3], ((7, 7), (1, 1), (1, 3))[i % 3]
        check((3, c, *plane), DTYPES[i % 2], channels_last, training=i % 4 < 2)
        check((2, c, *other), DTYPES[i % 2], channels_last, training=i % 4 >= 2)


# act, affine, residual, training: every pair of values meets in each layout
VARIANTS = [
    ("relu", True, True, True),
    ("relu", False, False, True),
    ("none", True, False, True),
    ("none", False, True, True),
    ("relu", True, False, False),
    ("relu", False, True, False),
    ("none", True, True, False),
    ("none", False, False, False),
]


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("act, affine, with_residual, training", VARIANTS)
def test_every_variant_with_three_programs_and_a_tail_on_every_axis(
    monkeypatch, channels_last, act, affine, with_residual, training
):
    # rows of 23 channels in blocks of 8, 105 pixels in 7 blocks of 16 that 5 programs share; planes of 23 pixels in
    # blocks of 8, 9 channels in blocks of 4, 7 images that 3 programs share
    small_tiles(monkeypatch, tile=128 if channels_last else 32, programs=15 if channels_last else 27)
    shape = (7, 23, 3, 5) if channels_last else (7, 9, 1, 23)
    view = image.image(torch.empty(shape), channels_last)
    plan = image.reduction(view, "bn_statistics_kernel", 0)
    rows, block_r = (view.rows if channels_last else view.channels), plan.constants["BLOCK_R"]
    assert plan.line_blocks == 3 and -(-rows // block_r) >= 3 and plan.splits >= 3
    assert view.length % plan.constants["BLOCK_L"] and rows % block_r
    assert (-(-rows // block_r) if channels_last else view.outer) % plan.splits  # programs have unequal shares
    assert plan.parts > 4  # the merge takes 4 parts at a time
    check(shape, DTYPES[affine], channels_last, training, act, affine, with_residual, offset=int(with_residual))


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_shipped_tiles(channels_last):
    for i, shape in enumerate(((2, 64, 5, 5), (2, 20, 14, 14), (1, 1, 40, 40), (130, 5, 1, 1))):
        check(shape, DTYPES[i % 2 == channels_last], channels_last, True)


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_both_layouts_and_repeats_agree(monkeypatch, channels_last):
    small_tiles(monkeypatch)
    x, weight, bias = torch.randn(5, 17, 3, 5), torch.randn(17), torch.randn(17)
    first, again = (forward(x, weight, bias, None, None, channels_last) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    grads, again = (backward(x, x, first[0], weight, *first[1:], channels_last, True) for _ in range(2))
    assert all(torch.equal(grads[k], again[k]) for k in GRADIENTS)
    other = forward(x, weight, bias, None, (first[1], first[2]), not channels_last)
    assert torch.equal(first[0], other[0])  # element-wise given the statistics: the layout changes no bit


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(monkeypatch, channels_last, dtype):
    small_tiles(monkeypatch)
    shape, c = (4, 11, 3, 8), 11  # 96 elements a channel: half -3+m, half 3+m, so mean and var are integers
    sign = torch.ones(96)
    sign[::2] = -1
    m = torch.arange(c) - 5.0
    x = torch.stack([3 * sign[torch.randperm(96)] + m[i] for i in range(c)]).view(c, 4, 3, 8).transpose(0, 1)
    residual, weight, bias = (torch.randint(-4, 5, s).float() for s in (shape, (c,), (c,)))
    weight *= 4  # rstd = 1 / sqrt(9 + 7) = 1/4
    y, mean, var = forward(x.to(dtype), weight, bias, residual.to(dtype), None, channels_last, eps=7.0)
    assert torch.equal(mean, m) and torch.equal(var, torch.full((c,), 9.0))
    exact, _ = forward64(x, weight, bias, residual, mean, var, 7.0, "relu")
    assert torch.equal(y.double(), exact)
    dy = torch.randint(-4, 5, shape).to(dtype)
    grads = backward(dy, x.to(dtype), y, weight, mean, var, channels_last, False, eps=7.0)
    for name, (exact, _) in backward64(dy, x, y, weight, mean, var, False, 7.0, "relu").items():
        assert torch.equal(grads[name].double(), exact), name


@pytest.mark.parametrize("act", ("relu", "none"))
@pytest.mark.parametrize("training", (True, False))
def test_unwanted_gradients(monkeypatch, act, training):
    small_tiles(monkeypatch)
    shape = (2, 5, 3, 5)
    x, dy, y = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    weight, mean, var = torch.randn(5), torch.randn(5), torch.rand(5) + 0.1
    exact = backward64(dy, x, y, weight, mean, var, training, 1e-5, act)
    for i, flags in enumerate(itertools.product((True, False), repeat=4)):
        wanted = [name for name, flag in zip(GRADIENTS, flags, strict=True) if flag]
        saved = y if act == "relu" else None
        grads = backward(dy, x, saved, weight, mean, var, i % 2 == 0, training, wanted, act=act)
        for name in GRADIENTS:
            assert (grads[name] is not None) == (name in wanted)
            if name in wanted:
                assert_close64(grads[name], *exact[name], f"{name} when wanted are {wanted}")


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_row24_residual_is_x(monkeypatch, channels_last):
    small_tiles(monkeypatch)
    x, weight, bias = torch.randn(3, 9, 3, 5), torch.randn(9), torch.randn(9)
    y, mean, var = forward(x, weight, bias, x, None, channels_last)
    assert_close64(y, *forward64(x, weight, bias, x, mean, var, 1e-5, "relu"), "y")


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_row10_nan_inf_and_zeros_at_every_lane(monkeypatch, channels_last):
    small_tiles(monkeypatch)
    special, stats = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 2.0, -3.0]), (torch.zeros(6), torch.ones(6))
    for shift in range(len(special)):
        x = special.roll(shift).repeat(39)[:270].view(3, 6, 3, 5)
        y, _, _ = forward(x, None, None, None, stats, channels_last, eps=0.0)
        want = torch.relu(x)
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(y.signbit() | y.isnan(), want.signbit() | want.isnan())
        grads = backward(torch.ones_like(x), x, y, None, *stats, channels_last, False, ("dresidual",))
        assert torch.equal(grads["dresidual"], torch.where(y <= 0, 0.0, 1.0))  # dy passes where y is NaN


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_row10_nan_or_inf_loses_its_channel_and_no_other(monkeypatch, channels_last):
    small_tiles(monkeypatch)
    for i, special in ((0, NAN), (46, INF), (140, -INF), (269, NAN)):
        x = torch.randn(3, 6, 3, 5)
        x.view(-1)[i] = special
        y, _, var = forward(x, None, None, None, None, channels_last)
        lost = [k == i // 15 % 6 for k in range(6)]
        assert y.isnan().any((0, 2, 3)).tolist() == lost and var.isnan().tolist() == lost


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_row11_mean_far_above_std(monkeypatch, channels_last):
    small_tiles(monkeypatch)
    shape = (8, 6, 8, 9)
    for offset, std in ((1e6, 0.1), (1e4, 1.0), (-3e5, 1.0)):
        x = (torch.randn(shape, dtype=torch.float64) * std + offset).float()
        x[0, :3, 0, 0] = 0.0 if offset < 1e6 else offset  # and an outlier as the first element, here and there
        y, mean, var = forward(x, None, None, None, None, channels_last)
        mean64, var64 = statistics64(x)
        assert ((var.double() - var64).abs() <= 4 * EPS32 * var64).all()
        assert ((mean.double() - mean64).abs() <= EPS32 * mean64.abs()).all()
        assert_close64(y, *forward64(x, None, None, None, mean, var, 1e-5, "relu"), "y")


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("value", (0.1, 1e6 + 0.3, -65504.0, 1e30))
def test_row11_a_constant_channel_is_exactly_its_bias(monkeypatch, channels_last, value):
    small_tiles(monkeypatch)
    bias = torch.randn(7)
    y, mean, var = forward(torch.full((5, 7, 3, 5), value), torch.randn(7), bias, None, None, channels_last, act="none")
    assert torch.equal(mean, torch.full((7,), value)) and torch.equal(var, torch.zeros(7))
    assert torch.equal(y, bias.view(1, 7, 1, 1).expand_as(y))


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_row12_overflowing_squares_give_no_nan(monkeypatch, channels_last):
    small_tiles(monkeypatch)
    x = torch.randn(5, 7, 3, 5) * 1e30
    y, mean, var = forward(x, None, torch.ones(7), None, None, channels_last)
    assert var.isinf().all() and mean.isfinite().all() and torch.equal(y, torch.ones_like(y))
