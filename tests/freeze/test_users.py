"""What users of freeze have hit, on the default path: rows 2, 5, 7, 10, 11, 12, 13, 17 and 18 of their reports."""

import copy
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fastres
from fastres.graph.cost import _products
from fastres.graph.normalize import aten
from fastres.inference import tune
from freeze_cases import Net, cifar, compare, freeze, images, notes, settle

# ---- a flag of the source --------------------------------------------------------------------------------------------


class Flags(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.adapter, self.enabled, self.gains, self.mode = cifar(), nn.Linear(5, 5), False, [1.0, 2.0], "a"

    def forward(self, x):
        y = self.net(x) * sum(self.gains)
        y = self.adapter(y) if self.enabled else y
        return y if self.mode == "a" else -y


CHANGES = {
    "enabled": lambda net: setattr(net, "enabled", True),
    "mode": lambda net: setattr(net, "mode", "b"),
    "gains": lambda net: net.gains.append(3.0),
    "adapter": lambda net: setattr(net, "adapter", nn.Identity()),
    "net.avgpool": lambda net: setattr(net.net, "avgpool", nn.AdaptiveMaxPool2d(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_row2_refresh_refuses_a_source_with_another_attribute(name):
    net = Flags().eval()
    frozen, x = freeze(net, images(2, 16), tune=False), images(3, 16)
    want = frozen(x)
    net.train(), net.eval()
    assert not frozen.is_stale() and frozen.refresh() is None
    CHANGES[name](net)
    assert frozen.is_stale()
    with pytest.raises(RuntimeError, match=f"refresh: the source has changed, freeze it again: {name}"):
        frozen.refresh()
    assert torch.equal(frozen(x), want)
    compare(net, freeze(net, images(2, 16), tune=False), x)


def test_row2_the_sources_state_dict_goes_into_the_source():
    net = cifar()
    frozen = freeze(net, images(2, 16), tune=False, verify=False)
    with pytest.raises(RuntimeError, match=r"load the source's state_dict into the source, then call refresh\(\)"):
        frozen.load_state_dict(net.state_dict())
    frozen.load_state_dict(copy.deepcopy(frozen).state_dict())


# ---- a first operator that writes to its input -----------------------------------------------------------------------

WRITERS = {
    "relu": lambda net, x: net.first(F.relu_(x)),
    "method": lambda net, x: net.first(x.mul_(2).sub_(1)),
    "residual after": lambda net, x: (lambda y: net.conv2(F.relu(net.bn2(net.conv(y)))) .mean(1, True) + x)(F.relu_(x)),
    "residual before": lambda net, x: (lambda r, y: net.first(y).mean(1, True) + r)(x.clone(), F.relu_(x)),
    "view": lambda net, x: net.first((x[:, :2].clamp_(0), x)[1]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITERS)
def test_row5_an_input_that_the_source_writes_to_is_left_alone_and_the_answer_is_eagers(case):
    net, x = Net(WRITERS[case]), images(3) - 0.5
    frozen = freeze(net, images(2) - 0.5, tune=False)
    assert "writes to its input in place; the frozen network leaves it alone" in notes(frozen)
    want, given = net(x.clone()), x.clone()
    for _ in range(3):
        torch.testing.assert_close(frozen(given), want, rtol=1e-4, atol=1e-4)
        assert torch.equal(given, x)


# ---- feature extractors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_row7_feature_extractors_have_a_graph(name, caplog):
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    net = settle(getattr(torchvision.models, name)(weights=None).eval())
    nodes = get_graph_node_names(net)[1]
    net = create_feature_extractor(net, [nodes[len(nodes) // 2], nodes[-3]])
    frozen = freeze(net, images(2, 64), tune=False)
    assert frozen.report.capture == "graph" and "fault" not in caplog.text
    compare(net, frozen, images(3, 64), tol=1e-3)


def test_row7_graph_modules_with_lists_and_dicts_have_a_graph():
    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return {"a": [self.conv(x), x], "b": (x, {"c": x * 2})}

    net = torch.fx.symbolic_trace(Outputs()).eval()
    compare(net, freeze(net, images(2), tune=False), images(3))


# ---- gradients of the input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["graph", "modules"])
@pytest.mark.parametrize("case", ["cifar", "saliency", "two outputs"])
def test_row10_a_differentiable_network_gives_the_inputs_gradient(case, capture, tmp_path):
    net = {
        "cifar": cifar(),
        "saliency": Net(lambda net, x: F.relu(net.second(F.silu(net.first(x))) + net.first(x)).amax((2, 3))),
        "two outputs": Net(lambda net, x: (net.first(x), F.hardswish(net.second(net.first(x))))),
    }[case]

    def gradient(model, dtype=torch.float32):
        x = images(3, 16).to(dtype).requires_grad_()
        outputs = model(x)
        sum((y**2).sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        return x.grad

    torch.manual_seed(0)
    frozen = fastres.freeze(net, images(2, 16), capture=capture, tune=False, differentiable=True)
    made = [frozen, copy.deepcopy(frozen)]
    if capture == "graph":
        frozen.save(tmp_path / "net.fastres")
        made.append(fastres.load(tmp_path / "net.fastres"))
    torch.manual_seed(1)
    exact = gradient(copy.deepcopy(net).double(), torch.float64)
    torch.manual_seed(1)
    eager = (gradient(net) - exact).abs().max()
    for model in made:
        torch.manual_seed(1)
        got = gradient(model)
        assert (got - exact).abs().max() <= 4 * eager + 1e-5 * exact.abs().max()
        assert all(t.grad is None for t in model.parameters())


@pytest.mark.parametrize("capture", ["graph", "modules"])
def test_row10_without_it_the_error_names_the_option(capture):
    net = cifar()
    frozen, x = freeze(net, images(2, 16), capture=capture, tune=False), images(2, 16)
    y = frozen(x.clone().requires_grad_())
    torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="differentiable=True"):
        y.sum().backward()
    with torch.no_grad():
        assert not frozen(x.clone().requires_grad_()).requires_grad
    assert not frozen(x).requires_grad


# ---- modules that hold tensors with a history ------------------------------------------------------------------------


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen, self.last = Net(lambda net, x: F.relu(net.first(x))), [], None

    def forward(self, x):
        self.last = self.net(x)
        return self.last


def hooked(change):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    change(net[0])
    return settle(net)


HISTORIES = {
    "an activation": Keeps,
    "weight_norm": lambda: hooked(nn.utils.weight_norm),
    "spectral_norm": lambda: hooked(nn.utils.spectral_norm),
    "pruning": lambda: hooked(lambda conv: prune.l1_unstructured(conv, "weight", 0.3)),
    "parametrized": lambda: hooked(nn.utils.parametrizations.weight_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("case", HISTORIES)
def test_row11_modules_that_hold_tensors_with_a_history_are_copied(case):
    net = HISTORIES[case]().train()
    net(images(4)).sum().backward()
    held = dict(vars(net))
    net.eval()
    net(images(4).requires_grad_())
    frozen = fastres.freeze(net, images(2), tune=False)
    compare(net, frozen, images(3))
    assert fastres.verify(net, copy_ := frozen, images(2), training=False, backward=False) and copy_ is frozen
    assert fastres.swap(net, verify=images(2)).rows is not None and vars(net).keys() == held.keys()


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_row12_what_no_network_takes_is_said_at_once_and_remembered(monkeypatch):
    net = cifar()
    frozen = freeze(net, images(2, 16), tune=False, verify=False)
    tried = []
    monkeypatch.setattr("fastres.inference.network.sharing_copy", lambda model: tried.append(1) or copy.deepcopy(model))
    with pytest.raises(
        TypeError, match=r"^x: got a numpy.ndarray float32 \[2, 3, 16, 16\], expected a tensor"
    ) as raised:
        frozen(np.zeros((2, 3, 16, 16), np.float32))
    assert len(str(raised.value)) < 200 and not tried
    for bad in (images(2, 16)[0], (images(2, 16) * 255).to(torch.uint8), torch.zeros(2, 5, 16, 16)):
        for _ in range(3):
            with pytest.raises(
                ValueError, match="input: got .* and it cannot be for this: the source raises "
            ) as raised:
                frozen(bad)
            assert "torch.export" not in str(raised.value)
    assert len(tried) == 3


# ---- names of types, progress, bounds, verdicts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16), ("fp64", torch.float64)]
)
def test_row13_a_dtype_by_its_name(name, dtype):
    assert freeze(cifar(), images(2, 16), tune=False, verify=False, dtype=name).dtype is dtype
    with pytest.raises(TypeError, match="dtype: got 'half', expected one of float32, .*'bf16'"):
        freeze(cifar(), images(2, 16), dtype="half")


def test_row13_freeze_logs_what_it_does(caplog):
    with caplog.at_level(logging.INFO, "fastres"):
        freeze(cifar(), images(2, 16))
    said = [record.getMessage() for record in caplog.records if record.name == "fastres"]
    assert [text.rpartition(": ")[2] for text in said] == [
        "capturing its graph",
        "choosing how it runs, by measuring for seconds",
        "comparing its answers with float64's",
    ]


@pytest.mark.parametrize(
    "geometry", [(3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 12, 12), (1, 2, 0, 1), (7, 2, 3, 1), (2, 3, 1, 2)]
)
def test_row17_taps_in_the_padding_cost_nothing(geometry):
    kernel, stride, padding, dilation = geometry
    x, weight = torch.ones(2, 3, 9, 11, dtype=torch.float64), torch.ones(4, 3, kernel, kernel, dtype=torch.float64)
    out = F.conv2d(x, weight, None, stride, padding, dilation)
    meta = [SimpleNamespace(meta={"size": tuple(t.shape)}) for t in (x, weight)]
    where = [[value] * 2 for value in (stride, padding, dilation)]
    conv = SimpleNamespace(target=aten.conv2d.default, args=(*meta, None, *where, 1), meta={"size": tuple(out.shape)})
    assert _products(conv) == int(out.sum())  # of ones: each product counts once


@pytest.mark.parametrize("rounds", [1, 7])
def test_row17_a_bound_is_never_above_the_time(rounds, monkeypatch):
    monkeypatch.setattr(tune, "ROUNDS", rounds)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=24, dilation=24), nn.BatchNorm2d(8), nn.ReLU()).eval()
    for model, x in ((settle(net), torch.randn(2, 8, 32, 32)), (cifar(), images(4, 32))):
        report = freeze(model, x, verify=False).report
        assert report.bound is None or report.bound <= report.milliseconds["frozen"]


def test_row18_slower_is_said_only_where_every_round_is(monkeypatch, caplog):
    times = {"eager": [1.0, 1.1, 1.2], "frozen": [1.2, 1.25, 1.1]}
    measure = tune.measure
    monkeypatch.setattr(tune, "measure", lambda calls, *rest: times if "eager" in calls else measure(calls, *rest))
    assert "slower" not in notes(freeze(cifar(), images(2, 16), verify=False)) + caplog.text
    times["frozen"] = [1.4, 1.3, 1.4]
    frozen = freeze(cifar(), images(2, 16), verify=False)
    assert "slower than eager on the example: 1.3 to 1.4 ms, eager 1 to 1.2 ms" in notes(frozen)
    assert "slower than eager" in caplog.text
