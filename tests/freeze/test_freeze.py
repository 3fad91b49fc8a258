"""freeze: whole networks, snapshot semantics, plan and report. `test_NN_...` carries its row of the table of faults."""

import copy
import gc
import json
import logging
import pickle

import pytest
import torch
from torch import nn

import fastres
from fastres import models
from fastres.inference import FrozenModel, choose, freeze
from fastres.inference.plan import measure
from fastres.nn import BasicBlock, Bottleneck, ConvBNReLU
from fastres.nn.fold import fold, norm_affine
from fastres.verify import calibrate


def conv_bn(cin=3, cout=4, kernel=3, bias=False, **options):
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=bias), nn.BatchNorm2d(cout, **options)


def trained(model, *shape):
    """The model in eval mode with statistics and affine parameters that are not the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    model.train()
    for _ in range(3):
        model(torch.randn(*shape) * 1.5 + 0.3)
    return model.eval()


def quick(model, inputs, **options):
    return freeze(model, inputs, tune=False, **options)


def by_modules(model, inputs, **options):
    return quick(model, inputs, capture="modules", **options)


# ---- whole networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, folded, blocks",
    [
        (lambda: models.cifar_resnet(8, num_classes=5), 7, 3),
        (lambda: models.cifar_resnet(8, "B", num_classes=5), 9, 3),
        (lambda: models.cifar_plain(8, num_classes=5), 7, 0),
        (lambda: nn.Sequential(ConvBNReLU(3, 8), Bottleneck(8, 2, downsample=nn.Sequential(*conv_bn(8, 8, 1)))), 5, 1),
    ],
    ids=["cifar", "cifar-B", "plain", "bottleneck"],
)
def test_networks_of_ours_fold_whole_and_agree(make, folded, blocks):
    net = trained(make(), 8, 3, 16, 16)
    by_blocks = by_modules(net, torch.randn(2, 3, 16, 16))
    assert (by_blocks.report.folded, by_blocks.report.counts["blocks"]) == (folded, blocks)
    frozen = quick(net, torch.randn(2, 3, 16, 16))
    assert (frozen.report.folded, frozen.report.counts["adds"]) == (folded, blocks)
    assert frozen.report.verification and not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    for batch in (1, 3, 7):  # any batch size
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("swapped", [False, True])
def test_torchvision_network_folds_whole_swapped_or_not(swapped):
    torchvision = pytest.importorskip("torchvision")
    net = trained(torchvision.models.resnet18(num_classes=5), 4, 3, 32, 32)
    if swapped:
        fastres.swap(net)
    frozen = quick(net, torch.randn(2, 3, 32, 32))
    assert frozen.report.folded == 20 and frozen.report.counts["adds"] == 8
    assert by_modules(net, torch.randn(2, 3, 32, 32)).report.counts["blocks"] == 8
    assert frozen.report.verification, frozen.report


@pytest.mark.full
@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "mobilenet_v2", "densenet121", "googlenet"])
def test_other_torchvision_networks_agree(name):
    torchvision = pytest.importorskip("torchvision")
    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    net = trained(getattr(torchvision.models, name)(num_classes=5, **options), 4, 3, 64, 64)
    frozen = quick(net, torch.randn(2, 3, 64, 64))
    assert frozen.report.folded > 30 and frozen.report.verification, frozen.report


def test_networks_of_other_libraries_fold():
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    net = trained(timm.create_model("resnet18", num_classes=5), 4, 3, 32, 32)
    frozen = quick(net, torch.randn(2, 3, 32, 32))
    assert frozen.report.folded == 20 and frozen.report.verification
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=4)
    net = transformers.ResNetForImageClassification(config).eval()
    frozen = quick(net, {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert frozen.report.verification and frozen.report.folded == sum(
        isinstance(m, nn.BatchNorm2d) for m in net.modules()
    )
    out = frozen(pixel_values=torch.randn(3, 3, 32, 32), return_dict=True)
    assert type(out).__name__ == "ImageClassifierOutputWithNoAttention" and out.logits.shape == (3, 4)


def test_blocks_run_our_operator_and_no_batch_norm():
    net = trained(nn.Sequential(BasicBlock(4, 4)), 4, 4, 8, 8)
    frozen = quick(net, torch.randn(2, 4, 8, 8))
    with torch.profiler.profile() as trace:
        frozen(torch.randn(2, 4, 8, 8))
    names = {event.key for event in trace.key_averages()}
    assert "mkldnn::_convolution_pointwise" in names  # each with its epilogue inside
    apart = ("aten::add", "aten::add_", "aten::relu", "aten::relu_", "aten::clamp_min_", "aten::conv2d")
    assert not any("batch_norm" in name or name in apart for name in names)


@pytest.mark.parametrize("change", ["hook", "patched", "leaky"])
def test_blocks_that_are_not_stock_keep_their_forward(change):
    block = BasicBlock(4, 4)
    if change == "hook":
        block.relu.register_forward_hook(lambda m, a, y: y + 1)
    elif change == "patched":
        block.forward = lambda x, own=block: BasicBlock.forward(own, x) * 2
    else:
        block.relu = nn.LeakyReLU(0.1)
    net = trained(nn.Sequential(block), 4, 4, 8, 8)
    frozen = freeze(net, torch.randn(2, 4, 8, 8), tune=False, verify=change != "patched")
    assert not any(row.kind == "block" for row in frozen.report.rows)
    assert frozen.report.verification or change == "patched"


# ---- snapshot semantics ------------------------------------------------------------------------------------------


def sample():
    return trained(models.cifar_resnet(8, num_classes=5), 8, 3, 8, 8)


def test_source_is_never_changed():
    net = sample().train()
    net.layer1.eval()
    handle = net.register_forward_hook(lambda *_: None)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    flags, types = [m.training for m in net.modules()], [type(m) for m in net.modules()]
    versions = [t._version for t in net.state_dict().values()]
    frozen = freeze(net, torch.randn(2, 3, 8, 8), dtype=torch.bfloat16)
    with torch.no_grad():
        for p in frozen.parameters():
            p.zero_()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags and [type(m) for m in net.modules()] == types
    assert [t._version for t in net.state_dict().values()] == versions
    assert all(p.requires_grad and p.grad is None for p in net.parameters()) and handle.id in net._forward_hooks
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in list(net.modules())[1:])
    assert "training mode; frozen as in eval mode" in " ".join(frozen.report.notes)


def test_39_train_raises_and_eval_does_not():
    frozen = quick(sample(), torch.randn(2, 3, 8, 8))
    assert frozen.eval() is frozen and not frozen.training
    with pytest.raises(RuntimeError, match="snapshot for inference"):
        frozen.train()
    with pytest.raises(RuntimeError, match="snapshot for inference"):
        nn.ModuleList([frozen]).train()
    assert not any(m.training for m in frozen.modules())


def _optimizer_step(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.train()(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()


STALE = {
    "optimizer step": _optimizer_step,
    "load_state_dict": lambda net: net.load_state_dict(sample().state_dict()),
    "load_state_dict(assign)": lambda net: net.load_state_dict(sample().state_dict(), assign=True),
    "statistics": lambda net: net.train()(torch.randn(4, 3, 8, 8)),
    "new parameter": lambda net: setattr(net.fc, "bias", nn.Parameter(torch.ones(5))),
}


@pytest.mark.parametrize("change", STALE)
def test_39_weights_changed_after_freezing(change):
    net = sample()
    x = torch.randn(2, 3, 8, 8)
    frozen = quick(net, x)
    before, kept = frozen(x), [id(t) for t in frozen.parameters()]
    assert not frozen.is_stale()
    STALE[change](net)
    assert frozen.is_stale() and torch.equal(frozen(x), before)  # a snapshot
    frozen.refresh()
    assert not frozen.is_stale() and [id(t) for t in frozen.parameters()] == kept
    assert not torch.equal(frozen(x), before)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), net.eval()(x), rtol=1e-4, atol=1e-4)


def test_39_refresh_changes_nothing_when_it_raises():
    net = sample()
    frozen = quick(net, torch.randn(2, 3, 8, 8))
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    for change, undo in (
        (lambda: net.layer1[0].bn1.running_var.fill_(-1.0), lambda: net.layer1[0].bn1.running_var.fill_(1.0)),
        (
            lambda: setattr(net.layer1[0], "bn1", nn.Identity()),
            lambda: setattr(net.layer1[0], "bn1", nn.BatchNorm2d(16)),
        ),
        (lambda: setattr(net, "fc", nn.Linear(64, 3)), lambda: None),
    ):
        change()
        with pytest.raises(RuntimeError, match="freeze it again"):
            frozen.refresh()
        assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
        undo()


def test_source_may_go_away():
    net = sample()
    frozen = quick(net, torch.randn(2, 3, 8, 8))
    del net
    gc.collect()
    assert frozen(torch.randn(1, 3, 8, 8)).shape == (1, 5) and not frozen.is_stale()
    with pytest.raises(RuntimeError, match="the source is gone"):
        frozen.refresh()


def test_deepcopy_pickle_state_dict_and_to():
    net = sample()
    x = torch.randn(2, 3, 8, 8)
    frozen = quick(net, x)
    y = frozen(x)
    twin, loaded = copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))
    assert torch.equal(twin(x), y) and torch.equal(loaded(x), y)
    assert twin.module.conv1 is not frozen.module.conv1
    with torch.no_grad():
        net.fc.bias.add_(1)
    assert frozen.is_stale() and twin.is_stale() and not loaded.is_stale()
    twin.refresh()
    assert not twin.is_stale() and frozen.is_stale()
    with pytest.raises(RuntimeError, match="the source is gone"):
        loaded.refresh()
    with torch.no_grad():
        for p in frozen.parameters():
            p.mul_(2)
    frozen.load_state_dict(loaded.state_dict())
    assert torch.equal(frozen(x), y)
    half = copy.deepcopy(loaded).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(x).dtype == torch.bfloat16
    assert type(next(iter(frozen.state_dict().values()))) is torch.Tensor


def test_call_signature_gradients_and_dtypes():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv_bn()

        def forward(self, x, scale, *, index=None, flag=False):
            y = self.bn(self.conv(x)) * scale
            return {"y": y, "index": index, "rest": [y.sum(), flag]}

    net = Two().eval()
    net.bn.running_var.uniform_(0.5, 1.5)
    example = {"x": torch.randn(2, 3, 8, 8), "scale": torch.tensor(2.0), "index": torch.tensor([1, 2]), "flag": True}
    frozen = quick(net, example, dtype=torch.bfloat16)
    x = torch.randn(3, 3, 8, 8, requires_grad=True)
    out = frozen(x, 0.5, index=example["index"], flag=True)
    assert out["y"].dtype == torch.bfloat16 and not out["y"].requires_grad and out["index"].dtype == torch.int64
    assert out["rest"][1] is True and out["y"].shape[0] == 3
    assert all(not p.requires_grad for p in frozen.parameters())


# ---- plan, report, verdict ---------------------------------------------------------------------------------------


def test_44_random_network_is_verified_on_a_calibrated_copy():
    net = models.cifar_resnet(8, num_classes=5)
    frozen = quick(net, torch.randn(4, 3, 8, 8), dtype=torch.float16)
    assert frozen.report.verification, frozen.report
    assert any("7 BN have initial statistics; verified on a copy" in note for note in frozen.report.notes)
    assert all(int(m.num_batches_tracked) == 0 for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():  # the frozen model itself has the source's own statistics
        torch.testing.assert_close(frozen(x).float(), net.eval()(x), rtol=3e-2, atol=3e-2)


def test_report_says_what_when_and_how_fast():
    frozen = freeze(sample(), torch.randn(2, 3, 8, 8))
    report = frozen.report
    assert report.memory_format in ("contiguous", "channels_last")
    assert frozen.channels_last == (report.memory_format == "channels_last")
    assert set(report.milliseconds) >= {"eager", "frozen"} and len(report.milliseconds) == 3
    assert report.speedup == pytest.approx(report.milliseconds["eager"] / report.milliseconds["frozen"])
    text = str(report)
    assert "7 of 7 convolutions took their BN in" in text and "x eager" in text and "verify: passed" in text
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["folded"] == 7 and data["verification"]["passed"] and data["rows"][0]["became"] == "conv + bias + relu"
    untimed = quick(sample(), torch.randn(2, 3, 8, 8), verify=False).report
    assert untimed.memory_format == "channels_last" and untimed.speedup is None and "not verified" in str(untimed)


def test_slower_than_eager_is_said(monkeypatch, caplog):
    times = {"eager": 1.0, "contiguous": 2.0, "channels_last": 3.0}
    monkeypatch.setattr(choose, "measure", lambda calls, device: {name: times[name] for name in calls})
    with caplog.at_level(logging.WARNING, "fastres"):
        report = freeze(sample(), torch.randn(2, 3, 8, 8), verify=False).report
    assert report.memory_format == "contiguous" and report.speedup == 0.5
    assert any("slower than eager" in note for note in report.notes) and "slower than eager" in caplog.text


def test_measure_interleaves_and_gives_up_on_the_hopeless():
    order = []

    def task(name, rounds):
        def run():
            order.append(name)
            sum(range(rounds))

        return run

    times = measure(
        {"a": task("a", 20_000), "b": task("b", 20_000), "slow": task("slow", 2_000_000)}, torch.device("cpu")
    )
    assert order[:9] == ["a", "b", "slow"] * 3 and order.count("slow") == 3 and order.count("a") == 9
    assert times["slow"] > 3 * times["a"] > 0


def test_bfloat16_without_native_support_is_said():
    frozen = quick(sample(), torch.randn(2, 3, 8, 8), dtype=torch.bfloat16, verify=False)
    said = any("no native bfloat16" in note for note in frozen.report.notes)
    assert said == (not torch.ops.mkldnn._is_mkldnn_bf16_supported())


@pytest.mark.parametrize("how", ["graph", "modules"])
def test_wrong_fold_is_rejected(monkeypatch, caplog, how):
    def wrong(conv, norm, dtype):
        norm = copy.deepcopy(norm)
        norm.eps = 0.1
        return fold(conv, norm, dtype)

    monkeypatch.setattr("fastres.inference.modules.fold", wrong)
    monkeypatch.setattr("fastres.inference.build.norm_affine", lambda *args: norm_affine(*args[:4], 0.1))
    net, x = sample(), torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="the referee rejects the frozen CifarResNet(.|\n)*FAILED"):
        quick(net, x, capture=how)
    with caplog.at_level(logging.WARNING, "fastres"):
        frozen = quick(net, x, capture=how, verify="warn")
    assert not frozen.report.verification and "rejects" in caplog.text
    assert quick(net, x, capture=how, verify=False).report.verification is None


def test_a_network_without_batch_norm_freezes_as_it_is():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    frozen = freeze(net, torch.randn(2, 4))
    assert (
        {row.kind for row in frozen.report.rows} == {"other"}
        and frozen.report.verification
        and frozen.report.memory_format == "contiguous"
    )
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(frozen(x), net(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_replays_and_follows_refresh():
    net = sample().cuda()
    x = torch.randn(4, 3, 8, 8, device="cuda")
    frozen = freeze(net, x, dtype=torch.float16, cuda_graph=True)
    assert len(frozen._engine.graphs) == 1 and frozen.report.cuda_graph.startswith("on")
    first = frozen(x)
    kept = first.clone()
    frozen(torch.randn_like(x))
    assert torch.equal(first, kept)  # outputs are the caller's
    with torch.no_grad():
        torch.testing.assert_close(frozen(x).float(), net(x), rtol=2e-2, atol=2e-2)
        net.fc.bias.add_(1)
    frozen.refresh()
    torch.testing.assert_close(frozen(x).float(), kept.float() + 1, rtol=1e-2, atol=1e-2)
    assert frozen(x[:3]).shape == (3, 5) and len(frozen._engine.graphs) == 1
    assert len(copy.deepcopy(frozen)._engine.graphs) == 0


# ---- refusals ------------------------------------------------------------------------------------------------------


class Locked(nn.Conv2d):
    def __deepcopy__(self, memo):
        raise RuntimeError("holds a lock")


@pytest.mark.parametrize(
    "make, options, error, message",
    [
        (lambda: 3, {}, TypeError, "model: got int"),
        (lambda: Locked(3, 3, 1), {}, TypeError, "model: Locked cannot be deep-copied: holds a lock"),
        (lambda: nn.Conv2d(3, 3, 1, device="meta"), {}, ValueError, "model: it is on the meta device"),
        (lambda: nn.Conv2d(3, 3, 1), {"example_inputs": "x"}, TypeError, "example_inputs: got str"),
        (lambda: nn.Conv2d(3, 3, 1), {"example_inputs": {}}, ValueError, "example_inputs: no tensor"),
        (lambda: nn.Conv2d(3, 3, 1), {"dtype": torch.int8}, TypeError, "dtype: got torch.int8"),
        (lambda: nn.Conv2d(3, 3, 1), {"tune": "fast"}, TypeError, "tune: got 'fast'"),
        (lambda: nn.Conv2d(3, 3, 1), {"verify": "maybe"}, TypeError, "verify: got 'maybe'"),
        (lambda: nn.Conv2d(3, 3, 1), {"cuda_graph": 1.5}, TypeError, "cuda_graph: got 1.5"),
        (lambda: nn.Conv2d(3, 3, 1), {"cuda_graph": True, "device": "cpu"}, ValueError, "cuda_graph: got True"),
    ],
)
def test_refusals_name_the_argument(make, options, error, message):
    example = options.pop("example_inputs", torch.randn(1, 3, 4, 4))
    with pytest.raises(error, match=message):
        freeze(make(), example, **options)


def test_a_frozen_model_is_not_frozen_again():
    frozen = quick(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4))
    assert isinstance(frozen, FrozenModel)
    with pytest.raises(TypeError, match="model: got a FrozenModel"):
        freeze(frozen, torch.randn(1, 3, 4, 4))


def test_calibrated_statistics_are_the_examples():
    net = models.cifar_resnet(8, num_classes=5).eval()
    x = torch.randn(8, 3, 8, 8)
    calibrate(net, x)
    assert not any("initial statistics" in note for note in quick(net, x).report.notes)


@pytest.mark.parametrize("tune", [False, True])
def test_a_network_with_views_that_channels_last_has_not_stays_in_nchw(tune):
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)).view(x.size(0), -1)

    net, x = Old().eval(), torch.randn(2, 3, 8, 8)
    frozen = freeze(net, x, tune=tune, capture="modules")
    assert not frozen.channels_last and any("view()" in note for note in frozen.report.notes)
    torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-5)
    frozen = freeze(net, x, tune=False)  # in a graph it is a reshape
    assert frozen.channels_last
    torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-5)
