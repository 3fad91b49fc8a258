"""Networks without a graph: their own code on a copy, known blocks fused; state of their own; answers as eager's."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from fastres.nn import Bottleneck
from freeze_cases import agree, cifar, compare, conv_bn, freeze, images, notes, operators, rows, settle, unchanged


class Branch(nn.Module):
    """Its first BN runs for bright images alone; the blocks always."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv_bn(3, 4)
        self.rest = nn.Sequential(BasicBlock(4, 4), nn.Sequential(*conv_bn(4, 6), nn.ReLU()))

    def forward(self, x, scale=1.0):
        y = self.conv(x) * scale
        if x.mean() > 0:
            y = self.bn(y)
        return self.rest(y)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.step = nn.Sequential(*conv_bn(3, 3), nn.ReLU())

    def forward(self, x):
        for _ in range(int(x.abs().max() * 2)):
            x = self.step(x)
        return x


def branch():
    return settle(Branch())


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", [False, True])
@pytest.mark.parametrize("example", [1.0, -1.0], ids=["bright", "dark"])
def test_both_branches_are_right_whichever_the_example_took(example, tune):
    net = branch()
    frozen = agree(net, images().abs() * example, capture="auto", tune=tune, blocks=1, folded=3)
    assert frozen.report.capture == "modules" and "data-dependent" in notes(frozen)
    assert rows(frozen) == {"(model)": "NOT_MATCHED"}
    assert {row.name: row.became for row in frozen.report.rows if row.kind == "part"} == {"rest": "frozen graph"}
    for sign in (1.0, -1.0, 1.0):
        compare(net, frozen, images(3).abs() * sign)
        compare(net, frozen, x=images(1, 12).abs() * sign, scale=2.0)  # any size, any arguments
    assert not frozen.prepared(images()) and "no graph" in str(frozen.report)


def test_known_blocks_run_fused_and_no_batch_norm():
    frozen = freeze(branch(), images(), capture="modules", tune=False, verify=False)
    seen = operators(frozen, -images().abs())
    assert not any("batch_norm" in name for name in seen) and any(name.startswith("fastres::") for name in seen)
    assert type(frozen.fallback.rest[0]).__mro__[1] is BasicBlock and frozen.fallback.rest[0].bn1.training is False


def test_a_loop_whose_length_the_input_decides():
    net = Loop().eval()
    frozen = agree(net, images().clamp(-1, 1), capture="auto", batches=())
    assert frozen.report.capture == "modules"
    for largest in (0.2, 0.6, 1.2, 2.1):
        x = images(3).clamp(-1, 1)
        x[0, 0, 0, 0] = largest
        compare(net, frozen, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_20_another_dtype(dtype):
    net = branch()
    frozen = freeze(net, images(), dtype=dtype, tune=False)
    half = dtype is not torch.float64
    assert frozen.report.verification and frozen(images()).dtype is dtype
    assert frozen.fallback.conv.weight.dtype is dtype and not frozen.fallback.conv.weight.requires_grad
    assert frozen.fallback.bn.running_var.dtype is (torch.float32 if half else dtype)
    compare(net, frozen, images(3), tol=0.1, dtypes=False)


@pytest.mark.parametrize("change", ["hook", "patched", "leaky"])
def test_40_blocks_that_are_not_stock_keep_their_forward(change):
    block = settle(BasicBlock(4, 4))
    if change == "hook":
        block.relu.register_forward_hook(lambda m, a, y: y + 1)
    elif change == "patched":
        block.forward = lambda x, own=block: BasicBlock.forward(own, x) * 2
    else:
        block.relu = nn.LeakyReLU(0.1)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), block).eval()
    frozen = freeze(net, images(), capture="modules", tune=False, verify=change != "patched")
    (row,) = frozen.report.rows
    assert row.kind == "block" and row.became == "block" and row.reason and row.message
    if change != "patched":  # a copy's forward is the original's
        compare(net, frozen, images(3))


def test_capture_by_modules_is_swap_in_eval_mode_on_a_copy():
    net = nn.Sequential(*conv_bn(), nn.ReLU(), settle(Bottleneck(4, 1)), nn.AdaptiveAvgPool2d(1)).train()
    x = images()
    with unchanged(net, x):
        frozen = freeze(net, x, capture="modules", tune=False)
    assert frozen.report.capture_reason == "capture='modules'" and frozen.report.verification
    assert "the model is in training mode" in notes(frozen) and not any(m.training for m in frozen.modules())
    compare(net.eval(), frozen, images(3))


# ---- a snapshot ------------------------------------------------------------------------------------------------------


def test_39_refresh_copies_and_pickles():
    net, x = branch(), images(3)
    frozen = freeze(net, images(), dtype=torch.bfloat16, tune=False, verify=False)
    before, kept = frozen(x), [id(t) for t in frozen.state_dict(keep_vars=True).values()]
    assert not frozen.is_stale()
    with torch.no_grad():
        net.conv.weight.mul_(-1)
        net.rest[0].bn1.running_mean.add_(1)
    assert frozen.is_stale() and torch.equal(frozen(x), before)
    twin, loaded = copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))
    frozen.refresh()
    assert not frozen.is_stale() and [id(t) for t in frozen.state_dict(keep_vars=True).values()] == kept
    compare(net, frozen, x, tol=0.1, dtypes=False)
    assert twin.is_stale() and torch.equal(twin(x), before) and torch.equal(loaded(x), before)
    with pytest.raises(RuntimeError, match="the source is gone"):
        loaded.refresh()
    net.rest[1] = nn.Identity()
    with pytest.raises(RuntimeError, match="freeze it again"):
        frozen.refresh()


def test_it_has_no_file_no_graph_and_says_so(tmp_path):
    frozen = freeze(branch(), images(), tune=False, verify=False)
    with pytest.raises(ValueError, match="was frozen without a graph.*data-dependent"):
        frozen.save(tmp_path / "net.fastres")
    with pytest.raises(RuntimeError, match="record_graph: the model was frozen without a graph"):
        frozen.record_graph((images(),), {})
    assert not list(tmp_path.iterdir())


class Counting(nn.Module):
    """Its answer depends on how often it ran."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv_bn()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.bn(self.conv(x)) + self.calls


@pytest.mark.parametrize("tune", [False, True])
def test_state_that_the_forward_keeps_begins_where_the_source_s_is(tune):
    net = Counting().eval()
    net.calls.fill_(5)
    frozen = agree(net, capture="auto", tune=tune, batches=())
    assert "its forward writes to calls" in notes(frozen)
    for n in range(4):
        x = images(3)
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-5)
        assert float(frozen.fallback.calls) == float(net.calls) == 6 + n  # each counts for itself


class Renormed(nn.Conv2d):
    """The max-norm constraint of EEGNet, taken in forward."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class Halved(nn.Conv2d):
    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(x)


@pytest.mark.parametrize("layer", [Renormed, Halved])
@pytest.mark.parametrize("tune", [False, True])
def test_a_forward_that_writes_to_its_parameters_writes_to_copies(layer, tune):
    net = nn.Sequential(layer(3, 4, 3), nn.ReLU()).eval()
    frozen = agree(net, capture="auto", tune=tune, batches=())
    assert frozen.report.capture == "modules"
    x = images(3)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-5)


class Doubled(nn.Sequential):
    def forward(self, x):
        return super().forward(x.mul_(2))


@pytest.mark.parametrize("capture", ["graph", "modules"])
@pytest.mark.parametrize("tune", [False, True])
def test_24_a_network_that_writes_to_its_input_leaves_the_example_alone(capture, tune):
    net, x = Doubled(*conv_bn(), nn.ReLU()).eval(), images(3)
    frozen = agree(net, capture=capture, tune=tune, batches=())
    got = frozen(x.clone())
    with torch.no_grad():
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)


class Answer:
    def __init__(self, y):
        self.y = y


def test_outputs_that_are_no_tensors_are_not_verified_and_that_is_said():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = cifar()

        def forward(self, x):
            return Answer(self.net(x))

    net, x = Wrapped().eval(), images(3, 16)
    frozen = freeze(net, images(2, 16), tune=False)
    assert frozen.report.capture == "modules" and frozen.report.verification is None
    assert "not verified, its output holds no tensor" in notes(frozen) and "not verified" in str(frozen.report)
    torch.testing.assert_close(frozen(x).y, net(x).y.detach(), rtol=1e-4, atol=1e-5)
