"""Swapped blocks against the stock block in float64, eager's own error the yardstick, on drawn blocks and inputs.

Derandomized: every run draws the same cases. `fastres.verify` is the judge, since rounding may decide a ReLU's gate: it
knows which gates are undecided, and allows for either setting of them.
"""

import copy
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fastres
from fastres.swap import swap
from referee import LAYOUTS, layout
from swap_cases import projection, scramble, torchvision
from train_cases import OPTIONS, vision

DRAWS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # the first case that fails is small enough
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


def draw_block(draw, norm):
    """(block, its input channels, its stride)."""
    kind = draw(st.sampled_from(("basic", "bottleneck", "conv-norm-act")), label="block")
    stride = draw(st.sampled_from((1, 2)), label="stride")
    if kind == "basic":
        c, planes = draw(st.integers(1, 9), label="C"), draw(st.integers(1, 9), label="planes")
        shortcut = projection(c, planes, stride) if stride != 1 or c != planes else None
        return vision.BasicBlock(c, planes, stride, shortcut, norm_layer=norm), c, stride
    groups = draw(st.sampled_from((1, 2, 3)), label="groups")
    c = groups * draw(st.integers(1, 4), label="C / groups")
    if kind == "bottleneck":
        planes = draw(st.integers(1, 3), label="planes")
        shortcut = projection(c, 4 * planes, stride) if stride != 1 or c != 4 * planes else None
        return vision.Bottleneck(c, planes, stride, shortcut, groups, 64, norm_layer=norm), c, stride
    kernel = draw(st.sampled_from((1, 3)), label="kernel")
    out = groups * draw(st.integers(1, 4), label="planes / groups")
    dilation = draw(st.sampled_from((1, 2)), label="dilation")
    act = draw(st.sampled_from((nn.ReLU, None)), label="act")
    return (
        torchvision.ops.Conv2dNormActivation(
            c, out, kernel, stride, groups=groups, dilation=dilation, norm_layer=norm, activation_layer=act
        ),
        c,
        stride,
    )


def check(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000), label="seed"))
    norm = partial(
        nn.BatchNorm2d,
        momentum=draw(st.sampled_from((0.1, None, 1.0, 0.0)), label="momentum"),
        affine=draw(st.booleans(), label="affine"),
        track_running_stats=draw(st.booleans(), label="tracked"),
        eps=draw(st.sampled_from((1e-5, 1e-3)), label="eps"),
    )
    stock, channels, stride = draw_block(draw, norm)
    n, h, w = (draw(st.integers(1, high), label=what) for what, high in (("N", 4), ("H", 7), ("W", 7)))
    training = draw(st.booleans(), label="training")
    tracked = not any(m.running_mean is None for m in stock.modules() if isinstance(m, nn.BatchNorm2d))
    values = n * -(-h // stride) * -(-w // stride)
    # two values a channel cannot tell a sound variance from an unsound one: x_hat is a sign
    assume(values > 2 or (tracked and not training))
    precision = draw(st.sampled_from(("float32", "float32", "bfloat16 autocast", "float64")), label="dtype")
    dtype = torch.float64 if precision == "float64" else torch.float32
    # oneDNN leaves taps of a bfloat16 weight gradient unwritten for a 3x3 of stride 2 on images of one column: stock's
    # convolution alone, torch 2.11, where the memory that it is given holds NaN
    assume(not (precision == "bfloat16 autocast" and stride == 2 and w == 1))
    stock = scramble(stock).to(dtype)
    if draw(st.booleans(), label="channels_last weights"):
        stock = stock.to(memory_format=torch.channels_last)
    for m in stock.modules():
        if isinstance(m, nn.BatchNorm2d) and m.num_batches_tracked is not None:
            m.num_batches_tracked.fill_(draw(st.sampled_from((0, 3)), label="batches before"))
    x = torch.randn(n, channels, h, w, dtype=dtype) + draw(st.sampled_from((0.0, 0.5, -4.0)), label="mean of x")
    x = layout(x, draw(st.sampled_from(LAYOUTS), label="layout"))
    block = copy.deepcopy(stock)
    swap(block, strict=True, **draw(st.sampled_from(OPTIONS), label="options"))
    backward = draw(st.sampled_from((True, True, False)), label="backward")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16 autocast"):
        verdict = fastres.verify(stock, block, x, training=training, backward=backward, calibrate_bn=False)
    assert verdict, str(verdict)


@settings(DRAWS, max_examples=200)
@given(data=st.data())
def test_any_block_is_as_good_as_eager(data):
    check(data)


@pytest.mark.full
@settings(DRAWS, max_examples=2000)
@given(data=st.data())
def test_any_block_is_as_good_as_eager_2000_times(data):
    check(data)
