"""verify's inputs, what it leaves alone, randomly initialized networks, its report and its refusals.

`test_row44_...` carries its row of tests/faults.md: verification on randomly initialized networks.
"""

import copy
import json
import math
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

import fastres
from fastres import models
from fastres.verify import Row, Verification, calibrate, compare_predictions, uncalibrated, verify
from nets import fused_network as network

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


# ---- randomly initialized networks --------------------------------------------------------------------------------


def test_row44_random_networks_are_calibrated_on_copies():
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


def test_row44_what_cannot_be_calibrated_is_said():
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
    verdict = verify(lambda x, r: torch.relu(x + r), torch.add, (torch.randn(3, 4), torch.randn(3, 4)))
    text = str(verdict)
    assert "FAILED" in text and "output" in text and "eager rms" in text and str(verdict.worst.name) in text
    assert all(len(line) < 140 for line in text.splitlines())
    data = json.loads(json.dumps(verdict.to_dict()))
    assert data["passed"] is False and data["dtype"] == "float32" and len(data["rows"]) == len(verdict.rows)
    names = "name kind shape dtype error_rms eager_rms error_max eager_max floor ratio passed message"
    assert set(data["rows"][0]) >= set(names.split())
    assert isinstance(verdict, Verification) and isinstance(verdict.worst, Row) and fastres.verify is verify
    net = models.cifar_resnet(8)
    long = verify(net, copy.deepcopy(net), torch.randn(2, 3, 8, 8))
    assert "more with smaller ratios" in str(long) and len(long.table().splitlines()) > len(long.rows)


def test_infinite_ratio_is_none_in_data():
    verdict = verify(torch.relu, lambda x: torch.relu(x)[:1], torch.randn(2, 3), backward=False)
    assert verdict.error_ratio == math.inf and verdict.to_dict()["error_ratio"] is None
    json.dumps(verdict.to_dict(), allow_nan=False)


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
