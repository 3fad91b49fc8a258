"""NaN and infinity: of the input, of weights, made by the network itself. `test_NN_`: rows of faults.md."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from freeze_cases import Net, agree, cifar, conv_bn, freeze, images, notes, operators
from freeze_cases import compare as compared

FUSED = "mkldnn::_convolution_pointwise"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tune", [False, True])
def test_row10_they_pass_as_in_eager_and_later_calls_are_fast_again(value, tune):
    net = cifar()
    frozen, good = freeze(net, images(2, 16), tune=tune, verify=False), images(3, 16)
    x = good.clone()
    x[1, 0, 3, 3] = value
    assert frozen(good).isfinite().all()
    compared(net, frozen, x)
    assert frozen(x)[1].isnan().any() and frozen(x)[[0, 2]].isfinite().all()
    compared(net, frozen, good)
    with torch.no_grad():
        frozen.weights.conv1.weight.mul_(0.5)  # of both plans
    torch.testing.assert_close(frozen(x)[0], frozen(good)[0], rtol=1e-4, atol=1e-4)


def test_row10_a_call_that_is_not_finite_runs_no_relu_of_onednn():
    frozen, x = freeze(cifar(), images(2, 16), tune=False, verify=False), images(2, 16)
    frozen(x)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    assert operators(frozen, x)[FUSED] > 0
    x[0, 0, 0, 0] = float("nan")
    frozen(x)
    assert FUSED not in operators(frozen, x)


BROKEN = {
    "convolution": lambda m: m[0].weight.data[0].fill_(float("nan")),
    "running mean": lambda m: m[1].running_mean[:1].fill_(float("nan")),
    "running variance": lambda m: m[1].running_var[:1].fill_(float("nan")),
    "BN weight": lambda m: m[1].weight.data[:1].fill_(float("nan")),
    "linear": lambda m: m[4].weight.data[0, 0].fill_(float("-inf")),
}


@pytest.mark.parametrize("where", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row10_those_in_weights_are_reported_and_pass_as_in_eager(where, dtype):
    model = nn.Sequential(*conv_bn(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).eval()
    BROKEN[where](model)
    frozen = freeze(model, images(), dtype=dtype, tune=False)
    assert "some of its numbers are not finite" in notes(frozen) and frozen.report.verification
    x = images(3)
    with torch.no_grad():
        want = model(x)
    assert not want.isfinite().all()
    for _ in range(3):
        got = frozen(x)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        if dtype is torch.float32:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


STEPS = {
    "sqrt": lambda t: t.sqrt(),
    "log": lambda t: t.log(),
    "pow": lambda t: t.pow(0.5),
    "division": lambda t: t / t.relu().mul(0),
    "acos": lambda t: t.sub(1).acos(),
    "std": lambda t: t / t.std(0) if len(t) else t,
}
HARMLESS = [lambda t: t.pow(2), lambda t: t / 6, lambda t: t / torch.ones(4, 1, 1), torch.sigmoid]


def fused_calls(frozen, x):
    frozen(x)
    seen = operators(frozen, x)
    return seen.get(FUSED, 0) + seen.get(FUSED + "_", 0)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.filterwarnings("ignore:std\\(\\)")
def test_row10_nan_that_the_network_makes_itself_is_not_turned_into_0(step):
    net = Net(lambda net, x: F.relu(net.second(STEPS[step](net.first(x)))))
    frozen = agree(net, sizes=(8, 6), tol=1e-3, verify=False)
    if torch.backends.mkldnn.is_available():
        assert fused_calls(frozen, images()) == 1  # what is before it stays fast


@pytest.mark.parametrize("step", HARMLESS)
def test_steps_that_make_no_nan_cost_nothing(step):
    frozen = agree(Net(lambda net, x: F.relu(net.second(step(net.first(x))))), verify=False)
    if torch.backends.mkldnn.is_available():
        assert fused_calls(frozen, images()) == 2
