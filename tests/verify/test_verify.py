"""The fp64 referee: sound implementations pass, planted faults do not."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.functional import add_relu, bn_act
from fastres.verify import verify
from nets import fused_network as network

MOMENTUM, EPS = 0.1, 1e-5


def reference(x, mean, var, weight, bias, residual):
    """relu(batch_norm(x) + residual) in training mode, eager's own."""
    return torch.relu(F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS) + residual)


def by_hand(
    x,
    mean,
    var,
    weight,
    bias,
    residual,
    *,
    eps=EPS,
    biased=False,
    act=torch.relu,
    accumulate=torch.float32,
    tail=None,
    shift=0,
):
    """The same by the formula, with room for faults."""
    n = x.numel() // x.shape[1]
    xs = x.to(accumulate)
    batch_mean = xs.mean((0, 2, 3)).float()
    batch_var = (xs.float() - batch_mean[:, None, None]).to(xs.dtype).square().mean((0, 2, 3)).float()
    with torch.no_grad():
        mean.mul_(1 - MOMENTUM).add_(batch_mean, alpha=MOMENTUM)
        var.mul_(1 - MOMENTUM).add_(batch_var * (1 if biased else n / (n - 1)), alpha=MOMENTUM)
    scale = (weight * torch.rsqrt(batch_var + eps)).roll(shift)
    y = (x.float() - batch_mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]
    y = act(y + residual.float()).to(x.dtype)
    if tail is not None:  # the last elements of the flat tensor are left as the input
        y = torch.cat([y.flatten()[:-tail], residual.flatten()[-tail:]]).view_as(y)
    return y


def tensors(dtype=torch.float32, channels=8, size=9, gain=1.0):
    x = (torch.randn(4, channels, size, size) * gain).to(dtype).requires_grad_()
    weight, bias = (torch.rand(channels) + 0.5).requires_grad_(), torch.randn(channels).requires_grad_()
    residual = torch.randn(4, channels, size, size).to(dtype).requires_grad_()
    return x, torch.zeros(channels), torch.ones(channels), weight, bias, residual


# ---- sound implementations pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sound_operator_passes_forward_backward_and_statistics(dtype):
    verdict = verify(reference, by_hand, tensors(dtype))
    assert verdict, verdict
    kinds = {(row.name, row.kind) for row in verdict.rows}
    assert kinds == {("output", "output"), ("input[1]", "buffer"), ("input[2]", "buffer")} | {
        (f"input[{n}]", "grad") for n in (0, 3, 4, 5)
    }
    assert 0 < verdict.error_ratio <= 2 and verdict.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("seed", range(20))
def test_sound_implementations_are_not_rejected_by_chance(seed):
    """Ours against eager's, on shapes where sums are short and gates close to 0 are hit now and then."""
    torch.manual_seed(seed)
    channels, size = (1, 3, 8, 17)[seed % 4], (2, 5, 9, 16)[seed // 4 % 4]
    ours = lambda x, m, v, w, b, r: bn_act(x, m, v, w, b, r, training=True, momentum=MOMENTUM, eps=EPS)  # noqa: E731
    verdict = verify(reference, ours, tensors(channels=channels, size=size), seed=seed)
    assert verdict, verdict


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_network_passes(training, dtype):
    net = network().to(dtype)
    candidate = copy.deepcopy(net).to(memory_format=torch.channels_last)
    verdict = verify(net, candidate, torch.randn(4, 3, 12, 12, dtype=dtype), training=training)
    assert verdict, verdict
    names = {row.name for row in verdict.rows if row.kind == "grad"}
    assert names == {"input", *(name for name, _ in net.named_parameters())}
    assert ("block.bn1.running_var" in {row.name for row in verdict.rows}) == training
    assert verdict.training is training


def test_relu_at_rounding_distance_from_zero_may_go_either_way():
    """The sum is 2^-24 or 0 by the order of addition: both masks are right, a third answer is not."""
    x, r, minus = torch.full((4, 4), 3.0), torch.randn(4, 4), torch.full((4, 4), -1.0)
    x[1, 2], r[1, 2] = 1.0, 2.0**-25
    terms = (x.requires_grad_(), r.requires_grad_(), minus)
    forward = lambda a, b, c: torch.relu((a + b) + c)  # noqa: E731  (1 + 2^-25) - 1 = 0: closed
    other = lambda a, b, c: torch.relu((a + c) + b)  # noqa: E731  (1 - 1) + 2^-25: open
    assert verify(forward, other, terms)
    assert not torch.equal(forward(*terms), other(*terms))
    assert not verify(forward, lambda a, b, c: other(a, b, c) + 0 * a.abs() + (b - b.detach()) * 0.1, terms)


def test_reference_of_fused_operators_is_judged_the_same():
    ours = lambda x, m, v, w, b, r: bn_act(x, m, v, w, b, r, training=True)  # noqa: E731
    assert verify(ours, reference, tensors())
    assert not verify(ours, lambda *a: by_hand(*a, act=lambda y: y), tensors())
    assert verify(add_relu, lambda x, r: torch.relu(x + r), (torch.randn(3, 4), torch.randn(3, 4)))


# ---- planted faults do not ------------------------------------------------------------------------------------------

FAULTS = {
    "biased running variance": (lambda *a: by_hand(*a, biased=True), {"input[2]"}),
    "eps omitted": (lambda *a: by_hand(*a, eps=0.0), {"output", "input[0]"}),
    "residual and input swapped": (
        lambda x, m, v, w, b, r: by_hand(r, m, v, w, b, x),
        {"output", "input[0]", "input[1]"},
    ),
    "tail of one element": (lambda *a: by_hand(*a, tail=1), {"output"}),
    "one channel off": (lambda *a: by_hand(*a, shift=1), {"output", "input[0]", "input[3]"}),
    "dropped relu": (lambda *a: by_hand(*a, act=lambda y: y), {"output", "input[5]"}),
    "statistics accumulated in bfloat16": (
        lambda *a: by_hand(*a, accumulate=torch.bfloat16),
        {"output", "input[1]", "input[2]"},
    ),
    "mask from the input": (lambda *a: by_hand(*a, act=lambda y: y * (a[0] > 0)), {"output", "input[0]"}),
    "residual not added": (lambda x, m, v, w, b, r: by_hand(x, m, v, w, b, r * 0), {"output", "input[5]"}),
    "statistics not updated": (lambda x, m, v, *a: by_hand(x, m.clone(), v.clone(), *a), {"input[1]", "input[2]"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_rejected_where_it_is(name):
    candidate, where = FAULTS[name]
    verdict = verify(reference, candidate, tensors())
    failed = {row.name for row in verdict.rows if not row.passed}
    assert not verdict and verdict.error_ratio > 2
    assert where <= failed, verdict
    assert all(row.message for row in verdict.rows if not row.passed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_rejected_in_half_precision(name, dtype):
    gain = 3e-3 if name == "eps omitted" else 1.0  # 1e-5 of a variance of 1 is below half precision
    x, mean, var, *rest = tensors(dtype, size=13, gain=gain)
    if "bfloat16" in name and dtype is torch.bfloat16:
        x = (x.detach() + 3).requires_grad_()  # |mean| above std: what an accumulation in bfloat16 loses
    assert not verify(reference, FAULTS[name][0], (x, mean, var, *rest))


@pytest.mark.parametrize(
    "fault",
    [
        lambda net: net.block.bn2.running_var.mul_(1.01),
        lambda net: setattr(net.block.bn1, "eps", 1e-12),
        lambda net: net.stem[0].weight[3].neg_(),
        lambda net: setattr(net.block, "relu", nn.Identity()),
        lambda net: setattr(net.stem[1], "momentum", 0.01),
        lambda net: net.fc.bias[4].add_(1e-3),
    ],
    ids=["variance", "eps", "channel", "relu", "momentum", "bias"],
)
def test_planted_fault_in_a_network_is_rejected(fault):
    net = network()
    candidate = copy.deepcopy(net)
    with torch.no_grad():
        fault(candidate)
    x = torch.randn(8, 3, 12, 12)
    verdicts = [verify(net, candidate, x, training=mode, calibrate_bn=False) for mode in (True, False)]
    assert not all(verdicts)


def test_statistics_that_move_in_eval_mode_are_rejected():
    class Leaky(nn.BatchNorm2d):
        def forward(self, x):
            with torch.no_grad():
                self.running_mean.add_(1e-3)
            return super().forward(x)

    leaky = Leaky(3).eval()
    verdict = verify(nn.BatchNorm2d(3).eval(), leaky, torch.randn(2, 3, 4, 4), calibrate_bn=False)
    assert [row.name for row in verdict.rows if row.kind == "buffer" and not row.passed] == ["running_mean"]


def test_missing_gradient_extra_gradient_and_detached_output_are_rejected():
    x, w = torch.randn(3, 4).requires_grad_(), torch.randn(4).requires_grad_()
    verdict = verify(lambda x, w: x * w, lambda x, w: x * w.detach(), (x, w))
    assert [(row.name, row.message) for row in verdict.rows if not row.passed] == [("input[1]", "no gradient")]
    assert not verify(lambda x, w: x * w.detach(), lambda x, w: x * w, (x, w))
    assert not verify(lambda x, w: x * w, lambda x, w: (x * w).detach(), (x, w))
    assert verify(lambda x, w: x * w, lambda x, w: (x * w).detach(), (x, w), backward=False)


@pytest.mark.parametrize(
    "candidate, message",
    [
        (lambda x: torch.relu(x)[:, :2], r"shape \[4, 2\], eager's is \[4, 3\]"),
        (lambda x: torch.relu(x).double(), "dtype float64, eager's is float32"),
        (lambda x: (torch.relu(x), x), "no such output"),
        (lambda x: torch.where(x > 1e9, 0, torch.relu(x).nan_to_num()), "NaN in 1 other places"),
        (lambda x: torch.relu(x).clamp(max=9.0), "other places than in eager's"),
    ],
)
def test_wrong_shape_dtype_structure_nan_and_inf_are_rejected(candidate, message):
    x = torch.randn(4, 3)
    x[0, 0], x[1, 1] = math.nan, math.inf
    verdict = verify(torch.relu, candidate, x, backward=False)
    assert not verdict
    assert any(re.search(message, row.message) for row in verdict.rows)
    assert verify(torch.relu, lambda x: x.clamp(min=0), x)  # the same places


def test_integers_must_be_equal():
    x = torch.randn(6, 5)
    assert verify(lambda x: x.argmax(1), lambda x: x.topk(1).indices[:, 0], x, backward=False)
    assert not verify(lambda x: x.argmax(1), lambda x: x.argmin(1), x, backward=False)


def test_without_a_floor_exact_results_must_stay_exact():
    x = torch.randint(-8, 8, (2, 3, 4, 4)).float()
    nudged = lambda x: torch.nextafter(torch.relu(x), torch.tensor(9.0))  # noqa: E731
    assert verify(torch.relu, nudged, x, backward=False)
    assert not verify(torch.relu, nudged, x, backward=False, floor_ulps=0)
