"""Convolutions that oneDNN computes wrong, or ends the process on: rows 52 and 4 of the lists of faults.

The output is one column wide and the stride along it is not 1; or the kernel is 1 along a side that has a dilation; or,
in bfloat16 with AMX, it is wide on few channels.
Found by comparing 13,000 random geometries with float64, each in a process of its own.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres.functional import conv_act
from fastres.ops._conv_backends import sound
from freeze_cases import images

# C / groups, K / groups, groups, kernel, stride, padding, dilation, image
COLUMNS = [
    (16, 16, 1, (8, 4), (2, 4), (1, 4), (1, 1), (8, 4)),
    (16, 16, 1, (4, 4), (4, 4), (0, 0), (1, 1), (4, 4)),
    (24, 24, 1, (1, 4), (8, 8), (0, 0), (1, 1), (8, 8)),
    (8, 4, 1, (2, 8), (4, 16), (1, 0), (1, 1), (7, 16)),
    (1, 4, 8, (3, 5), (1, 16), (0, 1), (1, 1), (16, 8)),
    (1, 2, 4, (4, 2), (1, 2), (2, 1), (1, 1), (16, 1)),
    (1, 16, 1, (5, 4), (1, 3), (0, 0), (1, 1), (7, 4)),
    (64, 8, 1, (4, 6), (1, 16), (0, 2), (1, 1), (16, 2)),  # the gradient of the weight
    (8, 8, 1, (3, 4), (4, 3), (1, 2), (1, 1), (9, 1)),
    (1, 4, 1, (5, 4), (1, 5), (3, 0), (1, 1), (1, 4)),  # float32, packed
]
WIDE = [  # bfloat16 with AMX: a row of the kernel is a multiple of 32 numbers
    (8, 8, 1, (3, 8), (1, 1), (1, 0), (1, 1), (6, 24)),
    (12, 16, 1, (1, 8), (2, 1), (0, 3), (1, 1), (7, 20)),
    (4, 8, 2, (2, 16), (1, 1), (0, 2), (1, 1), (5, 30)),
    (16, 8, 1, (3, 8), (1, 1), (1, 0), (1, 1), (6, 24)),  # the gradient of x
]
DILATED = [
    (16, 1, 1, (11, 1), (3, 3), (3, 2), (1, 2), (7, 1)),
    (2, 4, 4, (3, 1), (4, 3), (0, 4), (1, 2), (4, 1)),
    (3, 24, 1, (3, 1), (2, 3), (2, 2), (2, 2), (9, 1)),
]


def case(row, dtype, layout):
    c, k, groups, kernel, stride, padding, dilation, size = row
    torch.manual_seed(0)
    x, weight = (
        torch.randn(2, c * groups, *size),
        torch.randn(k * groups, c, *kernel) / (c * kernel[0] * kernel[1]) ** 0.5,
    )
    tensors = [t.to(dtype).contiguous(memory_format=layout).requires_grad_() for t in (x, weight)]
    return *tensors, (stride, padding, dilation, groups)


def off(got, want):
    return float((got.double() - want).norm()) / max(float(want.norm()), 1e-3)  # some are zeros alone: all padding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("row", [*COLUMNS, *WIDE, *DILATED])
def test_row52_right_in_both_layouts_and_their_gradients(row, dtype, layout):
    x, weight, where = case(row, dtype, layout)
    double = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = F.conv2d(*double, None, *where)
    dy = torch.randn_like(want).to(dtype)
    bar = 4 * torch.finfo(dtype).eps
    for backend in ("auto", "reference"):
        y = conv_act(x.detach(), weight.detach(), None, None, None, *where, act="none", backend=backend)
        assert off(y, want.detach()) < bar
    gradients = torch.autograd.grad(conv_act(x, weight, None, None, None, *where, act="none"), (x, weight), dy)
    for got, exact in zip(gradients, torch.autograd.grad(want, double, dy.double()), strict=True):
        assert off(got, exact) < bar


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("row", [*COLUMNS, *WIDE, *DILATED])
def test_row52_right_in_a_frozen_network_packed_and_plain(row, dtype):
    x, weight, where = case(row, torch.float32, torch.contiguous_format)
    k = weight.shape[0]
    conv = nn.Conv2d(x.shape[1], k, weight.shape[2:], *where)
    net = nn.Sequential(nn.Conv2d(3, x.shape[1], 1), conv, nn.BatchNorm2d(k), nn.ReLU()).eval()
    given = images(2, 1).expand(-1, -1, *x.shape[2:]) + torch.randn(2, 3, *x.shape[2:])
    want = net.double()(given.double())
    frozen = fastres.freeze(net.float(), given, dtype=dtype, tune=False, verify=False)
    for way in ("packed", "plain"):
        executor, inputs, constants = frozen.prepared(given)
        found = executor.find_choices(inputs, constants)
        frozen.choose({choices.key: way for choices, _ in found if way in choices.ways})
        assert off(frozen(given), want) < 8 * torch.finfo(dtype).eps
    if row in (COLUMNS[0], DILATED[0]):
        with torch.no_grad():
            compiled = torch.compile(net.to(dtype), backend="fastres")(given.to(dtype))
        assert off(compiled, want) < 8 * torch.finfo(dtype).eps


def test_only_what_is_at_risk_is_rewritten():
    assert sound((8, 8), (3, 3), (2, 2), (1, 1), (1, 1)) == ((2, 2), (1, 1), False)
    assert sound((2, 2), (1, 1), (2, 2), (0, 0), (1, 1)) == ((2, 2), (1, 1), False)  # 1x1: always right
    assert sound((2, 2), (3, 3), (2, 2), (1, 1), (1, 1)) == ((2, 1), (1, 1), True)
    assert sound((9, 9), (3, 1), (1, 1), (0, 0), (2, 2)) == ((1, 1), (2, 1), False)


def test_the_probe_keeps_packed_weights_where_oneDNN_is_right():
    net = nn.Sequential(nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU()).eval()  # the last stage of a ResNet on small images
    frozen = fastres.freeze(net, torch.randn(2, 64, 2, 2), tune=False)
    executor, inputs, constants = frozen.prepared(torch.randn(2, 64, 2, 2))
    assert len(executor.find_choices(inputs, constants)) == 1


def test_row52_the_referee_takes_no_eager_that_is_wrong_as_its_measure():
    class Broken(nn.Module):
        """Garbage in bfloat16 alone, as oneDNN's."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            y = (x * self.scale).relu()
            return y if y.dtype is not torch.bfloat16 else y.flip(0)

    x = torch.randn(4, 64)
    verdict = fastres.verify(Broken(), lambda t: t.relu().flip(0), x, dtype=torch.bfloat16, backward=False)
    assert not verdict and "it is no measure" in str(verdict)
    assert fastres.verify(Broken(), torch.relu, x, dtype=torch.bfloat16, backward=False)
