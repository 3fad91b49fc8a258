"""The gate of int8: real data, planted faults that are found and moved back, what it counts, when it is weak."""

import copy
import math

import pytest
import torch
from torch import nn

import fastres
from fastres.graph.recipe import Range
from fastres.inference import FrozenModel
from fastres.inference.gate import Gate, Score, checked_metric, settle, snr
from int8_cases import digits, frozen_int8, moved, plant

pytestmark = pytest.mark.xdist_group("int8-digits")


def accuracy(network, images, labels):
    with torch.no_grad():
        return float((network(images).argmax(1) == labels).double().mean())


def slot_of(graph, name):
    return next(step.writes for step in graph.steps if step.name == name)


# ---- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", ["mse", "percentile", "minmax"])
def test_digits_keep_their_accuracy(observer):
    net, train, images, labels = digits()
    frozen = frozen_int8(net, train[:256], observer=observer)
    found = frozen.report.quantization
    assert found.holds and found.counts == {"int8": 20} and found.first == "" and not found.notes
    assert accuracy(net, images, labels) >= 0.97
    assert accuracy(net, images, labels) - accuracy(frozen, images, labels) <= 0.003
    with torch.no_grad():
        agreement = float((net(images).argmax(1) == frozen(images).argmax(1)).double().mean())
    assert agreement >= 0.995
    assert found.snr > 25 and min(layer.snr for layer in found.layers) > 20
    assert [layer.name for layer in found.layers][::19] == ["conv1", "fc"]


# ---- planted faults --------------------------------------------------------------------------------------------------

PLACE = "layer2.1.conv1"
READER = "layer2.1.conv2"


def wrong_scale(old):
    return Range(old.scale * 400, old.zero_point)


def swapped_zero_point(old):
    return Range(old.scale, 255 - old.zero_point)


def saturating(old):
    return Range(old.scale / 60, old.zero_point)


@pytest.mark.parametrize("fault", [wrong_scale, swapped_zero_point, saturating])
def test_a_planted_fault_is_found_and_moved_back(fault, monkeypatch):
    net, train, images, labels = digits()

    def change(graph, ranges):
        slot = slot_of(graph, PLACE)
        ranges[slot] = fault(ranges[slot])

    plant(monkeypatch, change)
    frozen = frozen_int8(net, train[:128])
    found = frozen.report.quantization
    assert found.holds and found.first, found
    assert moved(frozen) == [READER]  # it reads the numbers that are wrong
    (layer,) = [layer for layer in found.layers if layer.name == READER]
    assert "moved back" in layer.reason and layer.alone < 15
    assert f"{READER} stays {layer.precision}" in str(frozen.report)
    assert accuracy(net, images, labels) - accuracy(frozen, images, labels) <= 0.003


def test_a_dead_channel_costs_nothing():
    net, train, images, labels = digits()
    net = copy.deepcopy(net)
    with torch.no_grad():
        bn = net.get_submodule("layer2.1.bn1")
        bn.weight[3] = bn.bias[3] = 0
        net.get_submodule(PLACE).weight[5].zero_()
    frozen = frozen_int8(net, train[:128])
    assert frozen.report.quantization.holds and not moved(frozen)
    assert accuracy(net, images, labels) - accuracy(frozen, images, labels) <= 0.003


def test_one_channel_a_hundred_times_the_rest():
    """The same network: what a channel gains, the next weight loses. One scale for all channels is too coarse then."""
    net, train, images, labels = digits()
    other = copy.deepcopy(net)
    factor = 400.0
    with torch.no_grad():
        bn = other.get_submodule("layer2.1.bn1")
        bn.weight[2] *= factor
        bn.bias[2] *= factor
        other.get_submodule(READER).weight[:, 2] /= factor
        torch.testing.assert_close(other(images[:8]), net(images[:8]), rtol=1e-3, atol=1e-3)
    frozen = frozen_int8(other, train[:128], observer="minmax")
    found = frozen.report.quantization
    assert found.holds and READER in moved(frozen) and len(moved(frozen)) <= 3, found
    assert accuracy(net, images, labels) - accuracy(frozen, images, labels) <= 0.003


def test_where_nothing_helps_the_float_network_is_returned(caplog):
    net, train, images, _ = digits()
    tries = []

    def never(network):
        tries.append(network)
        return 1.0 if len(tries) == 1 else 0.0

    frozen = frozen_int8(net, train[:16], gate=never)
    found = frozen.report.quantization
    assert frozen is not None and not frozen.is_quantized and not found.holds and frozen.report.dtype == "float32"
    assert set(found.counts) == {"float32"}
    assert "the metric drops by 1, more than 0.01" in found.first
    assert any("int8 does not pass the gate, and float32 is returned" in note for note in frozen.report.notes)
    assert "float32 is returned" in caplog.text
    want = fastres.freeze(net, train[:2], tune=False, verify=False)
    torch.testing.assert_close(frozen(images), want(images), rtol=1e-5, atol=1e-5)


# ---- the caller's metric ---------------------------------------------------------------------------------------------


def test_the_callers_metric_decides_alone(monkeypatch):
    net, train, images, labels = digits()
    seen = []

    def metric(network):
        assert isinstance(network, FrozenModel)
        seen.append(accuracy(network, images[:100], labels[:100]))
        return seen[-1]

    def change(graph, ranges):
        slot = slot_of(graph, PLACE)
        ranges[slot] = wrong_scale(ranges[slot])

    frozen = frozen_int8(net, train[:32], gate=metric, max_drop=0.0)
    found = frozen.report.quantization
    assert found.metric == seen[-1] and found.baseline == seen[0] and "metric" in str(found)
    plant(monkeypatch, change)
    assert frozen_int8(net, train[:32], gate=metric, max_drop=1.0).report.quantization.counts == {"int8": 20}
    assert moved(frozen_int8(net, train[:32], gate=metric, max_drop=0.005))


@pytest.mark.parametrize(("value", "error"), [("good", TypeError), (None, TypeError), (math.nan, ValueError)])
def test_a_metric_that_is_no_number(value, error):
    with pytest.raises(error, match="gate: returned"):
        checked_metric(value)
    assert checked_metric(torch.tensor(0.5)) == 0.5 and checked_metric(True) == 1.0


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_snr():
    want = torch.randn(100, 10, dtype=torch.float64)
    assert snr(want, want + 0.01 * (want - want.mean())) == pytest.approx(40.0)
    assert snr(want, want) == 300 and snr(want, want * math.nan) == -300
    assert snr(torch.ones(3), torch.ones(3)) == 300 and snr(torch.ones(3), torch.zeros(3)) == -300


def test_images_without_a_margin_do_not_count():
    logits = torch.tensor([[5.0, 0.0, -5.0], [1.0, 1.001, -5.0]])
    gate = Gate([[logits]])
    flipped = logits.clone()
    flipped[1] = torch.tensor([1.001, 1.0, -5.0])
    score = gate.score([[flipped]])
    assert score.holds and (score.agreement, score.counted) == (1.0, 1)
    flipped[0] = torch.tensor([0.0, 5.0, -5.0])
    assert not gate.score([[flipped]]).holds
    alike = Gate([[torch.tensor([[0.0, 5.0, 5.001], [9.0, 2.0, 9.001]])]])
    score = alike.score(alike.wants)
    assert score.holds and score.agreement is None


def test_outputs_that_are_no_logits_are_judged_by_their_snr():
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5), torch.tensor([1, 2])]
    gate = Gate([maps])
    assert not gate.is_logits and "they are no logits" in gate.describe()
    worse = [maps[0], maps[1] + 0.2 * torch.randn(2, 5), maps[2]]
    assert gate.score([maps]).holds and "below 20" in gate.score([worse]).fault


@pytest.mark.parametrize(
    ("count", "change", "words"),
    [(1, None, "1 calibration image"), (4, None, "4 calibration images"), (32, "constant", "answered alike")],
)
def test_a_weak_gate_says_so(count, change, words):
    net, train, *_ = digits()
    images = train[:count] if change is None else torch.full_like(train[:count], 0.3)
    found = frozen_int8(net, images).report.quantization
    assert any("the gate is weak" in note and words in note for note in found.notes), found.notes


# ---- how many go back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 5, 7, 9])
def test_the_fewest_layers_go_back(needed):
    damage = {layer: (layer * 7) % 10 for layer in range(10)}
    tried = []

    def score(back):
        tried.append(len(back))
        return Score(1.0, fault="" if len(back) >= needed else "bad")

    found = settle(list(range(10)), list, score, damage.__getitem__)
    assert len(found.network) == needed and found.score.holds
    assert found.network == sorted(damage, key=damage.get)[:needed]
    assert len(tried) <= 8


def test_a_network_of_one_layer_that_does_not_pass():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    images = torch.randn(20, 3, 8, 8)
    images[0] *= 1e4  # whose range leaves nothing for the others

    def worst(network):
        with torch.no_grad():
            return -float((network(images[1:]) - net(images[1:])).abs().max())

    frozen = frozen_int8(net, images, observer="minmax", gate=worst, max_drop=1e-3)
    assert not frozen.is_quantized and not frozen.report.quantization.holds
