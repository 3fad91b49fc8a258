"""freeze: whole networks, a snapshot of them, the report and its verdict. `test_NN_`: rows of faults.md."""

import copy
import gc
import json
import logging
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastres
from fastres import models
from fastres.graph.fold import norm_affine
from fastres.inference import FrozenModel, freeze
from fastres.nn import Bottleneck, ConvBNReLU
from fastres.verify import calibrate
from freeze_cases import Net, agree, cifar, compare, conv_bn, images, notes, settle


def quick(model, *shape, **options):
    return freeze(model, images(*(shape or (2, 16))), **{"tune": False, "verify": False, **options})


# ---- whole networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "folded", "blocks"),
    [
        (cifar, 7, 3),
        (lambda: models.cifar_resnet(8, "B", num_classes=5), 9, 3),
        (lambda: models.cifar_plain(8, num_classes=5), 7, 0),
        (lambda: nn.Sequential(ConvBNReLU(3, 8), Bottleneck(8, 2, downsample=nn.Sequential(*conv_bn(8, 8)))), 5, 1),
    ],
    ids=["cifar", "cifar-B", "plain", "bottleneck"],
)
def test_networks_of_ours_fold_whole_and_agree(make, folded, blocks):
    agree(settle(make()), images(2, 16), batches=(1, 3, 7), folded=folded, adds=blocks, norms_left=0)


def test_a_swapped_network_folds_whole():
    torchvision = pytest.importorskip("torchvision")
    net = settle(torchvision.models.resnet18(num_classes=5))
    fastres.swap(net)
    frozen = quick(net, 2, 32, verify=True)
    assert (frozen.report.folded, frozen.report.counts["adds"]) == (20, 8) and frozen.report.verification


# ---- a snapshot ------------------------------------------------------------------------------------------------------


def test_source_is_never_changed():
    """By a frozen model that is written to; of what freezing does, `unchanged` in most tests sees more."""
    net = cifar()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    frozen = quick(net, dtype=torch.bfloat16)
    with torch.no_grad():
        for t in frozen.buffers():
            t.zero_()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def _optimizer_step(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.train()(images(4, 16)).square().sum().backward()
    optimizer.step()


def _another():
    net = cifar()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    return net.state_dict()


STALE = {
    "optimizer step": _optimizer_step,
    "load_state_dict": lambda net: net.load_state_dict(_another()),
    "load_state_dict(assign)": lambda net: net.load_state_dict(_another(), assign=True),
    "statistics": lambda net: net.train()(images(4, 16)),
    "new parameter": lambda net: setattr(net.fc, "bias", nn.Parameter(torch.ones(5))),
    "in place": lambda net: net.fc.weight.detach().mul_(2),
    "new data": lambda net: setattr(net.fc.weight, "data", net.fc.weight.data * 2),
    "new buffer": lambda net: setattr(net.bn1, "running_mean", net.bn1.running_mean + 1),
}


@pytest.mark.parametrize("change", STALE)
def test_39_weights_changed_after_freezing(change):
    net, x = cifar(), images(2, 16)
    frozen = quick(net)
    before, kept = frozen(x), [id(t) for t in frozen.buffers()]
    assert not frozen.is_stale()
    STALE[change](net)
    assert frozen.is_stale() and torch.equal(frozen(x), before)  # a snapshot
    frozen.refresh()
    assert not frozen.is_stale() and [id(t) for t in frozen.buffers()] == kept
    assert not torch.equal(frozen(x), before)
    compare(net.eval(), frozen, x)


def test_39_a_tensor_more_or_less_is_seen_a_write_through_data_is_not():
    for change in (lambda net: net.register_buffer("extra", torch.ones(1)), lambda net: delattr(net.fc, "bias")):
        net = cifar()
        frozen = quick(net)
        change(net)
        assert frozen.is_stale()
    net = cifar()
    frozen = quick(net)
    net.fc.weight.data.mul_(2)  # moves no version: a snapshot says so
    assert not frozen.is_stale()
    frozen.refresh()
    compare(net, frozen, images(2, 16))


def test_39_refresh_changes_nothing_when_it_raises():
    net = cifar()
    frozen = quick(net)
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    norm = net.layer1[0].bn1
    for change, undo in (
        (lambda: norm.running_var.fill_(-1.0), lambda: norm.running_var.fill_(1.0)),
        (lambda: setattr(net.layer1[0], "bn1", nn.Identity()), lambda: setattr(net.layer1[0], "bn1", norm)),
        (lambda: setattr(net, "fc", nn.Linear(64, 3)), lambda: None),
    ):
        change()
        with pytest.raises(RuntimeError, match="refresh: the source.* has changed, freeze it again"):
            frozen.refresh()
        assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
        undo()


def test_source_may_go_away():
    net = cifar()
    frozen = quick(net)
    del net
    gc.collect()
    assert frozen(images(1, 16)).shape == (1, 5) and not frozen.is_stale()
    with pytest.raises(RuntimeError, match="the source is gone"):
        frozen.refresh()


def test_37_copies_pickles_state_dicts_and_casts(tmp_path):
    net, x, other = cifar(), images(2, 16), images(2, 12)
    frozen = quick(net)
    y = frozen(x)
    torch.save(frozen, tmp_path / "frozen.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin, loaded = copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))
        saved = torch.load(tmp_path / "frozen.pt", weights_only=False)
    for made in (twin, loaded, saved):
        assert not made._network.executor._plans and made.report.folded == 7 and not made.training
        assert torch.equal(made(x), y) and torch.equal(made(x), y) and torch.equal(made(x[:0]), y[:0])
        assert {(type(t), t.layout) for t in made.state_dict().values()} == {(torch.Tensor, torch.strided)}
    for made in (twin, loaded, saved):
        compare(net, made, other)
    with torch.no_grad():
        net.fc.bias.add_(1)
        saved.weights.fc.weight.zero_()
    assert frozen.is_stale() and twin.is_stale() and not loaded.is_stale() and torch.equal(frozen(x), y)
    twin.refresh()
    assert not twin.is_stale() and frozen.is_stale()
    with pytest.raises(RuntimeError, match="the source is gone"):
        loaded.refresh()
    twin.load_state_dict(loaded.state_dict())
    assert torch.equal(twin(x), y)
    half = twin.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(x).dtype == torch.bfloat16


# ---- report and verdict ----------------------------------------------------------------------------------------------


def test_44_a_random_network_is_verified_on_a_calibrated_copy():
    net = models.cifar_resnet(8, num_classes=5).eval()
    frozen = agree(net, images(4, 16), dtype=torch.float16, batches=())
    assert "7 BN have initial statistics; verified on a copy" in notes(frozen)
    compare(net, frozen, images(2, 16), tol=3e-2, dtypes=False)  # the frozen model itself has the source's own
    calibrate(net, images(8, 16))
    assert "initial statistics" not in notes(agree(net, images(2, 16), batches=()))


def test_44_half_precision_is_compared_with_eagers_of_that_dtype(caplog):
    """Where bf16 is far from fp32 in any engine, as of a deep network calibrated on 4 images: no fault of ours."""
    net, x = Net(lambda net, x: (torch.relu(net.first(x)) + 128) - 128), images(4)
    with torch.no_grad():
        want, eager = net(x), copy.deepcopy(net).bfloat16()(x.bfloat16()).float()
    assert (eager - want).abs().max() > 0.05 * want.abs().max()  # or this shows nothing
    for verify in (False, True):
        frozen = freeze(net, x, dtype=torch.bfloat16, tune=False, verify=verify)
        assert frozen.report.capture == "graph" and "fault" not in caplog.text
    assert frozen.report.verification


def test_report_says_what_when_and_how_fast():
    frozen = freeze(cifar(), images(2, 16))
    report = frozen.report
    assert report.memory_format in ("contiguous", "channels_last")
    assert frozen.plan.channels_last == (report.memory_format == "channels_last")
    assert set(report.milliseconds) >= {"eager", "frozen"} and len(report.milliseconds) == 3
    assert report.speedup == pytest.approx(report.milliseconds["eager"] / report.milliseconds["frozen"])
    assert report.steps == len(frozen.graph.steps) == 15
    text = str(report)
    assert "7 of 7 convolutions took their BN in" in text and "x eager" in text and "verify: passed" in text
    assert "images at a time: all; steps: 15; CUDA graph: off (no GPU)" in text or report.images_at_a_time
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["folded"] == 7 and data["verification"]["passed"] and data["rows"][0]["became"] == "conv + bias + relu"
    assert data["steps"] == 15 and "program" not in data
    untimed = quick(cifar()).report
    assert untimed.memory_format == "channels_last" and untimed.speedup is None and "not verified" in str(untimed)


def test_49_bfloat16_without_native_support_is_said():
    frozen = quick(cifar(), dtype=torch.bfloat16)
    assert ("no native bfloat16" in notes(frozen)) == (not torch.ops.mkldnn._is_mkldnn_bf16_supported())


def test_a_wrong_fold_is_rejected(monkeypatch, caplog):
    """A fault is planted that changes too little for the first look at a graph."""
    monkeypatch.setattr("fastres.graph.fusions.conv_bn_act.norm_affine", lambda *args: norm_affine(*args[:4], 3e-2))
    net = cifar()
    with pytest.raises(RuntimeError, match="the referee rejects the frozen CifarResNet(.|\n)*FAILED"):
        quick(net, verify=True)
    with caplog.at_level(logging.WARNING, "fastres"):
        frozen = quick(net, verify="warn")
    assert not frozen.report.verification and "rejects" in caplog.text
    assert quick(net).report.verification is None


def test_40_a_block_with_another_activation_says_what_reads_it():
    block = fastres.nn.BasicBlock(3, 3)
    block.relu = nn.LeakyReLU(0.1)
    frozen = agree(settle(nn.Sequential(block)), adds=1, acts=0, folded=2)
    assert [row.message for row in frozen.report.rows][:2] == [
        "0.bn1 folded; read by leaky_relu.default",
        "0.bn2 folded; read by leaky_relu.default",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_27_cuda_graph_replays_and_follows_refresh():
    net = cifar().cuda()
    x = images(4, 16).cuda()
    frozen = freeze(net, x, dtype=torch.float16, cuda_graph=True)
    assert len(frozen._cuda_graphs) == 1 and frozen.report.cuda_graph.startswith("on")
    first = frozen(x)
    kept = first.clone()
    frozen(torch.randn_like(x))
    assert torch.equal(first, kept)  # outputs are the caller's
    with torch.no_grad():
        torch.testing.assert_close(frozen(x).float(), net(x), rtol=2e-2, atol=2e-2)
        net.fc.bias.add_(1)
    frozen.refresh()
    torch.testing.assert_close(frozen(x).float(), kept.float() + 1, rtol=1e-2, atol=1e-2)
    assert frozen(x[:3]).shape == (3, 5) and len(frozen._cuda_graphs) == 1
    assert len(copy.deepcopy(frozen)._cuda_graphs) == 0


def test_public_names():
    assert fastres.freeze is freeze and fastres.FrozenModel is FrozenModel
