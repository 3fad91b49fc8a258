"""A frozen network on a CPU: one call a convolution, packs, memory shared between blocks, NaN, parts of a batch."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

import fastres
from fastres.inference import choose
from fastres.inference.conv import FrozenConv, frozen_convs
from fastres.inference.frozen import FrozenModel

vision = torchvision.models


def calibrated(net, size=64):
    """With running statistics of a batch, so that activations neither vanish nor explode."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        net.train()(torch.randn(8, 3, size, size))
    return net.eval()


def frozen_pair(net, batch=2, size=64, **how):
    net = calibrated(net, size)
    return net, fastres.freeze(net, torch.randn(batch, 3, size, size), **{"tune": False, "capture": "modules", **how})


def operators(f):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        f()
    return {event.key: event.count for event in trace.key_averages()}


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize(("name", "convs"), [("resnet18", 20), ("resnet50", 53)])
def test_one_call_for_each_convolution_and_nothing_beside(name, convs):
    net, frozen = frozen_pair(getattr(vision, name)())
    names = operators(lambda: frozen(torch.randn(2, 3, 64, 64)))
    calls = names["mkldnn::_convolution_pointwise"] + names["mkldnn::_convolution_pointwise_"]
    assert calls == convs
    apart = ("aten::add", "aten::add_", "aten::relu", "aten::relu_", "aten::clamp_min_", "aten::batch_norm")
    assert not any(n in names for n in (*apart, "aten::conv2d", "fastres::conv_act"))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            close(frozen(x), net(x))


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, None])
@pytest.mark.parametrize("norm", [True, False])
def test_activations_that_alone_read_a_convolution_go_into_it(act, norm):
    layers = [nn.Conv2d(3, 8, 3, padding=1), *([nn.BatchNorm2d(8)] if norm else []), *([act()] if act else [])]
    net, frozen = frozen_pair(nn.Sequential(*layers), size=16)
    fused = act in (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)
    conv = frozen.module[0]
    assert isinstance(conv, FrozenConv) and (conv.act != "none") == fused
    x = torch.randn(3, 3, 16, 16)
    close(frozen(x), net(x))
    assert sum(row.became.endswith(conv.act) for row in frozen.report.rows) == (1 if fused else 0)


class ReadTwice(nn.Module):
    """The convolution's output is read by an activation and by an addition."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        z = self.bn(self.conv(x))
        return self.relu(z) + z


class SharedAct(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.b(self.relu(self.a(x))))


@pytest.mark.parametrize("make", [ReadTwice, SharedAct])
def test_activations_with_other_readers_or_sources_stay(make):
    net, frozen = frozen_pair(make(), size=16)
    assert all(conv.act == "none" for conv in frozen_convs(frozen))
    x = torch.randn(2, 3, 16, 16)
    close(frozen(x), net(x))


def test_row10_nan_and_infinity_pass_as_in_eager():
    net, frozen = frozen_pair(vision.resnet18(num_classes=7))
    for value in (float("nan"), float("inf")):
        x = torch.randn(3, 3, 64, 64)
        x[1, 0, 5, 5] = value
        with torch.no_grad():
            got, want = frozen(x), net(x)
        assert torch.equal(got.isnan(), want.isnan()) and bool(got[1].isnan().any())
        close(got[[0, 2]], want[[0, 2]])
    x = torch.randn(2, 3, 64, 64)
    close(frozen(x), net(x).detach())
    shared = {t.data_ptr() for t in frozen.module.parameters()}
    assert {t.data_ptr() for t in frozen._engine._twin.parameters()} == shared  # no second copy of the weights
    other = {name: t * 0.9 for name, t in frozen.state_dict().items()}
    frozen.load_state_dict(other, assign=True)
    x[0, 0, 0, 0] = float("nan")
    close(frozen(x)[1], frozen(x[1:])[0])  # the twin follows replaced tensors


# ---- memory shared between blocks ------------------------------------------------------------------------------------


def test_features_between_blocks_survive():
    """A pyramid's outputs: those of whole stages, and one of a block inside a stage."""
    net = calibrated(vision.resnet18())
    stages = IntermediateLayerGetter(net, {"maxpool": "p", "layer1": "a", "layer2": "b", "layer4": "c"})
    frozen = fastres.freeze(stages, torch.randn(2, 3, 64, 64), tune=False, capture="modules")
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        want, got = stages(x), frozen(x)
    assert list(got) == list(want)
    for name in want:
        close(got[name], want[name])


class EveryBlock(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        net, found = self.net, []
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for block in net.layer1:
            x = block(x)
            found.append(x)
        return found


def test_a_network_that_keeps_every_blocks_output_is_noticed():
    net = EveryBlock(calibrated(vision.resnet50()))
    frozen = fastres.freeze(net, torch.randn(2, 3, 64, 64), tune=False, capture="modules")
    assert any("written over" in note for note in frozen.report.notes)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for got, want in zip(frozen(x), net(x), strict=True):
            close(got, want)


class OnRequest(EveryBlock):
    def forward(self, x, features=False):
        found = super().forward(x)
        return found if features else found[-1]


def test_a_flag_that_the_example_lacks_gets_true_features():
    net = OnRequest(calibrated(vision.resnet50()))
    frozen = fastres.freeze(net, torch.randn(2, 3, 64, 64), tune=False, capture="modules")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(frozen(x), net(x))
        assert frozen._overwrites  # the blocks' outputs are nobody else's there
        for call in (lambda model: model(x, features=True), lambda model: model(x, True)):
            frozen.overwrite_residuals(True)
            for got, want in zip(call(frozen), call(net), strict=True):
                close(got, want)


def test_a_hook_on_a_block_keeps_its_output():
    net, frozen = frozen_pair(vision.resnet50())
    kept = {}
    for model, key in ((net, "want"), (frozen.module, "got")):
        for i, block in enumerate(model.layer1):
            block.register_forward_hook(lambda m, a, y, i=i, key=key: kept.__setitem__((key, i), y))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        net(x)
        frozen(x)
    for i in range(3):
        close(kept["got", i], kept["want", i])


def test_the_input_is_never_written_to():
    for name in ("resnet18", "resnet50"):
        _, frozen = frozen_pair(getattr(vision, name)())
        x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        before = x.clone()
        assert torch.equal(frozen(x), frozen(x)) and torch.equal(x, before)
    block = calibrated(nn.Sequential(vision.resnet.BasicBlock(3, 3), vision.resnet.BasicBlock(3, 3)))
    frozen = fastres.freeze(block, torch.randn(2, 3, 8, 8), tune=False, capture="modules")
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    frozen(x)
    assert torch.equal(x, before)


# ---- packs -----------------------------------------------------------------------------------------------------------


def test_packs_are_in_no_copy_and_no_state():
    _, frozen = frozen_pair(vision.resnet18())
    x = torch.randn(2, 3, 64, 64)
    want = frozen(x)
    assert all(conv.packs.found for conv in frozen_convs(frozen))
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert isinstance(other, FrozenModel) and not any(conv.packs.found for conv in frozen_convs(other))
        torch.testing.assert_close(other(x), want)
    assert all(t.layout is torch.strided for t in frozen.state_dict().values())


def test_a_weight_written_to_or_replaced_is_packed_again():
    net, frozen = frozen_pair(vision.resnet18())
    x = torch.randn(2, 3, 64, 64)
    frozen(x)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    assert frozen.is_stale()
    frozen.refresh()
    with torch.no_grad():
        close(frozen(x), net(x))
    frozen.load_state_dict({k: v * 0.5 for k, v in frozen.state_dict().items()})
    assert not torch.allclose(frozen(x), net(x))
    twice = copy.deepcopy(frozen).double()
    close(frozen(x).double(), twice(x.double()))


def test_few_packs_are_kept():
    _, frozen = frozen_pair(nn.Sequential(nn.Conv2d(3, 8, 3)), size=16)
    for size in range(8, 24):
        frozen(torch.randn(1, 3, size, size))
    assert len(frozen.module[0].packs.found) <= 4


def test_tuning_measures_packs_and_the_report_says_so():
    net, frozen = frozen_pair(vision.resnet18(), tune=True)
    assert 0 <= frozen.report.packed <= 20 and "packed weights" in str(frozen.report)
    assert all("run" not in conv.__dict__ for conv in frozen_convs(frozen))  # the watch is gone
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(frozen(x), net(x))


def test_several_threads_with_several_shapes():
    _, frozen = frozen_pair(vision.resnet18())
    inputs = [torch.randn(1 + i % 3, 3, 64, 64 + 32 * (i % 2)) for i in range(12)]
    want = [frozen(x).clone() for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(frozen, inputs * 3), want * 3, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# ---- parts of a batch ------------------------------------------------------------------------------------------------


class AcrossImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return y + y.mean(0, keepdim=True)


def test_parts_of_a_batch_give_the_whole(monkeypatch):
    net, frozen = frozen_pair(vision.resnet18(), batch=8)
    x = torch.randn(11, 3, 64, 64)
    whole = frozen(x)
    frozen.images_at_a_time = 4
    torch.testing.assert_close(frozen(x), whole, rtol=1e-4, atol=1e-4)
    assert frozen(torch.randn(0, 3, 64, 64)).shape == (0, 1000)


def test_a_network_that_mixes_images_runs_whole(monkeypatch):
    monkeypatch.setattr(choose, "PARTS", (2,))
    monkeypatch.setattr(choose, "measure", lambda calls, device: {name: float(name == "0") for name in calls})
    for make, parts in ((AcrossImages, None), (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 2)):
        net = make().eval()
        found = fastres.freeze(net, torch.randn(6, 3, 16, 16), tune=False, capture="modules")
        choose.split(found, torch.randn(6, 3, 16, 16), torch.device("cpu"), True)
        assert found.images_at_a_time == parts
        x = torch.randn(7, 3, 16, 16)
        close(found(x), net(x).detach())


# ---- tracers and 16 bits ---------------------------------------------------------------------------------------------


def test_fx_sees_the_operator_exporters_and_compilers_stock_ones():
    net, frozen = frozen_pair(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), size=16)
    x = torch.randn(2, 3, 16, 16)
    want = net(x).detach()
    close(torch.fx.symbolic_trace(frozen.module)(x), want)
    program = torch.export.export(frozen.module, (x,), strict=False)
    assert "fastres" not in str(program.graph) and "aten.relu" in str(program.graph)
    close(program.module()(x), want)
    close(torch.compile(frozen.module, fullgraph=True, backend="aot_eager")(x), want)


def test_bfloat16():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no native bfloat16")
    net, frozen = frozen_pair(vision.resnet18(), dtype=torch.bfloat16)
    assert frozen.report.verification
    x = torch.randn(2, 3, 64, 64)
    names = operators(lambda: frozen(x))
    assert names["mkldnn::_convolution_pointwise"] + names["mkldnn::_convolution_pointwise_"] == 20
    assert F.cosine_similarity(frozen(x).float(), net(x), dim=1).min() > 0.99
