"""The fp64 referee: sound implementations pass, planted faults do not, and nothing of the caller's moves.

`test_44_...` carries its row of the table of known faults: verification on randomly initialised networks.
"""

import copy
import json
import math
import re
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres import models
from fastres.functional import add_relu, bn_act
from fastres.nn import BasicBlock, ConvBNReLU
from fastres.verify import Row, Verification, calibrate, compare_predictions, uncalibrated, verify

MOMENTUM, EPS = 0.1, 1e-5


def reference(x, mean, var, weight, bias, residual):
    """relu(batch_norm(x) + residual) in training mode, eager's own."""
    return torch.relu(F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS) + residual)


def by_hand(
    x, mean, var, weight, bias, residual, *, eps=EPS, biased=False, act=torch.relu, accumulate=torch.float32, tail=None, shift=0
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


def network(width=8):
    torch.manual_seed(1)
    return nn.Sequential(
        OrderedDict(
            stem=ConvBNReLU(3, width),
            block=BasicBlock(width, width),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(width, 5),
        )
    )


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


HALF_FAULTS = sorted(
    FAULTS.keys() - {"eps omitted"}
)  # 1e-5 of a variance of 1 is below half precision: see the next test


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF_FAULTS)
def test_planted_fault_is_rejected_in_half_precision(name, dtype):
    x, mean, var, *rest = tensors(dtype, size=13)
    if "bfloat16" in name and dtype is torch.bfloat16:
        x = (x.detach() + 3).requires_grad_()  # |mean| above std: what an accumulation in bfloat16 loses
    assert not verify(reference, FAULTS[name][0], (x, mean, var, *rest))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eps_omitted_is_rejected_in_half_precision_where_it_matters(dtype):
    assert not verify(reference, FAULTS["eps omitted"][0], tensors(dtype, gain=3e-3))


@pytest.mark.parametrize(
    "fault",
    [
        lambda net: net.block.bn2.running_var.mul_(1.01),
        lambda net: setattr(net.block.bn1, "eps", 0.0),
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


def test_nan_and_inf_in_the_same_places_pass():
    x = torch.randn(4, 3)
    x[0, 0], x[1, 1] = math.nan, math.inf
    assert verify(torch.relu, lambda x: x.clamp(min=0), x)


def test_integers_must_be_equal():
    x = torch.randn(6, 5)
    assert verify(lambda x: x.argmax(1), lambda x: x.topk(1).indices[:, 0], x, backward=False)
    assert not verify(lambda x: x.argmax(1), lambda x: x.argmin(1), x, backward=False)


def test_without_a_floor_exact_results_must_stay_exact():
    x = torch.randint(-8, 8, (2, 3, 4, 4)).float()
    nudged = lambda x: torch.nextafter(torch.relu(x), torch.tensor(9.0))  # noqa: E731
    assert verify(torch.relu, nudged, x, backward=False)
    assert not verify(torch.relu, nudged, x, backward=False, floor_ulps=0)


# ---- what it is given, and what it leaves alone ---------------------------------------------------------------------


def test_inputs_and_outputs_in_containers():
    Point = namedtuple("Point", "left right")
    inputs = {"x": torch.randn(2, 3), "pair": [torch.randn(2, 3), 2.5], "flag": True}

    def function(x, pair, flag):
        assert flag
        return OrderedDict(point=Point(x + pair[0], x * pair[1]), none=None, list=[x.sum()])

    verdict = verify(function, function, inputs)
    outputs = [row.name for row in verdict.rows if row.kind == "output"]
    assert verdict and outputs == ["output.point[0]", "output.point[1]", "output.list[0]"]
    assert {row.name for row in verdict.rows if row.kind == "grad"} == {"input.x", "input.pair[0]"}


def test_model_output_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    net = transformers.ResNetForImageClassification(config)
    x = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 2])}
    verdict = verify(net, copy.deepcopy(net), x, training=False)
    assert verdict, verdict
    assert {"output.logits", "output.loss"} <= {row.name for row in verdict.rows}


def test_strides_offsets_expansion_and_aliasing_reach_the_candidate():
    seen = []

    def spy(x, r, same, wide):
        seen.append((x.stride(), x.storage_offset(), r is same, wide.stride()))
        return x + r + same + wide

    base = torch.randn(2 * 3 * 4 * 4 + 1)
    x = base[1:].view(2, 3, 4, 4)
    r = torch.randn(2, 4, 4, 3).permute(0, 3, 1, 2)
    wide = torch.randn(2, 1, 4, 4).expand(2, 3, 4, 4)
    assert verify(lambda x, r, same, wide: x + r + same + wide, spy, (x, r, r, wide))
    assert seen == [(x.stride(), 1, True, wide.stride())]


def test_candidates_may_overwrite_their_inputs():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    assert verify(net, copy.deepcopy(net), x)
    assert torch.equal(x, before)


def test_nothing_of_the_callers_moves():
    net, candidate = network(), network()
    candidate.block.eval()
    net.block.eval()
    x = torch.randn(4, 3, 8, 8)
    x.grad = torch.ones_like(x)
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (net, candidate)]
    flags = [[m.training for m in model.modules()] for model in (net, candidate)]
    versions = [[t._version for t in model.state_dict().values()] for model in (net, candidate)]
    random = torch.get_rng_state()
    for training in (None, True, False):
        verify(net, candidate, x, training=training)
    assert torch.equal(random, torch.get_rng_state())
    assert [[m.training for m in model.modules()] for model in (net, candidate)] == flags
    assert [[t._version for t in model.state_dict().values()] for model in (net, candidate)] == versions
    for model, state in zip((net, candidate), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert torch.equal(x.grad, torch.ones_like(x)) and not x.requires_grad


def test_dropout_draws_the_same_in_every_run():
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2))
    assert verify(net, copy.deepcopy(net), torch.randn(16, 6), training=True)


def test_works_under_no_grad_inference_mode_and_autocast():
    net = network()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert any(row.kind == "grad" for row in verify(net, copy.deepcopy(net), x).rows)
    with torch.inference_mode():
        assert verify(net, copy.deepcopy(net), x)
    with torch.autocast("cpu", torch.bfloat16):
        verdict = verify(net, copy.deepcopy(net), x)
    assert verdict and next(row for row in verdict.rows if row.name == "output").eager_rms > 1e-5


def test_half_precision_candidate_is_compared_with_the_reference_cast():
    net = network().eval()
    calibrate(net, torch.randn(4, 3, 12, 12))
    verdict = verify(net, copy.deepcopy(net).bfloat16(), torch.randn(4, 3, 12, 12))
    assert verdict and verdict.dtype == "bfloat16"
    assert any("cast from float32 to bfloat16" in note for note in verdict.notes)
    assert {row.dtype for row in verdict.rows} == {"bfloat16"}
    forced = verify(net, copy.deepcopy(net), torch.randn(4, 3, 12, 12), dtype=torch.float16)
    assert forced and forced.dtype == "float16"


# ---- randomly initialised networks --------------------------------------------------------------------------------


def test_44_random_networks_are_calibrated_on_copies():
    net = models.cifar_resnet(20).eval()
    x = torch.randn(4, 3, 16, 16)
    assert len(uncalibrated(net)) == 19
    verdict = verify(net, copy.deepcopy(net), x, backward=False, dtype=torch.float16)
    assert verdict, verdict
    assert any("19 BN layers" in note and "statistics of the inputs" in note for note in verdict.notes)
    assert len(uncalibrated(net)) == 19  # the caller's is as it was
    fault = copy.deepcopy(net)
    fault.layer3[1].bn2.eps = 0.01
    assert not verify(net, fault, x, backward=False)


def test_44_what_cannot_be_calibrated_is_said():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    verdict = verify(net, net[0], torch.randn(2, 3, 4, 4), backward=False)
    assert any("no such layers to calibrate" in note for note in verdict.notes)
    verdict = verify(net, copy.deepcopy(net), torch.randn(1, 3, 1, 1))
    assert any("could not be calibrated" in note for note in verdict.notes) and verdict
    assert not verify(net, copy.deepcopy(net), torch.randn(2, 3, 4, 4), calibrate_bn=False).notes


def test_calibrate_gives_the_batchs_statistics_and_touches_nothing_else():
    net = network()
    trained = copy.deepcopy(net)
    trained(torch.randn(4, 3, 8, 8))
    net.block.bn2.load_state_dict(trained.block.bn2.state_dict())
    net.eval()
    x = torch.randn(8, 3, 8, 8)
    kept = net.block.bn2.running_mean.clone()
    assert calibrate(net, x) == ["stem.1", "block.bn1"]
    z = net.stem[0](x)
    torch.testing.assert_close(net.stem[1].running_mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(net.stem[1].running_var, z.var((0, 2, 3)))
    assert torch.equal(net.block.bn2.running_mean, kept) and not any(m.training for m in net.modules())
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert calibrate(net, x) == []


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report_as_text_and_as_data():
    verdict = verify(reference, FAULTS["dropped relu"][0], tensors())
    text = str(verdict)
    assert "FAILED" in text and "output" in text and "eager rms" in text and str(verdict.worst.name) in text
    assert all(len(line) < 140 for line in text.splitlines())
    data = json.loads(json.dumps(verdict.to_dict()))
    assert data["passed"] is False and data["dtype"] == "float32" and len(data["rows"]) == len(verdict.rows)
    assert set(data["rows"][0]) >= {
        *("name", "kind", "shape", "dtype", "error_rms", "eager_rms", "error_max", "eager_max"),
        *("floor", "ratio", "passed", "message"),
    }
    assert isinstance(verdict, Verification) and isinstance(verdict.worst, Row)
    net = models.cifar_resnet(8)
    long = verify(net, copy.deepcopy(net), torch.randn(2, 3, 8, 8))
    assert "more with smaller ratios" in str(long) and len(long.table().splitlines()) > len(long.rows)


def test_infinite_ratio_is_none_in_data():
    verdict = verify(torch.relu, lambda x: torch.relu(x)[:1], torch.randn(2, 3), backward=False)
    assert verdict.error_ratio == math.inf and verdict.to_dict()["error_ratio"] is None
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_verify_is_public():
    assert fastres.verify is verify


# ---- predictions ---------------------------------------------------------------------------------------------------


def test_predictions_are_compared_where_the_margin_decides():
    net = nn.Linear(6, 4)
    x = torch.randn(300, 6)
    same = compare_predictions(net, copy.deepcopy(net).bfloat16(), x.bfloat16(), batch_size=128)
    assert same and same.rows == 300 and 0 < same.decided < 300 and same.margin > 0.01
    assert "predictions agree" in str(same)
    shuffled = copy.deepcopy(net)
    with torch.no_grad():
        shuffled.weight[0].neg_()
    wrong = compare_predictions(net, shuffled, x)
    assert not wrong and wrong.agreed < wrong.decided and wrong.decided > 290
    assert compare_predictions(net, net, x, margin=1e9).decided == 0


# ---- refusals ------------------------------------------------------------------------------------------------------


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("holds a lock")


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((3, torch.relu, torch.ones(2)), {}, TypeError, "reference: got int"),
        ((torch.relu, None, torch.ones(2)), {}, TypeError, "candidate: got NoneType"),
        ((torch.relu, torch.relu, 3.0), {}, TypeError, "inputs: got float"),
        ((torch.relu, torch.relu, ()), {}, ValueError, "inputs: no tensor"),
        ((torch.relu, torch.relu, torch.ones(2, dtype=torch.cfloat)), {}, TypeError, "input is complex"),
        ((torch.relu, torch.relu, torch.ones(2)), {"training": 1}, TypeError, "training: got 1"),
        ((torch.relu, torch.relu, torch.ones(2)), {"dtype": torch.int8}, TypeError, "dtype: got torch.int8"),
        ((torch.relu, torch.relu, torch.ones(2)), {"floor_ulps": "4"}, TypeError, "floor_ulps: got '4'"),
        ((torch.relu, torch.relu, torch.ones(2)), {"floor_ulps": 100}, ValueError, "floor_ulps: got 100"),
        ((nn.ReLU(), nn.ReLU().eval(), torch.ones(2)), {}, ValueError, "reference.training is True"),
        ((Uncopyable(2, 2), nn.Linear(2, 2), torch.ones(2, 2)), {}, TypeError, "reference: .*holds a lock"),
        ((lambda x: None, torch.relu, torch.ones(2)), {}, ValueError, "reference: its output holds no tensor"),
        ((torch.relu, torch.linalg.inv, torch.ones(2)), {}, RuntimeError, "the candidate raised"),
        ((nn.Linear(3, 2), nn.Linear(3, 2), torch.ones(2)), {}, RuntimeError, "the eager reference raised"),
    ],
)
def test_refusals_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        verify(*arguments, **options)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((nn.Linear(2, 2), nn.Linear(2, 2), [1]), {}, TypeError, "inputs: got list"),
        ((nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(0, 2)), {}, ValueError, "inputs: got shape"),
        ((nn.Linear(2, 2), nn.Linear(2, 1), torch.ones(3, 2)), {}, ValueError, r"candidate: returned \[3, 1\]"),
        ((nn.Linear(2, 3), nn.Linear(2, 2), torch.ones(3, 2)), {}, ValueError, r"the reference \[3, 3\]"),
        ((nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(3, 2)), {"batch_size": 0}, ValueError, "batch_size: got 0"),
    ],
)
def test_predictions_refuse_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        compare_predictions(*arguments, **options)
