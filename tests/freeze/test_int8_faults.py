"""Faults that a review of int8 found: each planted again here, as a user would meet it."""

import pytest
import torch
from torch import nn

import fastres
from fastres.inference.gate import snr
from int8_cases import HOSTILE, frozen_int8, images


class By(nn.Module):
    """Two convolutions, then a function of their output and of a constant."""

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.last, self.constant = last, nn.Buffer(torch.randn(1, 16, 16, 16))

    def forward(self, x):
        return self.last(self.body(x), self.constant)


def test_one_column_of_outputs_behind_a_stride():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=1),
    ).eval()
    frozen = frozen_int8(net, torch.randn(16, 16, 21, 16), **HOSTILE)
    with torch.no_grad():
        for width in (1, 2, 3, 5):
            x = torch.randn(4, 16, 21, width)
            assert snr(net(x), frozen(x)) > 25, width


def test_a_network_without_a_floating_output_needs_a_gate():
    net = By(lambda y, _: y.argmax(1)).eval()
    with pytest.raises(ValueError, match="gate: got None for a network without a floating output"):
        frozen_int8(net, images(16))
    frozen = frozen_int8(net, images(16), gate=lambda network: float((network(images(4)) >= 0).all()))
    assert frozen.report.quantization.images == 16 and frozen(images(2)).shape == (2, 16, 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_not_hidden(value):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()).eval()
    frozen = frozen_int8(net, images(16), **HOSTILE)
    want = frozen(images(2))
    with torch.no_grad():
        net[2].weight[0, 0, 0, 0] = value
    with pytest.raises(RuntimeError, match="refresh: the source has changed, freeze it again"):
        frozen.refresh()
    assert torch.equal(frozen(images(2)), want)


@pytest.mark.parametrize(
    "last",
    [
        lambda y, _: y.reshape(-1, 4, 4, 16, 16).mean((-2, -1)).flatten(1),
        lambda y, _: y.flatten(2).mean((-2, -1)),
        lambda y, constant: torch.cat([y, constant], 0),
    ],
    ids=["mean of 5 dimensions", "mean of 3", "joined with a constant"],
)
def test_steps_that_are_no_pools_and_no_movers(last):
    net = By(last).eval()
    with torch.no_grad():
        want, got = net(images(4)), frozen_int8(net, images(16), **HOSTILE)(images(4))
    assert got.shape == want.shape and snr(want, got) > 25


def test_maps_of_several_sizes():
    net = By(lambda y, _: y).eval()
    batches = [images(1, size=size, seed=size + i) for i in range(8) for size in (16, 24)]
    frozen = fastres.freeze(net, batches[0], dtype="int8", calibrate=batches, tune=False)
    assert frozen.report.quantization.images == 16 and not frozen.report.quantization.notes


def test_options_of_the_layers_that_stay():
    frozen = frozen_int8(By(lambda y, _: y).eval(), images(16), precision="exact", max_weights=10**9)
    assert frozen.plan.winograd == 0 and frozen.plan.max_weights == 10**9


def test_arguments_are_checked_without_int8_too():
    for name, value, error in (("observer", "best", ValueError), ("max_drop", "x", TypeError)):
        with pytest.raises(error, match=name):
            fastres.freeze(nn.Conv2d(3, 4, 3), images(2), **{name: value})
