"""Choosing a plan: by times that noise cannot fool, made up here; what is measured; what does not run at all."""

import logging
import random

import pytest
import torch
from torch import nn

from fastres.inference import tune
from fastres.inference.tune import measure, measured_rates, prefer
from freeze_cases import Net, cifar, compare, freeze, images, notes, operators

CPU = torch.device("cpu")

# ---- the choice, by given times --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("default", "other", "best"),
    [
        ([10, 10, 10], [9, 9, 9], "other"),
        ([10, 10, 10], [9.6, 9.6, 9.6], "default"),  # within the margin
        ([10, 30, 10], [9, 31, 9], "other"),  # both slowed down
        ([10, 10, 10], [9, 12, 12], "default"),  # one lucky round
        ([10, 20, 20], [9.9, 10, 10], "default"),  # the default slowed down
        ([40], [10, 10, 10], "other"),  # given up as hopeless
        ([10, 10, 10], [40], "default"),
    ],
)
def test_47_another_candidate_must_win_by_its_fastest_round_and_in_most(default, other, best):
    assert prefer({"default": default, "other": other}, "default") == best


def test_47_the_margin_and_the_fastest_of_several():
    times = {"a": [10.0] * 3, "b": [9.2] * 3, "c": [9.0] * 3}
    assert prefer(times, "a") == "c" and prefer(times, "a", 0.2) == "a" and prefer({"a": [1.0]}, "a") == "a"
    assert prefer({"a": [10.0] * 3, "b": [9.9] * 3}, "a", 0.0) == "b"


def test_47_noise_chooses_nothing_that_is_not_faster():
    """Rounds that another process slows down up to threefold, half of them: 1 in 100 may be fooled, 1 in 20 miss."""
    draw = random.Random(0)

    def rounds(ms):
        return [ms * (draw.uniform(1, 3) if draw.random() < 0.5 else draw.uniform(1, 1.02)) for _ in range(tune.ROUNDS)]

    equal = [prefer({"a": rounds(10), "b": rounds(10)}, "a") for _ in range(1000)]
    faster = [prefer({"a": rounds(10), "b": rounds(7)}, "a") for _ in range(1000)]
    assert equal.count("b") <= 10 and faster.count("a") <= 150


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_measure_interleaves_and_gives_up_on_the_hopeless(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr(tune.time, "perf_counter", lambda: clock[0])

    def task(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds

        return run

    times = measure({"a": task("a", 0.01), "b": task("b", 0.02), "slow": task("slow", 0.1)}, CPU)
    assert order[:9] == ["a", "b", "slow"] * 3 and order.count("slow") == 3 and order.count("a") == 2 + tune.ROUNDS
    assert times["slow"] == pytest.approx([100]) and times["b"] == pytest.approx([20] * tune.ROUNDS)
    order.clear()
    assert len(measure({"a": task("a", 1.0), "b": task("b", 1.1)}, CPU)["a"]) == 3  # and no more: 2 seconds are over


def test_rates_of_the_machine_bound_what_a_network_reaches(monkeypatch):
    bandwidth, rate = measured_rates(CPU, torch.float32)
    assert 1e8 < bandwidth < 1e13 and 1e8 < rate < 1e15
    report = freeze(cifar(), images(8, 32), verify=False).report
    assert 0 < report.bound <= report.milliseconds["frozen"] and "of the bound" in str(report)
    # where others ran whenever the rates were measured: no rate that no run has shown, and no bound
    monkeypatch.setattr(tune, "measured_rates", lambda *args: (bandwidth / 1e4, rate / 1e4))
    report = freeze(cifar(), images(8, 32), verify=False).report
    assert report.bound is None and not report.rate and "no bound" in str(report) and "of the bound" not in str(report)


# ---- the plan --------------------------------------------------------------------------------------------------------


def given(monkeypatch, fastest):
    """Times by which the candidates of that name are faster than the others."""

    def measured(calls, device, rounds=3):
        for call in calls.values():
            call()
        return {name: [1.0 if name in fastest else 2.0] * 3 for name in calls}

    def timed(executor, inputs, constants, tile):
        found = executor.find_choices(inputs, constants)
        return {c.key: {way: [1.0 if way in fastest else 2.0] * 3 for way in c.within(tile)} for c, _ in found}

    monkeypatch.setattr(tune, "measure", measured)
    monkeypatch.setattr(tune, "_time_ways", timed)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(("fastest", "packed"), [("packed", 7), ("plain", 0), ("", 7)])
def test_packed_weights_are_a_choice_for_each_convolution(monkeypatch, fastest, packed):
    given(monkeypatch, [fastest])
    net = cifar()
    frozen = freeze(net, images(2, 16), verify=False, precision="exact")
    assert frozen.report.packed == packed and f"packed weights: {packed};" in str(frozen.report)
    ways = set(frozen.plan.choices.values())
    assert ways == {"plain" if fastest == "plain" else "packed"}
    assert all(key.startswith("conv_act 2x") and "float32" in key for key in frozen.plan.choices)
    compare(net, frozen, images(2, 16))
    frozen.forget()
    assert operators(frozen, images(2, 16)).get("mkldnn::_reorder_convolution_weight", 0) == packed


def test_47_slower_than_eager_is_said(monkeypatch, caplog):
    given(monkeypatch, ["eager"])
    with caplog.at_level(logging.WARNING, "fastres"):
        frozen = freeze(cifar(), images(2, 16), verify=False)
    assert frozen.report.speedup == 0.5 and "slower than eager on the example: 2 to 2 ms, eager 1 to 1 ms" in notes(
        frozen
    )
    assert "slower than eager" in caplog.text


def test_16_bit_answers_that_rounding_moves_far_do_not_cost_the_layout():
    """By the private function: which sums oneDNN takes in which order, and so the noise, is the machine's."""
    net = Net(lambda net, x: (net.first(x) + 300.0) - 300.0)  # in bfloat16, multiples of 2
    x = images(2, 16)
    with torch.no_grad():
        want = net(x)
    noise = want + 0.4 * want.abs().max() * torch.randn_like(want).clamp(-1, 1)

    class Frozen(nn.Module):
        dtype = torch.bfloat16

        def forward(self, x):
            return noise.to(self.dtype)

    assert tune._why_not_this_layout(Frozen(), net, x, want.bfloat16()) == ""
    Frozen.dtype = torch.float32
    assert "answers otherwise" in tune._why_not_this_layout(Frozen(), net, x, want)


@pytest.mark.parametrize("fastest", ["channels_last", "contiguous", ""])
def test_the_faster_layout(monkeypatch, fastest):
    given(monkeypatch, [fastest])
    net = cifar()
    frozen = freeze(net, images(2, 16), verify=False)
    assert frozen.report.memory_format == (fastest or "channels_last")
    assert frozen.plan.channels_last == (fastest != "contiguous")
    reason = "the faster of the two on the example" if fastest else "the other one is not clearly faster"
    assert frozen.report.memory_format_reason == reason
    weight = frozen.weights.layer1.get_submodule("0").conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == frozen.plan.channels_last
    compare(net, frozen, images(3, 16))


@pytest.mark.parametrize("capture", ["auto", "modules"])
def test_a_view_that_channels_last_has_not(capture):
    net = Net(lambda net, x: net.first(x).view(x.size(0), -1))
    frozen = freeze(net, images(), capture=capture, tune=False, verify=False)
    assert frozen.plan.channels_last == (capture == "auto")  # in a graph it is a reshape
    assert ("channels_last is out: the model takes a view()" in notes(frozen)) == (capture == "modules")
    compare(net, frozen, images(3))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Net(lambda net, x: (lambda y: y + y.mean(0, keepdim=True))(net.conv(x))), None),
        (lambda: Net(lambda net, x: net.conv(x).sum(0)), None),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), 2),
    ],
    ids=["mixes images", "sums them", "takes them apart"],
)
def test_51_a_network_that_mixes_images_runs_whole(monkeypatch, make, parts):
    given(monkeypatch, ["2"])
    monkeypatch.setattr(tune, "PARTS", (2,))
    net = make()
    frozen = freeze(net, images(6), verify=False)
    assert frozen.plan.images_at_a_time == frozen.report.images_at_a_time == parts
    compare(net, frozen, images(7))
