"""freeze by graph: every written form of conv -> BN -> add -> act, what is shared, aliased or written to, and refusals.

Each network is compared with its source at the example's batch (by the referee), at 1, at 3 and at 0 images.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastres import models
from fastres.inference import freeze
from fastres.nn import BasicBlock, ConvBNReLU
from fastres.nn.fold import norm_affine

torch.manual_seed(0)


def settle(net):
    """Eval mode, statistics and affine parameters that are not the initial ones."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        for name, low, high in (("weight", 0.5, 1.5), ("running_var", 0.5, 2.0)):
            t = getattr(module, name, None)
            if "Norm" in type(module).__name__ and t is not None:
                t.data.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)
        for name in ("bias", "running_mean"):
            t = getattr(module, name, None)
            if "Norm" in type(module).__name__ and t is not None:
                t.data.copy_(torch.randn(t.shape, generator=generator))
    return net.eval()


def agree(net, *shape, inputs=None, **counts):
    """Freezes the network by its graph, compares, and checks the counts of the report; returns the frozen network."""
    settle(net)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    inputs = torch.randn(2, *(shape or (3, 8, 8))) if inputs is None else inputs
    frozen = freeze(net, inputs, capture="graph", tune=False)
    assert frozen.report.capture == "graph" and frozen.report.verification
    assert {name: frozen.report.counts[name] for name in counts} == counts, frozen.report
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    if isinstance(inputs, torch.Tensor):
        for batch in (1, 3, 3, 0):
            x = torch.randn(batch, *inputs.shape[1:])
            with torch.no_grad():
                try:
                    want = net(x.clone())
                except RuntimeError:
                    assert batch == 0  # a view of nothing
                    continue
                got = frozen(x.clone())
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    return frozen


class Net(nn.Module):
    """Convolutions and norms under fixed names, and a forward given as a function."""

    def __init__(self, forward, bias=False, norm=nn.BatchNorm2d, **convs):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=bias), norm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=bias), norm(4)
        self.relu = nn.ReLU(inplace=True)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


# ---- one thing, however it is written --------------------------------------------------------------------------------

ACTS = {
    "module": lambda net, y: net.relu(y),
    "functional": lambda net, y: F.relu(y),
    "in place": lambda net, y: F.relu_(y),
    "method": lambda net, y: y.relu(),
    "clamp": lambda net, y: y.clamp(min=0),
    "clamp_min": lambda net, y: torch.clamp_min(y, 0),
    "hardtanh": lambda net, y: F.hardtanh(y, 0.0, 6.0, inplace=True),
    "relu6": lambda net, y: F.relu6(y),
    "clamp 6": lambda net, y: y.clamp_(0, 6),
    "silu": lambda net, y: F.silu(y, inplace=True),
    "hardswish": lambda net, y: F.hardswish(y),
    "x * sigmoid": lambda net, y: y * y.sigmoid(),
    "sigmoid * x": lambda net, y: torch.sigmoid(y).mul_(y),
    "x * hardsigmoid": lambda net, y: y * F.hardsigmoid(y),
    "threshold": lambda net, y: F.threshold(y, 0, 0),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bias", [False, True])
def test_conv_bn_act_in_every_form(act, bias):
    agree(Net(lambda net, x: ACTS[act](net, net.bn(net.conv(x))), bias), convs=1, folded=1, acts=1, norms_left=0)


ADDS = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "in place": lambda x, y: x.add_(y),
    "+=": lambda x, y: x.__iadd__(y),
    "torch.add": lambda x, y: torch.add(y, x),
    "alpha": lambda x, y: torch.add(x, y, alpha=1),
}


@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("act", ["functional", "module"])
def test_residual_in_every_form(add, act):
    def forward(net, x):
        y = F.relu(net.bn(net.conv(x)))
        return ACTS[act](net, ADDS[add](net.bn2(net.conv2(y)), y))

    agree(Net(forward), convs=2, folded=2, adds=1, acts=2)


def test_residual_that_is_computed_behind_the_convolution():
    def forward(net, x):
        y = F.relu(net.bn(net.conv(x)))
        z = net.bn2(net.conv2(y))
        return F.relu(z + y.sigmoid())

    agree(Net(forward), convs=2, adds=1, acts=2)


def test_sums_with_nothing_and_products_with_one_go():
    def forward(net, x):
        y = F.relu(net.bn(net.conv(x)))
        return F.relu(sum([net.bn2(net.conv2(y)), y, 0]) / 1 * 1.0 - 0)  # 0 + a + b + 0

    frozen = agree(Net(forward), convs=2, adds=1, acts=2)
    assert not any(row.kind == "other" for row in frozen.report.rows)
    frozen = freeze(Net(lambda net, x: (x * 1, x + 0)), torch.randn(2, 3, 8, 8), tune=False)
    x = torch.randn(1, 3, 8, 8)
    assert all(torch.equal(y, x) and y.data_ptr() != x.data_ptr() for y in frozen(x))


def test_two_convolutions_meet_in_one_sum():
    def forward(net, x):
        y = F.relu(net.bn(net.conv(x)))
        return F.relu(net.bn2(net.conv2(y)) + net.bn(net.conv2(y)))

    agree(Net(forward), convs=3, folded=3, adds=1, acts=2)


@pytest.mark.parametrize(
    "add",
    [
        lambda y, x: torch.add(y, x, alpha=2),
        lambda y, x: y + x.mean((2, 3), keepdim=True),
        lambda y, x: y + x[:1],
        lambda y, x: y + x.double(),
        lambda y, x: y + y,
        lambda y, x: y - x,
    ],
    ids=["alpha", "channels", "broadcast", "double", "itself", "difference"],
)
def test_sums_that_are_no_residual_stay(add):
    def forward(net, x):
        y = F.relu(net.bn(net.conv(x)))
        return F.relu(add(net.bn2(net.conv2(y)), y))

    agree(Net(forward), convs=2, folded=2, adds=0)


def test_a_sum_behind_a_residual_keeps_an_activation_that_no_engine_fuses_there():
    def forward(net, x):
        y = F.relu(net.bn(net.conv(x)))
        return F.silu(net.bn2(net.conv2(y)) + y)

    agree(Net(forward), convs=2, adds=1, acts=1)


NORMS = {
    "sync": nn.SyncBatchNorm,
    "no affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "eps": lambda c: nn.BatchNorm2d(c, eps=0.1),
    "no momentum": lambda c: nn.BatchNorm2d(c, momentum=None),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm):
    def forward(net, x):
        return F.relu(net.bn(net.conv(x)))

    agree(Net(forward, norm=NORMS[norm]), convs=1, folded=1, acts=1)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
def test_14_torchvisions_frozen_norm_has_its_own_eps(eps):
    ops = pytest.importorskip("torchvision").ops
    frozen = agree(
        Net(lambda net, x: net.relu(net.bn(net.conv(x))), norm=lambda c: ops.FrozenBatchNorm2d(c, eps=eps)),
        convs=1,
        folded=1,
        acts=1,
    )
    assert not any(row.kind == "other" for row in frozen.report.rows)  # nothing is left of the arithmetic


def test_timms_norms_with_an_activation_of_their_own():
    layers = pytest.importorskip("timm.layers")
    agree(Net(lambda net, x: net.bn(net.conv(x)), norm=layers.BatchNormAct2d), convs=1, folded=1, acts=1)
    agree(Net(lambda net, x: net.bn(net.conv(x)), norm=layers.FrozenBatchNormAct2d), convs=1, folded=1, acts=1)


@pytest.mark.parametrize(
    "affine",
    [
        lambda net, y: y * 0.5 + 1.5,
        lambda net, y: 2 - y,
        lambda net, y: y / 3 - 1,
        lambda net, y: y * net.bn.weight.view(1, -1, 1, 1),
        lambda net, y: net.bn.bias[:, None, None] - y / net.bn.weight[None, :, None, None].exp(),
        lambda net, y: net.bn2(net.bn(y) * 2),
    ],
)
def test_affine_arithmetic_folds(affine):
    frozen = agree(Net(lambda net, x: F.relu(affine(net, net.conv(x))), bias=True), convs=1, acts=1, norms_left=0)
    assert {"bn", "scale"} & set(frozen.report.rows[0].took) and not any(r.kind == "other" for r in frozen.report.rows)


@pytest.mark.parametrize(
    "step",
    [
        lambda net, y: 1 / (y + 3.0).abs(),
        lambda net, y: y * net.plane,
        lambda net, y: y * y,
        lambda net, y: y * net.bn(y).mean((0, 2, 3)).view(1, -1, 1, 1),
    ],
    ids=["reciprocal", "plane", "square", "data"],
)
def test_what_is_not_affine_stays(step):
    net = Net(lambda net, x: step(net, net.conv(x)), bias=True)
    net.register_buffer("plane", torch.rand(8, 8))
    settle(net)
    frozen = freeze(net, torch.randn(2, 3, 8, 8), capture="graph", tune=False)
    assert frozen.report.verification and frozen.report.counts["convs"] == 1
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-4)


def test_weights_computed_from_parameters_are_constants():
    net = Net(lambda net, x: F.relu(net.bn(net.conv(x))))
    parametrizations.weight_norm(net.conv)
    agree(net, convs=1, folded=1, acts=1)
    std_conv = pytest.importorskip("timm.layers").ScaledStdConv2d
    frozen = agree(nn.Sequential(std_conv(3, 4, 3), nn.ReLU()), convs=1, acts=1)
    assert not any(row.kind == "other" for row in frozen.report.rows)


def test_a_weight_computed_from_the_input_stays():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(F.conv2d(x, x.mean() * x.new_ones(3, 3, 1, 1)))

    net = settle(Dynamic())
    x = torch.randn(2, 3, 8, 8)
    frozen = freeze(net, x, capture="graph", tune=False)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-4)
    assert frozen.report.counts["folded"] == 0


def test_the_blocks_of_ours_join_with_what_is_around_them():
    block = nn.Sequential(ConvBNReLU(3, 4, 3), BasicBlock(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    agree(block, convs=3, folded=3, adds=1, acts=3, pool_linear=1)
    agree(models.cifar_resnet(8, "A", num_classes=5), 3, 16, 16, folded=7, adds=3, acts=7, pool_linear=1)


@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize("pad", [(0, 0, 0, 0), (1, 1, 2, 2), (0, 1, 0, 1)])
def test_paddings(padding, pad):
    net = nn.Sequential(nn.ZeroPad2d(pad), nn.Conv2d(3, 4, 3, padding=padding), nn.BatchNorm2d(4), nn.ReLU())
    frozen = agree(net, convs=1, folded=1, acts=1)
    assert any(row.kind == "other" for row in frozen.report.rows) == (pad == (0, 1, 0, 1))


def test_a_padding_that_others_read_too_stays():
    class Padded(Net):
        def forward(self, x):
            x = F.pad(x, (1, 1, 1, 1))
            return self.bn(self.conv(x)), x.sum((2, 3))

    net = settle(Padded(None))
    frozen = freeze(net, torch.randn(2, 3, 8, 8), capture="graph", tune=False)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-4)


HEADS = {
    "adaptive": lambda y: torch.flatten(F.adaptive_avg_pool2d(y, 1), 1),
    "mean": lambda y: y.mean((2, 3)),
    "mean kept": lambda y: y.mean((-1, -2), keepdim=True).flatten(1),
    "view": lambda y: F.adaptive_avg_pool2d(y, (1, 1)).view(y.shape[0], -1),
    "squeeze": lambda y: F.adaptive_avg_pool2d(y, 1).squeeze(3).squeeze(2),
    "avg_pool": lambda y: F.avg_pool2d(y, 8).reshape(-1, 4),
    "dropout": lambda y: F.dropout(F.adaptive_avg_pool2d(y, 1).flatten(1), 0.5, training=False),
}


@pytest.mark.parametrize("head", HEADS)
def test_global_pool_and_classifier_are_one_step(head):
    class Head(Net):
        def __init__(self):
            super().__init__(None)
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(HEADS[head](F.relu(self.bn(self.conv(x)))))

    frozen = agree(Head(), acts=1)
    assert frozen.report.counts["pool_linear"] == 1 or head == "squeeze"


def test_pre_activation_and_sums_without_a_convolution_are_one_pass():
    def forward(net, x):
        y = net.conv(x)
        z = net.conv2(F.relu(net.bn(y)))
        z = net.bn2(y + z).relu()
        return F.relu(z.sigmoid() + y)

    agree(Net(forward), convs=2, folded=0, adds=1, bn_act=2, add_relu=1, norms_left=2)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_fold(dims):
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    agree(nn.Sequential(conv(3, 4, 3, bias=False), norm(4), nn.ReLU()), 3, *[6] * dims, folded=1, norms_left=0)


# ---- shared, aliased, written to ---------------------------------------------------------------------------------


def test_41_modules_used_twice():
    def twice(net, x):
        y = F.relu(net.bn(net.conv(x)))
        for _ in range(2):
            y = F.relu(net.bn2(net.conv2(y)))
        return y

    frozen = agree(Net(twice), convs=3, folded=3, acts=3)
    assert len([m for m in frozen.module.modules() if isinstance(m, nn.Conv2d)]) == 2  # one step, called twice

    def one_conv_two_norms(net, x):
        y = net.bn(net.conv(x))
        return net.bn2(net.conv2(y)) * net.bn(net.conv2(y))

    frozen = agree(Net(one_conv_two_norms), convs=3, folded=3)
    assert len([m for m in frozen.module.modules() if isinstance(m, nn.Conv2d)]) == 3

    def one_output_two_norms(net, x):
        y = net.conv(x)
        return net.bn(y) + net.bn2(y)

    agree(Net(one_output_two_norms), convs=1, folded=0, norms_left=2)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: (lambda y: (net.bn(y), y))(net.conv(x)),
        lambda net, x: (lambda y: (F.relu(y), y))(net.bn(net.conv(x))),
        lambda net, x: (lambda y: (F.relu(net.bn(y)), y.mean((2, 3))))(net.conv(x)),
        lambda net, x: (lambda y: (F.relu(y), y[:, :2]))(net.bn(net.conv(x))),
        lambda net, x: (lambda y: {"a": y, "b": [F.relu(y), None, 3]})(net.bn(net.conv(x))),
    ],
    ids=["conv", "norm", "conv mean", "view", "nested"],
)
def test_outputs_that_are_also_read(forward):
    agree(Net(forward), convs=1)


ALIASES = {
    "act seen through its input": lambda net, x: (lambda y: (F.relu_(y), y.sum((2, 3))))(net.bn(net.conv(x))),
    "input returned": lambda net, x: (lambda y: (F.relu_(y), y))(net.bn(net.conv(x))),
    "view read behind": lambda net, x: (lambda y: (lambda v: (F.relu_(y), v + 1))(y[:, :2]))(net.bn(net.conv(x))),
    "written through a view": lambda net, x: (lambda y: (y[:, :2].mul_(0), y * 1)[1])(net.bn(net.conv(x))),
    "sliced and added": lambda net, x: (lambda y: (y[:].add_(1), y.sigmoid())[1])(net.bn(net.conv(x))),
    "chain": lambda net, x: (lambda y: (F.relu_(y), y.add_(1), y.mul_(2), y + 0)[3])(net.bn(net.conv(x))),
    "before and behind": lambda net, x: (lambda y: (y.exp(), F.relu_(y), y.sigmoid())[::2])(net.bn(net.conv(x))),
    "chunks": lambda net, x: (lambda a, b: (a.relu_(), torch.cat([b, a], 1))[1])(*net.bn(net.conv(x)).chunk(2, 1)),
    "unflattened": lambda net, x: (lambda y: (F.relu_(y), y.flatten(1))[1])(net.bn(net.conv(x))),
    "copied": lambda net, x: (lambda y: (lambda c: (F.relu_(y), c)[1])(y.clone()))(net.bn(net.conv(x))),
    "filled": lambda net, x: (lambda y: (y.zero_(), y + 1)[1])(net.bn(net.conv(x))),
    "indexed": lambda net, x: (lambda y: (y.__setitem__((slice(None), 0), 7.0), y)[1])(net.bn(net.conv(x))),
    "copied into": lambda net, x: (lambda y: y.copy_(y.flip(1)) + y)(net.bn(net.conv(x))),
}


@pytest.mark.parametrize("case", ALIASES)
def test_24_aliases_and_in_place_calls(case):
    agree(Net(ALIASES[case]), convs=1)


ONE_TRACE = {
    "view taken behind": lambda net, x: torch.cat(F.relu_(net.bn(net.conv(x))).chunk(2, 1)[::-1], 1),
    "view of a view": lambda net, x: F.relu_(net.bn(net.conv(x)))[:, 1:][:, :2] + 1,
    "dropout in place": lambda net, x: F.dropout(F.relu_(net.bn(net.conv(x))), 0.5, net.training, inplace=True).tanh(),
}


@pytest.mark.parametrize("case", ONE_TRACE)
def test_harmless_in_place_calls_cost_no_second_trace(case, monkeypatch):
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    agree(Net(ONE_TRACE[case]), convs=1, folded=1, acts=1)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_dropout_that_is_on_stays_random(inplace):
    net = settle(Net(lambda net, x: F.dropout(net.bn(net.conv(x)), 0.5, True, inplace)))
    frozen, x = freeze(net, torch.randn(2, 3, 8, 8), tune=False, verify=False), torch.randn(2, 3, 32, 32)
    first, second = frozen(x), frozen(x)
    assert 0.4 < (first == 0).float().mean() < 0.6 and not torch.equal(first, second)


def test_the_input_is_never_written_to_and_the_report_says_so():
    net = settle(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    frozen = freeze(net, torch.randn(2, 3, 8, 8), capture="graph", tune=False)
    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    got = frozen(x)
    assert torch.equal(x, before) and any("writes to its input" in note for note in frozen.report.notes)
    with torch.no_grad():
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-4)


def test_dead_code_and_identities_go():
    def forward(net, x):
        y = net.bn2(net.conv2(net.bn(net.conv(x))))  # nobody reads it
        z = net.bn(net.conv(x)).contiguous().clone().detach()
        return F.dropout(F.relu(z), 0.5, net.training) if y.shape[0] >= 0 else y

    frozen = agree(Net(forward), convs=1, acts=1)
    assert not any(row.kind == "other" for row in frozen.report.rows)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code, change", [("BAD_VARIANCE", ("running_var", -1.0)), ("OVERFLOW", ("weight", 1e30))])
def test_13_a_fold_that_is_not_representable_leaves_the_norm(code, change):
    net = settle(Net(lambda net, x: F.relu(net.bn2(net.conv2(F.relu(net.bn(net.conv(x))))))))
    name, value = change
    with torch.no_grad():
        getattr(net.bn, name).fill_(value)
        net.conv.weight.mul_(1e10)
    frozen = freeze(net, torch.randn(2, 3, 8, 8), capture="graph", tune=False, verify=False)
    row = next(row for row in frozen.report.rows if row.name == "conv")
    assert row.reason == code and row.message.startswith("bn: ") and row.took == ()
    assert frozen.report.counts["folded"] == 1 and frozen.report.counts["bn_act"] == 1
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-3, atol=1e-3, equal_nan=True)


def test_16_norms_by_the_batchs_statistics_stay():
    net = Net(lambda net, x: F.relu(net.bn(net.conv(x))), norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    frozen = freeze(settle(net), torch.randn(4, 3, 8, 8), capture="graph", tune=False)
    assert [row.reason for row in frozen.report.rows if row.kind == "norm"] == ["BATCH_STATISTICS"]
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-4)


class Counts(Net):
    number = 0

    def forward(self, x):
        self.number += 1
        return self.bn(self.conv(x))


class Moves(Net):
    def __init__(self):
        super().__init__(None)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1)
        return self.bn(self.conv(x)) * self.steps


class Branches(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if x.mean() > 0 else y


class OneImage(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y.squeeze(0) if len(x) == 1 else y


class StaysInTraining(Net):
    def train(self, mode=True):
        return super().train(True)

    def forward(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    "net, reason",
    [
        (lambda: Counts(None), "its forward changes number"),
        (Moves, "steps"),
        (lambda: Branches(None), "data-dependent"),
        (lambda: StaysInTraining(None), "running_mean"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "has hooks"),
    ],
    ids=["state", "buffer", "data", "training", "hooks"],
)
def test_networks_without_a_graph_keep_their_modules(net, reason, capfd):
    net = settle(net())
    if isinstance(net, nn.Sequential):
        net[0].register_forward_hook(lambda module, args, y: y * 2)
    with pytest.raises(ValueError, match=f"capture: got 'graph', and .* has none: .*{reason}"):
        freeze(net, torch.rand(2, 3, 8, 8), capture="graph", tune=False)
    frozen = freeze(net, torch.rand(2, 3, 8, 8), tune=False, verify=False)
    assert frozen.report.capture == "modules" and reason in frozen.report.capture_reason
    assert any(reason in note for note in frozen.report.notes)
    assert not capfd.readouterr().err  # torch.export prints graphs
    for x in (torch.rand(2, 3, 8, 8), -torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8)):
        if not isinstance(net, Counts | Moves | StaysInTraining):
            with torch.no_grad():
                torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-4)


def test_a_network_that_asks_for_its_batch_is_captured_for_each():
    net = settle(OneImage(None))
    frozen = freeze(net, torch.rand(2, 3, 8, 8), capture="graph", tune=False)
    assert any("fixes its batch" in note for note in frozen.report.notes)
    for batch in (1, 2, 3, 1):
        x = torch.rand(batch, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-4)


def test_networks_that_read_values_fold_neighbours_alone():
    class Reads(Net):
        def __init__(self):
            super().__init__(None)
            self.tail = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            y = self.conv(x)
            return self.tail(self.bn(y) if x.mean() > 0 else y)

    net = settle(Reads())
    frozen = freeze(net, torch.rand(2, 3, 8, 8), tune=False)
    reasons = {row.name: row.reason for row in frozen.report.rows}
    assert reasons["conv"] == reasons["bn"] == "DATA_DEPENDENT" and reasons["tail.0"] == ""
    for x in (torch.rand(2, 3, 8, 8), -torch.rand(2, 3, 8, 8)):
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-4)


def test_capture_is_checked():
    with pytest.raises(ValueError, match="capture: got 'trace', expected 'auto', 'graph' or 'modules'"):
        freeze(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4), capture="trace")


def test_a_fault_in_the_rewriting_loses_no_network(monkeypatch, caplog):
    def fails(*args):
        raise KeyError("a planted fault")

    monkeypatch.setattr("fastres.inference.build.find_regions", fails)
    net = settle(Net(lambda net, x: F.relu(net.bn(net.conv(x)))))
    frozen = freeze(net, torch.randn(2, 3, 8, 8), tune=False)
    assert frozen.report.capture == "modules" and "a fault of fastres" in frozen.report.capture_reason
    assert "planted" in caplog.text and frozen.report.folded == 1 and frozen.report.verification


def test_the_report_has_a_line_for_every_step():
    net = settle(
        nn.Sequential(ConvBNReLU(3, 4, 3), BasicBlock(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    )
    report = freeze(net, torch.randn(2, 3, 8, 8), tune=False).report
    lines = report.table().splitlines()
    assert len(lines) == 1 + len(report.rows) and lines[0].split() == ["name", "became", "MFLOP", "kB"]
    line = next(line for line in lines if line.startswith("1.conv2 "))
    assert "conv + bias + add + relu" in line and "1.bn2 folded" in line
    row = next(row for row in report.rows if row.name == "1.conv2")
    assert row.flops == 2 * 4 * 64 * 4 * 9 and row.bytes == 3 * 4 * 4 * 64 and row.weights == 4 * (4 * 4 * 9 + 4)
    assert report.flops == 2 * sum(row.flops for row in report.rows) > 0


def test_a_graph_with_other_answers_is_a_fault_and_said_to_be(monkeypatch, caplog):
    monkeypatch.setattr("fastres.inference.build.norm_affine", lambda *args: norm_affine(*args[:4], 100.0))
    net = settle(Net(lambda net, x: F.relu(net.bn(net.conv(x)))))
    frozen = freeze(net, torch.randn(2, 3, 8, 8), tune=False)
    assert frozen.report.capture == "modules" and "answers the example otherwise" in frozen.report.capture_reason
    assert "a fault of fastres" in caplog.text and frozen.report.verification


def test_a_network_that_draws_numbers_has_a_graph_that_draws_them(caplog):
    net = settle(Net(lambda net, x: F.relu(net.bn(net.conv(x))) * torch.rand(x.shape[0], 1, 1, 1)))
    frozen = freeze(net, torch.randn(2, 3, 8, 8), capture="graph", tune=False, verify=False)
    x = torch.randn(3, 3, 8, 8)
    answers = []
    for model in (net, frozen, frozen, frozen):
        torch.manual_seed(5)
        with torch.no_grad():
            answers.append(model(x))
    for got in answers[1:]:
        torch.testing.assert_close(got, answers[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(frozen(x), frozen(x)) and "fault" not in caplog.text
