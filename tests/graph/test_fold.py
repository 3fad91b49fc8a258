"""Folding BN into convolutions: the arithmetic, refusals, what is shared. `test_NN_`: rows of faults.md."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastres.graph.fold import Folded, fold_affine, norm_affine
from fastres.graph.rows import Refusal
from freeze_cases import Net, agree, cifar, freeze, images, rows, settle


def fold(conv, norm, dtype):
    affine = norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    return affine if isinstance(affine, Refusal) else fold_affine(conv.weight, conv.bias, *affine, dtype)


# ---- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_13_fold_is_the_formula_in_float64_rounded_once(dtype):
    conv, bn = nn.Conv2d(6, 8, 3, groups=2, bias=True), settle(nn.BatchNorm2d(8, eps=1e-3))
    folded = fold(conv, bn, dtype)
    scale = bn.weight.double() / (bn.running_var.double() + 1e-3).sqrt()
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = (conv.bias.double() - bn.running_mean.double()) * scale + bn.bias.double()
    exact = {"rtol": 1e-14, "atol": 0.0} if dtype is torch.float64 else {"rtol": torch.finfo(dtype).eps / 2 * 1.001}
    torch.testing.assert_close(folded.weight.double(), weight, **({"atol": 1e-7} | exact))
    torch.testing.assert_close(folded.bias.double(), bias, **({"atol": 1e-7} | exact))
    assert folded.weight.dtype == folded.bias.dtype == dtype


def test_folded_convolution_computes_what_the_two_did():
    pair = settle(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False))).double()
    folded = fold(*pair, torch.float64)
    x = images().double()
    torch.testing.assert_close(F.conv2d(x, folded.weight, folded.bias), pair(x))


@pytest.mark.parametrize(
    ("code", "variance", "dtype"),
    [
        ("BAD_VARIANCE", 0.0, torch.float32),
        ("BAD_VARIANCE", 1e-40, torch.float32),  # subnormal
        ("BAD_VARIANCE", float("nan"), torch.float32),
        ("OVERFLOW", 1e-12, torch.float16),
        ("UNDERFLOW", 1e14, torch.float16),
    ],
)
def test_13_fold_is_refused_where_the_dtype_cannot_hold_it(code, variance, dtype):
    conv, bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.0)
    bn.running_var.fill_(variance)
    refusal = fold(conv, bn, dtype)
    assert isinstance(refusal, Refusal) and refusal.code == code and refusal.message
    bn.running_var.fill_(1.0)
    bn.running_var[1] = 1e-10  # one dead channel is no reason
    assert isinstance(fold(conv, bn, torch.float32), Folded)


# ---- in networks -----------------------------------------------------------------------------------------------------


def plain(net, x):
    return F.relu(net.second(F.relu(net.first(x))))


@pytest.mark.parametrize(
    ("code", "where", "value"), [("BAD_VARIANCE", "running_var", -1.0), ("OVERFLOW", "weight", 1e30)]
)
def test_13_a_refused_fold_leaves_the_norm_and_says_why(code, where, value):
    net = Net(plain)
    with torch.no_grad():
        getattr(net.bn, where).fill_(value)
        net.conv.weight.mul_(1e10)
    frozen = agree(net, verify=False, tol=1e-3, folded=1, bn_act=1)
    row = next(row for row in frozen.report.rows if row.name == "conv")
    assert row.reason == code and row.message.startswith("bn: ") and row.took == ()
    assert rows(frozen, "norm") == {"bn": code}
    assert "some of its numbers are not finite, or too large to fold" in " ".join(frozen.report.notes)


def test_13_a_norm_that_half_precision_cannot_hold_keeps_float32_tensors():
    net = Net(plain)
    net.bn.running_var.fill_(1e-12)
    net.bn.eps = 1e-12
    frozen = freeze(net, images(), dtype=torch.float16, tune=False, verify=False)
    assert rows(frozen, "conv") == {"conv": "OVERFLOW"} and frozen.report.folded == 1
    assert frozen.weights.bn.running_var.dtype == torch.float32
    assert freeze(net, images(), tune=False, verify=False).report.folded == 2  # float32 holds it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_13_half_precision_fold_is_as_good_as_unfolded(dtype):
    net = settle(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)))
    verdict = freeze(net, torch.randn(4, 8, 8, 8), dtype=dtype, tune=False).report.verification
    assert verdict and verdict.error_ratio <= 2 and verdict.dtype == str(dtype).removeprefix("torch.")


NORMS = {
    "sync": (nn.SyncBatchNorm, 1),
    "no affine": (lambda c: nn.BatchNorm2d(c, affine=False), 1),
    "eps": (lambda c: nn.BatchNorm2d(c, eps=0.1), 1),
    "no momentum": (lambda c: nn.BatchNorm2d(c, momentum=None), 1),
    "subclass": (type("MyBatchNorm", (nn.BatchNorm2d,), {}), 1),
    "group": (lambda c: nn.GroupNorm(2, c), 0),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm):
    make, folded = NORMS[norm]
    frozen = agree(Net(lambda net, x: F.relu(net.first(x)), norm=make), convs=1, folded=folded, acts=folded)
    assert rows(frozen) == ({} if folded else {"conv": "NO_NORM"})
    assert ("no BN was folded" in frozen.report.notes) == (not folded)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
def test_14_torchvisions_frozen_norm_has_its_own_eps(eps):
    ops = pytest.importorskip("torchvision").ops
    net = Net(lambda net, x: net.relu(net.first(x)), norm=lambda c: ops.FrozenBatchNorm2d(c, eps=eps))
    frozen = agree(net, convs=1, folded=1, acts=1)
    assert not [row for row in frozen.report.rows if row.kind == "other"]  # nothing is left of the arithmetic


def test_14_timms_norms_with_an_activation_of_their_own():
    layers = pytest.importorskip("timm.layers")
    for norm in (layers.BatchNormAct2d, layers.FrozenBatchNormAct2d):
        agree(Net(lambda net, x: net.first(x), norm=norm), convs=1, folded=1, acts=1)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_fold(dims):
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    net = settle(nn.Sequential(conv(3, 4, 3, bias=False), norm(4), nn.ReLU()))
    agree(net, torch.randn(2, 3, *[6] * dims), folded=1, norms_left=0)


# ---- shared, and otherwise used --------------------------------------------------------------------------------------

SHARED = {  # forward, how many BN are folded into how many convolutions, why the others are not
    "a convolution called for two norms": (lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv(x)), 2, 2, {}),
    "one output read by two norms": (
        lambda m, x: (lambda z: m.bn(z) + m.bn2(z))(m.conv(x)),
        0,
        1,
        {"conv": "OTHER_USE", "bn": "SHARED", "bn2": "SHARED"},
    ),
    "a norm of two convolutions": (lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv2(m.conv(x))), 2, 3, {"conv": "NO_NORM"}),
    "output used next to the norm": (
        lambda m, x: (lambda z: m.bn(z) + z.abs())(m.conv(x)),
        0,
        1,
        {"conv": "OTHER_USE", "bn": "SHARED"},
    ),
    "output viewed next to the norm": (
        lambda m, x: (lambda z: m.bn(z) + z[:1])(m.conv(x)),
        0,
        1,
        {"conv": "OTHER_USE", "bn": "SHARED"},
    ),
    "output returned": (lambda m, x: (lambda z: (m.bn(z), z))(m.conv(x)), 0, 1, {"conv": "OTHER_USE", "bn": "SHARED"}),
    "weight used elsewhere": (lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum(), 1, 1, {}),
    "statistics used elsewhere": (lambda m, x: m.bn(m.conv(x)) * m.bn.running_mean.sum(), 1, 1, {}),
    "something between": (lambda m, x: m.bn(m.conv(x).relu()), 0, 1, {"conv": "NO_NORM", "bn": "NO_CONV"}),
    "changed in place": (lambda m, x: m.bn(m.conv(x).mul_(2)), 1, 1, {}),
    "a pair twice": (lambda m, x: m.second(m.second(m.first(x)).relu()), 3, 3, {}),
}


@pytest.mark.parametrize("case", SHARED)
def test_41_shared_and_otherwise_used_layers(case):
    forward, folded, convs, reasons = SHARED[case]
    frozen = agree(Net(forward), folded=folded, convs=convs)
    assert reasons.items() <= rows(frozen).items(), frozen.report
    assert all(row.message for row in frozen.report.rows if row.reason)


def test_41_one_weight_for_equal_steps_another_for_others():
    def twice(net, x):
        y = net.first(x)
        for _ in range(2):
            y = F.relu(net.second(y))
        return y

    frozen = agree(Net(twice), convs=3, folded=3, acts=2)
    assert [name for name in frozen.graph.constants if name.endswith("weight")] == ["conv.weight", "conv2.weight"]
    frozen = agree(Net(lambda net, x: net.second(net.first(x)) * net.bn(net.conv2(net.first(x)))), convs=4, folded=4)
    assert sum("conv2" in name and name.endswith("weight") for name in frozen.graph.constants) == 2


def test_41_tied_weights_and_layers_of_two_names():
    def prepare(net):
        net.alias, net.conv2.weight = net.bn, nn.Parameter(torch.randn(4, 4, 3, 3))
        net.conv3 = nn.Conv2d(4, 4, 3, padding=1)
        net.conv3.weight = net.conv2.weight

    agree(Net(lambda net, x: net.bn2(net.conv3(net.second(net.alias(net.conv(x))))), prepare), folded=3)
    net = cifar()
    net.layer1[0].conv2 = net.layer1[0].conv1
    agree(net, images(2, 16), folded=7)


def test_16_norms_by_the_batchs_statistics_stay():
    net = Net(lambda net, x: F.relu(net.first(x)), norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    assert rows(agree(net, images(4), batches=(2, 3)), "norm") == {"bn": "BATCH_STATISTICS"}


def test_a_norm_of_what_the_input_computes_stays():
    def forward(net, x):
        return F.batch_norm(net.conv(x), *[*net.bn.buffers()][:2], net.bn.weight * x.mean(), net.bn.bias)

    assert rows(agree(Net(forward), folded=0), "norm") == {"bn": "NOT_CONSTANT"}
