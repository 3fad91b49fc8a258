"""Each fusion on captured graphs: every written form of conv -> affine -> add -> act, BN and sums alone, heads; what
does not match. Each network is compared with its source by the referee, and at 1, 3 and no images.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastres import models
from fastres.nn import BasicBlock, ConvBNReLU
from freeze_cases import Net, agree, freeze, images, others, rows, settle

# ---- conv_bn_act: the activation -------------------------------------------------------------------------------------

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
@pytest.mark.parametrize("norm", [True, False])
def test_activations_in_every_form(act, norm):
    net = Net(lambda net, x: ACTS[act](net, net.first(x) if norm else net.conv(x)), bias=not norm)
    frozen = agree(net, convs=1, folded=int(norm), acts=1, norms_left=0)
    assert len(frozen.graph.steps) == 1 and not others(frozen)


@pytest.mark.parametrize(
    "act",
    [F.gelu, torch.tanh, F.leaky_relu, lambda y: y.clamp(0.1, 3), lambda y: F.threshold(y, 0.5, 0.1)],
    ids=["gelu", "tanh", "leaky", "clamp", "threshold"],
)
def test_other_activations_stay(act):
    frozen = agree(Net(lambda net, x: act(net.first(x))), convs=1, folded=1, acts=0)
    assert len(frozen.graph.steps) == 2 and "read by" in frozen.report.rows[0].message


# ---- conv_bn_act: the residual ---------------------------------------------------------------------------------------

ADDS = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "in place": lambda x, y: x.add_(y),
    "+=": lambda x, y: x.__iadd__(y),
    "torch.add": lambda x, y: torch.add(y, x),
    "alpha": lambda x, y: torch.add(x, y, alpha=1),
    "sum": lambda x, y: sum([x, y, 0]) / 1 * 1.0 - 0,  # 0 + x + y + 0
}


@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("act", ["functional", "module"])
def test_residuals_in_every_form(add, act):
    def forward(net, x):
        y = F.relu(net.first(x))
        return ACTS[act](net, ADDS[add](net.second(y), y))

    assert not others(agree(Net(forward), convs=2, folded=2, adds=1, acts=2))


NO_RESIDUAL = {
    "alpha": lambda y, x: torch.add(y, x, alpha=2),
    "channels": lambda y, x: y + x.mean((2, 3), keepdim=True),
    "broadcast": lambda y, x: y + x[:1],
    "double": lambda y, x: y + x.double(),
    "itself": lambda y, x: y + y,
    "difference": lambda y, x: y - x,
}


@pytest.mark.parametrize("add", NO_RESIDUAL)
def test_sums_that_are_no_residual_stay(add):
    def forward(net, x):
        y = F.relu(net.first(x))
        return F.relu(NO_RESIDUAL[add](net.second(y), y))

    agree(Net(forward), convs=2, folded=2, adds=0)


def residual(forward, **counts):
    return lambda net, x: (lambda y: forward(net, y))(F.relu(net.first(x))), counts


TREES = {
    "computed behind the convolution": residual(lambda n, y: F.relu(n.second(y) + y.sigmoid()), adds=1, acts=2),
    "two convolutions": residual(lambda n, y: F.relu(n.second(y) + n.bn(n.conv2(y))), convs=3, folded=3, adds=1),
    "an activation that is fused without one": residual(lambda n, y: F.silu(n.second(y) + y), adds=1, acts=1),
    "read twice": residual(lambda n, y: (lambda z: F.relu(z) + z)(n.second(y)), adds=0, acts=1),
    "a shared activation": residual(lambda n, y: (lambda z: z + n.relu(z))(n.relu(n.second(y))), acts=2, adds=0),
    "a tree of sums": residual(
        lambda n, y: F.relu((n.second(y) + n.second(y.flip(1))) + (n.second(y.flip(2)) + y)), adds=2, add_relu=1
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_sums_are_trees(tree):
    forward, counts = TREES[tree]
    agree(Net(forward), **counts)


# ---- conv_bn_act: affines --------------------------------------------------------------------------------------------

AFFINES = [
    lambda net, y: y * 0.5 + 1.5,
    lambda net, y: 2 - y,
    lambda net, y: y / 3 - 1,
    lambda net, y: y * net.bn.weight.view(1, -1, 1, 1),
    lambda net, y: net.bn.bias[:, None, None] - y / net.bn.weight[None, :, None, None].exp(),
    lambda net, y: net.bn2(net.bn(y) * 2),
]


@pytest.mark.parametrize("affine", AFFINES)
def test_affine_arithmetic_folds(affine):
    frozen = agree(Net(lambda net, x: F.relu(affine(net, net.conv(x))), bias=True), convs=1, acts=1, norms_left=0)
    assert {"bn", "scale"} & set(frozen.report.rows[0].took) and not others(frozen)


NOT_AFFINE = {
    "reciprocal": lambda net, y: 1 / (y + 3.0).abs(),
    "plane": lambda net, y: y * net.plane,
    "square": lambda net, y: y * y,
    "data": lambda net, y: y * net.bn(y).mean((0, 2, 3)).view(1, -1, 1, 1),
}


@pytest.mark.parametrize("step", NOT_AFFINE)
def test_what_is_not_affine_stays(step):
    net = Net(
        lambda net, x: NOT_AFFINE[step](net, net.conv(x)), lambda net: net.register_buffer("plane", torch.rand(8, 8))
    )
    frozen = agree(net, batches=(2,) if step == "data" else (1, 3), tol=1e-3, convs=1)
    assert len(frozen.graph.steps) > 1 and rows(frozen).get("conv") in (None, "NO_NORM", "OTHER_USE")


def test_weights_computed_from_parameters_are_constants():
    net = Net(lambda net, x: F.relu(net.first(x)), lambda net: parametrizations.weight_norm(net.conv))
    agree(net, convs=1, folded=1, acts=1)
    std_conv = pytest.importorskip("timm.layers").ScaledStdConv2d
    assert not others(agree(nn.Sequential(std_conv(3, 4, 3), nn.ReLU()).eval(), convs=1, acts=1))


def test_a_weight_computed_from_the_input_stays():
    def forward(net, x):
        return net.bn(F.conv2d(x, x.mean() * x.new_ones(4, 3, 1, 1)))

    assert rows(agree(Net(forward), folded=0)) == {"bn": "NO_CONV"}


@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize("pad", [(0, 0, 0, 0), (1, 1, 2, 2), (0, 1, 0, 1)])
def test_paddings(padding, pad):
    net = nn.Sequential(nn.ZeroPad2d(pad), nn.Conv2d(3, 4, 3, padding=padding), nn.BatchNorm2d(4), nn.ReLU())
    frozen = agree(settle(net), convs=1, folded=1, acts=1)
    assert bool(others(frozen)) == (pad == (0, 1, 0, 1))


def test_a_padding_that_others_read_too_stays():
    agree(Net(lambda net, x: (lambda x: (net.first(x), x.sum((2, 3))))(F.pad(x, (1, 1, 1, 1)))), convs=1)


# ---- bn_act, add_relu, pool_linear -----------------------------------------------------------------------------------


def test_pre_activation_and_sums_without_a_convolution_are_one_pass():
    def forward(net, x):
        y = net.conv(x)
        z = net.conv2(F.relu(net.bn(y)))
        z = net.bn2(y + z).relu()
        return F.relu(z.sigmoid() + y)

    frozen = agree(Net(forward), convs=2, folded=0, adds=1, bn_act=2, add_relu=1, norms_left=2)
    assert rows(frozen, "norm") == {"bn": "SHARED", "bn2": "NO_CONV"}


def test_a_norm_alone_takes_a_residual():
    def forward(net, x):
        y = x.repeat(1, 2, 1, 1)[:, :4]
        return F.relu(net.bn(y * y) + y)

    frozen = agree(Net(forward), bn_act=1, add_relu=0)
    assert frozen.report.rows[0].became == "batch norm + add + relu"


@pytest.mark.parametrize(
    "sum_of", [lambda x: F.gelu(x + x.sigmoid()), lambda x: F.relu(x.flatten(1) + 1), lambda x: F.relu(x + x[:1])]
)
def test_sums_that_are_no_add_relu(sum_of):
    agree(Net(lambda net, x: sum_of(x)), add_relu=0)


HEADS = {
    "adaptive": lambda y: torch.flatten(F.adaptive_avg_pool2d(y, 1), 1),
    "mean": lambda y: y.mean((2, 3)),
    "mean kept": lambda y: y.mean((-1, -2), keepdim=True).flatten(1),
    "view": lambda y: F.adaptive_avg_pool2d(y, (1, 1)).view(y.shape[0], -1),
    "squeeze": lambda y: F.adaptive_avg_pool2d(y, 1).squeeze((2, 3)),
    "avg_pool": lambda y: F.avg_pool2d(y, y.shape[2:]).flatten(1),
    "dropout": lambda y: F.dropout(F.adaptive_avg_pool2d(y, 1).flatten(1), 0.5, training=False),
}


@pytest.mark.parametrize("head", HEADS)
def test_global_pool_and_classifier_are_one_step(head):
    frozen = agree(Net(lambda net, x: net.fc(HEADS[head](F.relu(net.first(x))))), acts=1, pool_linear=1)
    assert [str(step.operator) for step in frozen.graph.steps][1:] == ["aten.mean.dim", "aten.linear.default"]


OTHER_HEADS = {
    "a fixed window": lambda net, y: net.fc(F.avg_pool2d(y, 8).reshape(-1, 4)),  # of larger images not all
    "two pixels": lambda net, y: net.fc(F.adaptive_avg_pool2d(y[:, :1], 2).flatten(1)),
    "one dimension": lambda net, y: net.fc(y.mean(3)[..., 0]),
    "read twice": lambda net, y: (lambda z: net.fc(z) + z.sum())(y.mean((2, 3))),
    "computed weight": lambda net, y: F.linear(y.mean((2, 3)), net.fc.weight * y.mean()),
    "a vector": lambda net, y: F.linear(y.mean((2, 3)), net.fc.weight[0]),
    "divisor": lambda net, y: net.fc(F.avg_pool2d(y, 8, divisor_override=3).flatten(1)),
    "another dtype": lambda net, y: net.fc(y.mean((2, 3), dtype=torch.float64).to(y.dtype)),
}


@pytest.mark.parametrize("head", OTHER_HEADS)
def test_heads_that_are_none(head):
    agree(Net(lambda net, x: OTHER_HEADS[head](net, F.relu(net.first(x)))), acts=1, pool_linear=0)


# ---- together --------------------------------------------------------------------------------------------------------


def test_the_blocks_of_ours_join_with_what_is_around_them():
    block = nn.Sequential(ConvBNReLU(3, 4, 3), BasicBlock(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    agree(settle(block), convs=3, folded=3, adds=1, acts=3, pool_linear=1)
    net = settle(models.cifar_resnet(8, "A", num_classes=5))
    agree(net, images(2, 16), folded=7, adds=3, acts=7, pool_linear=1)


def test_dead_code_and_identities_go():
    def forward(net, x):
        y = net.second(net.first(x))  # nobody reads it
        z = net.first(x).contiguous().clone().detach()
        return F.dropout(F.relu(z), 0.5, net.training) if y.shape[0] >= 0 else y

    assert not others(agree(Net(forward), convs=1, acts=1))


def test_the_report_has_a_line_for_every_step():
    net = settle(
        nn.Sequential(ConvBNReLU(3, 4, 3), BasicBlock(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    )
    report = freeze(net, images(), tune=False).report
    lines = report.table().splitlines()
    assert len(lines) == 1 + len(report.rows) and lines[0].split() == ["name", "became", "MFLOP", "kB"]
    line = next(line for line in lines if line.startswith("1.conv2 "))
    assert "conv + bias + add + relu" in line and "1.bn2 folded" in line
    row = next(row for row in report.rows if row.name == "1.conv2")
    assert row.flops == 2 * 4 * 4 * 22 * 22 and row.bytes == 3 * 4 * 4 * 64 and row.weights == 4 * (4 * 4 * 9 + 4)
    assert report.flops == 2 * sum(row.flops for row in report.rows) > 0
