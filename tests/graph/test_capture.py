"""Capturing a network: which batches and sizes a graph is for, FrozenModel.capture, networks that have no graph."""

import copy
import gc
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastres
from fastres.graph.fold import norm_affine
from fastres.inference import network
from freeze_cases import Net, agree, cifar, compare, fixed, freeze, images, notes
from swap_cases import scramble

# ---- the batch -------------------------------------------------------------------------------------------------------

ASKS = {
    "large": lambda net, x: net.first(x) * 2 if x.shape[0] > 4 else net.first(x),
    "len": lambda net, x: net.first(x) * 2 if len(x) > 4 else net.first(x),
    "odd": lambda net, x: net.first(x) * 2 if x.shape[0] % 2 else net.first(x),
    "three": lambda net, x: net.first(x) * 2 if x.shape[0] == 3 else net.first(x),
    "min": lambda net, x: net.first(x)[: min(x.shape[0], 4)],
    "loop": lambda net, x: torch.stack([net.first(t[None])[0] for t in x]),
    "every other": lambda net, x: net.first(x)[::2],
    "one": lambda net, x: (lambda y: y.squeeze(0) if len(x) == 1 else y)(net.first(x)),
}


@pytest.mark.parametrize("case", ASKS)
def test_a_forward_that_asks_for_the_batch_is_captured_for_each(case):
    frozen = agree(Net(ASKS[case]), batches=(2, 1, 3, 5, 8))
    assert frozen._variants or case == "min"  # which has an operator


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.first(x).view(-1, 2, 2, 8, 8).sum(2).flatten(1),
        lambda net, x: sum(net.conv(torch.cat([x, x])).chunk(2)),
        lambda net, x: net.first(x).view(x.shape[0], 2, 2, 8, 8).transpose(1, 2).reshape(x.shape[0], -1),
        lambda net, x: net.first(x).repeat(2, 1, 1, 1).reshape(x.shape[0], -1) / x.shape[0],
    ],
)
def test_a_forward_that_only_uses_the_batch_is_captured_once(forward):
    frozen = agree(Net(forward), batches=(2, 1, 3, 8))
    assert not frozen._variants and "batch" not in notes(frozen)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_batch_by_one_capture(batch):
    frozen = agree(cifar(), images(batch, 16), batches=(0, 1, 2, 7))
    assert not frozen._variants


@pytest.mark.parametrize("forward", [lambda net, x: net.first(x).nonzero(), lambda net, x: x[net.first(x)[:, :3] > 0]])
def test_sizes_that_depend_on_the_data(forward):
    agree(Net(forward), verify=False, capture="auto")


# ---- other image sizes -----------------------------------------------------------------------------------------------


def test_other_image_sizes_of_fixed_graphs_are_captured_on_their_first_call_and_share_the_weights(caplog):
    net = fixed()
    frozen = freeze(net, images(2, 16), tune=False, verify=False)
    with caplog.at_level(logging.INFO, "fastres"):
        for size in (24, 8, 24, 16):
            compare(net, frozen, images(3, size))
    said = [record.getMessage() for record in caplog.records if record.name == "fastres"]
    assert said == [f"freeze: Net captured again for [3, 3, {size}, {size}]" for size in (24, 8)]
    assert len(frozen._variants) == 2
    mine = {t.data_ptr() for t in frozen.weights.buffers()}
    for variant in frozen._variants:
        assert {t.data_ptr() for t in variant.constants(frozen.weights)} <= mine
    assert len(mine) == len(list(frozen.weights.buffers()))
    with torch.no_grad():
        net.bn.bias.add_(1)
    message = r"got \[2, 3, 32, 32\]; .* captured for \[N, 3, H, 16\].*has changed since: refresh\(\) first"
    for call in (frozen, frozen.capture):
        with pytest.raises(RuntimeError, match=message):
            call(images(2, 32))
    frozen.refresh()
    for size in (16, 24, 32):
        compare(net, frozen, images(3, size))


def test_capture_takes_what_freeze_takes_and_does_it_once(caplog):
    class Arguments(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = cifar()

        def forward(self, x, scale=1.0):
            return self.net(x) * scale * len(x[0, 0, 0].unbind())

    net = Arguments().eval()
    frozen = freeze(net, images(2, 16), tune=False, verify=False)
    with caplog.at_level(logging.INFO, "fastres"):
        for example in (images(5, 12), (images(2, 12),), {"x": images(2, 12)}, images(1, 16)):
            assert frozen.capture(example) is None
        assert caplog.text.count("captured again") == 1 and len(frozen._variants) == 1
        frozen.capture((images(2, 12), 2.0))
        assert "captured again for [2, 3, 12, 12] with [2.0]" in caplog.text
        caplog.clear()
        compare(net, frozen, images(3, 12))
        compare(net, frozen, images(3, 12), scale=2.0)
        assert "captured" not in caplog.text
    with pytest.raises(ValueError, match=r"input: got \[2, 3\]; .*\[N, 3, H, 16\], and it cannot be for this: "):
        frozen.capture(torch.ones(2, 3))
    with pytest.raises(TypeError, match="unexpected keyword"):
        frozen.capture({"x": images(2, 12), "size": 3})


def asks_for_the_width():
    """A network with weights that wide images alone meet, and a constant that its code makes."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.wide, self.wide_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, scale=1.0):
            y = self.bn(self.conv(x)).relu() * scale
            y = self.wide_bn(self.wide(y)) if x.shape[-1] > 20 else y * torch.arange(1.0, 5.0)[:, None, None]
            return y.mean((2, 3))

    return scramble(Net()).eval()


@pytest.mark.parametrize("channels_last", [True, False])
def test_examples_are_captured_copied_pickled_and_saved_with_the_model(tmp_path, caplog, channels_last):
    net = asks_for_the_width()
    examples = [images(2, 32), (images(1, 8), 0.5), images(3, 24)]  # the last is like the first of them
    with caplog.at_level(logging.INFO, "fastres"):
        frozen = fastres.freeze(net, images(2, 8), examples=examples, tune=False)
    assert caplog.text.count("captured again") == len(frozen._variants) == 2
    assert frozen.report.verification and caplog.text.count("comparing its answers") == 4
    frozen.use_channels_last(channels_last)
    names = set(frozen.state_dict())
    assert not any("wide" in name or "#" in name for name in names)  # the state is the example's
    frozen.save(tmp_path / "net")
    with torch.no_grad():
        net.bn.bias.add_(1)
    calls = [(images(5, 12),), (images(4, 40),), (images(3, 8), 0.5)]
    want = [frozen(*call) for call in calls]
    loaded, copied, unpickled = (
        fastres.load(tmp_path / "net"),
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
    )
    refreshed = copy.deepcopy(frozen)
    refreshed.refresh()
    for call, y in zip(calls, want, strict=True):
        for other in (loaded, copied, unpickled):
            assert torch.equal(other(*call), y)
        torch.testing.assert_close(refreshed(*call), net(*call), rtol=1e-4, atol=1e-4)
    assert len(refreshed._variants) == 2
    for other in (loaded, copied, unpickled):
        assert set(other.state_dict()) == names
        half = other.to(torch.float64)
        for call, y in zip(calls, want, strict=True):  # what a capture has for itself moves too
            torch.testing.assert_close(half(*call), y.double(), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="is gone: freeze the model with such a call among its examples"):
        loaded(images(2, 8), 0.25)
    loaded = fastres.load(tmp_path / "net")
    loaded.load_state_dict(refreshed.state_dict())  # the wide network's own weights are not in it
    torch.testing.assert_close(loaded(*calls[0]), net(*calls[0]), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="is gone"):
        loaded(*calls[1])


def test_a_source_whose_other_capture_no_longer_folds_changes_nothing():
    net = asks_for_the_width()
    frozen = fastres.freeze(net, images(2, 8), examples=[images(2, 32)], tune=False, verify=False)
    before, want = {name: t.clone() for name, t in frozen.state_dict().items()}, frozen(images(2, 8))
    del net.wide.weight  # which wide images alone meet
    with torch.no_grad():
        net.bn.bias.add_(1)
    with pytest.raises(RuntimeError, match="refresh: the source"):
        frozen.refresh()
    assert want.isfinite().all() and all(torch.equal(t, before[name]) for name, t in frozen.state_dict().items())


def test_a_network_without_a_graph_loads_its_state():
    net = Net(lambda net, x: net.first(x) if float(x.sum()) < 1e30 else x)
    frozen = freeze(net, images(), tune=False, verify=False)
    assert frozen.report.capture == "modules"
    frozen.load_state_dict(frozen.state_dict())


def test_bad_examples_are_refused_by_their_place():
    net = asks_for_the_width()
    for examples, error, words in (
        (images(), TypeError, "examples: got Tensor, expected a list"),
        ([images(), 3], TypeError, r"examples\[1\]: got int, expected a tensor"),
        ([images(0)], ValueError, r"examples\[0\]: got float32 \[0, 3, 8, 8\] without an element"),
        ([images(2, 8), images()[:, :2]], ValueError, r"examples\[1\]: the model does not run on .*expected input"),
    ):
        with pytest.raises(error, match=words):
            fastres.freeze(net, images(2, 8), examples=examples, tune=False)


def test_at_most_so_many_captures_are_kept_those_used_last(monkeypatch, caplog):
    monkeypatch.setattr(network, "VARIANTS", 5)
    net = fixed()
    frozen = freeze(net, images(), tune=False, verify=False)
    with caplog.at_level(logging.WARNING, "fastres"):
        for size in range(3, 3 + network.VARIANTS + 3):
            frozen.capture(images(2, size))
            compare(net, frozen, images(2, 3))  # in use all along: it stays
    assert len(frozen._variants) == network.VARIANTS and caplog.text.count("take turns") == 1
    assert not any(variant.captured.takes(frozen._signature.take((images(2, 4),), {})) for variant in frozen._variants)


def test_other_image_sizes_need_the_source():
    net = fixed()
    frozen = freeze(net, images(2, 16), tune=False, verify=False)
    assert copy.deepcopy(frozen)(images(1, 24)).shape == (1, 4, 24)
    del net
    gc.collect()
    for call in (frozen, frozen.capture):
        with pytest.raises(RuntimeError, match=r"input: got \[1, 3, 24, 24\].*for \[N, 3, H, 16\].*source.*is gone"):
            call(images(1, 24))
    assert frozen(images(1, 16)).shape == (1, 4, 16)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (3, 16), (2, 3, 16, 16, 1)])
def test_inputs_that_the_source_does_not_take(shape):
    net = cifar()
    frozen = freeze(net, images(2, 16), tune=False, verify=False)
    with pytest.raises(ValueError, match=r"input: got \[.*captured for \[N, 3, H, W\], and it cannot be for this"):
        frozen(torch.randn(shape))
    assert frozen(images(2, 16)).shape == (2, 5)


# ---- networks without a graph ----------------------------------------------------------------------------------------


def remembers(net, x):
    t = net.first(x)
    net.last, last = t.mean(), getattr(net, "last", 0.0)
    return t + last


def counts(net, x):
    net.numbers["calls"] += 1
    return net.first(x) * net.numbers["calls"]


def increments(net, x):
    net.number += 1
    return net.first(x)


def hooked(net):
    net.conv.register_forward_hook(lambda module, args, y: y * 2)


class Counts(Net):
    number = 0


class StaysInTraining(Net):
    def train(self, mode=True):
        return super().train(True)


FIRST = lambda net, x: net.first(x)  # noqa: E731
NO_GRAPH = {
    "number": (lambda: Counts(increments), "its forward changes number"),
    "attribute": (lambda: Net(remembers), "differently from call to call"),
    "dictionary": (
        lambda: Net(counts, lambda net: setattr(net, "numbers", {"calls": 0})),
        "differently from call to call",
    ),
    "buffer": (
        lambda: Net(lambda net, x: net.first(x) * net.n.add_(1), lambda net: net.register_buffer("n", torch.zeros(()))),
        "its forward writes to n",
    ),
    "data": (lambda: Net(lambda net, x: net.first(x) if x.mean() > 0 else net.conv(x)), "data-dependent"),
    "value": (lambda: Net(lambda net, x: net.first(x) * float(x.numpy()[0, 0, 0, 0])), "torch.export: "),
    "training": (lambda: StaysInTraining(FIRST), "running_mean"),
    "hooks": (lambda: Net(FIRST, hooked), "conv has hooks"),
    "patched": (lambda: Net(FIRST, lambda net: setattr(net.bn, "forward", torch.tanh)), "bn has hooks or a forward"),
}


@pytest.mark.parametrize("case", NO_GRAPH)
def test_networks_without_a_graph_keep_their_code_and_say_why(case, capfd):
    make, reason = NO_GRAPH[case]
    net, same = make(), make()
    same.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match=f"capture: got 'graph', and .* has none: .*{reason}"):
        freeze(net, torch.rand(2, 3, 8, 8), capture="graph", tune=False)
    frozen = freeze(net, torch.rand(2, 3, 8, 8), tune=False, verify=False)
    assert frozen.report.capture == "modules" and reason in frozen.report.capture_reason and reason in notes(frozen)
    assert frozen.graph is None and frozen.report.steps == 0 and frozen.capture(images(2, 12)) is None
    assert not capfd.readouterr().err  # torch.export prints graphs
    if case in ("data", "value", "hooks", "patched"):  # the others count their calls
        for x in (torch.rand(2, 3, 8, 8), -torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8)):
            compare(net, frozen, x)


def test_hooks_on_every_module_are_no_graph():
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        frozen = freeze(Net(FIRST), images(), tune=False)
    finally:
        handle.remove()
    assert "hooks on every module are set" in frozen.report.capture_reason


def test_capture_is_checked():
    with pytest.raises(ValueError, match="capture: got 'trace', expected 'auto', 'graph' or 'modules'"):
        freeze(nn.Conv2d(3, 3, 1), images(), capture="trace")


# ---- faults of our own: planted, since no network is known that has one ----------------------------------------------


def test_a_fault_in_the_rewriting_loses_no_network(monkeypatch, caplog):
    def fails(*args):
        raise KeyError("a planted fault")

    monkeypatch.setattr("fastres.graph.rewrite.fuse", fails)
    frozen = freeze(Net(lambda net, x: F.relu(net.first(x))), images(), tune=False)
    assert frozen.report.capture == "modules" and "a fault of fastres" in frozen.report.capture_reason
    assert "planted" in caplog.text and frozen.report.verification


def test_a_graph_with_other_answers_is_a_fault_and_said_to_be(monkeypatch, caplog):
    monkeypatch.setattr("fastres.graph.fusions.conv_bn_act.norm_affine", lambda *args: norm_affine(*args[:4], 100.0))
    frozen = freeze(Net(lambda net, x: F.relu(net.first(x))), images(), tune=False)
    assert frozen.report.capture == "modules" and "answers the example otherwise" in frozen.report.capture_reason
    assert "a fault of fastres" in caplog.text and frozen.report.verification
