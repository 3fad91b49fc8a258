"""Folding BN into convolutions: the arithmetic, and what is left alone with a reason.

`test_NN_...` carries its row of the table of known faults.
"""

import pytest
import torch
from torch import nn

from fastres import models
from fastres.inference import freeze
from fastres.nn.fold import Folded, Refusal, fold


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


def reasons(frozen):
    return {row.name: row.reason for row in frozen.report.rows if row.reason}


def replace(sequence, norm):
    sequence[1] = norm


def quick(model, inputs, **options):
    return freeze(model, inputs, tune=False, capture="modules", **options)


# ---- folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fold_is_the_formula_in_float64_rounded_once(dtype):
    conv, bn = nn.Conv2d(6, 8, 3, groups=2, bias=True), nn.BatchNorm2d(8, eps=1e-3)
    trained(nn.Sequential(conv, bn), 4, 6, 8, 8)
    folded = fold(conv, bn, dtype)
    scale = bn.weight.double() / (bn.running_var.double() + 1e-3).sqrt()
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = (conv.bias.double() - bn.running_mean.double()) * scale + bn.bias.double()
    exact = {"rtol": 1e-14, "atol": 0.0} if dtype is torch.float64 else {"rtol": torch.finfo(dtype).eps / 2 * 1.001}
    torch.testing.assert_close(folded.weight.double(), weight, **({"atol": 1e-7} | exact))
    torch.testing.assert_close(folded.bias.double(), bias, **({"atol": 1e-7} | exact))
    assert folded.weight.dtype == folded.bias.dtype == dtype


def test_folded_convolution_computes_what_the_two_did():
    pair = trained(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)), 4, 3, 8, 8).double()
    folded = fold(pair[0], pair[1], torch.float64)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(nn.functional.conv2d(x, folded.weight, folded.bias), pair(x))


def test_13_fold_is_refused_where_the_dtype_cannot_hold_it():
    conv, bn = conv_bn(eps=0.0)
    cases = {
        "BAD_VARIANCE": (0.0, torch.float32),
        "OVERFLOW": (1e-12, torch.float16),
        "UNDERFLOW": (1e14, torch.float16),
    }
    for code, (variance, dtype) in cases.items():
        bn.running_var.fill_(variance)
        refusal = fold(conv, bn, dtype)
        assert isinstance(refusal, Refusal) and refusal.code == code and refusal.message
    bn.running_var.fill_(1e-40)  # subnormal
    assert fold(conv, bn, torch.float32).code == "BAD_VARIANCE"
    bn.running_var.fill_(float("nan"))
    assert fold(conv, bn, torch.float32).code == "BAD_VARIANCE"
    bn.running_var.fill_(1.0)
    bn.running_var[1] = 1e-10  # one dead channel is no reason
    assert isinstance(fold(conv, bn, torch.float32), Folded)


def test_13_a_refused_fold_leaves_the_batch_norm_and_says_why():
    net = trained(nn.Sequential(*conv_bn(), nn.ReLU(), *conv_bn(4, 4)), 4, 3, 8, 8)
    with torch.no_grad():
        net[1].running_var.fill_(1e-12)
    net[1].eps = 1e-12
    frozen = quick(net, torch.randn(2, 3, 8, 8), dtype=torch.float16, verify=False)
    assert reasons(frozen) == {"0": "OVERFLOW", "1": "OVERFLOW"} and frozen.report.folded == 1
    assert isinstance(frozen.module[1], nn.BatchNorm2d) and frozen.module[1].running_var.dtype == torch.float32
    assert isinstance(frozen.module[4], nn.Identity)
    assert quick(net, torch.randn(2, 3, 8, 8), verify=False).report.folded == 2  # float32 holds it


def test_13_half_precision_fold_is_as_good_as_unfolded():
    net = trained(nn.Sequential(*conv_bn(8, 16), nn.ReLU(), *conv_bn(16, 16)), 8, 8, 8, 8)
    for dtype in (torch.bfloat16, torch.float16):
        frozen = quick(net, torch.randn(4, 8, 8, 8), dtype=dtype)
        assert frozen.report.verification and frozen.report.verification.error_ratio <= 2
        assert frozen.report.verification.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
def test_14_frozen_batch_norm_of_torchvision_keeps_its_eps(eps):
    ops = pytest.importorskip("torchvision.ops.misc")
    norm = ops.FrozenBatchNorm2d(4, eps=eps)
    norm.running_var.uniform_(0.01, 0.1)
    norm.running_mean.normal_()
    norm.weight.uniform_(0.5, 1.5)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, nn.ReLU())
    frozen = quick(net, torch.randn(2, 3, 8, 8))
    assert frozen.report.folded == 1 and frozen.report.verification


def test_14_norms_of_timm_keep_their_activation():
    layers = pytest.importorskip("timm.layers")
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4), nn.Conv2d(4, 4, 3)), 4, 3, 8, 8)
    frozen = quick(net, torch.randn(2, 3, 8, 8))
    assert frozen.report.folded == 1 and frozen.report.verification
    assert any(isinstance(m, nn.ReLU) for m in frozen.module.modules())


def test_other_convolutions_fold_too():
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)).eval()
    net[1].running_var.fill_(0.3)
    frozen = quick(net, torch.randn(2, 3, 9))
    assert frozen.report.folded == 1 and frozen.report.verification


# ---- what is not folded, and why ---------------------------------------------------------------------------------


class Net(nn.Module):
    """conv, bn and bn2 in a forward given by each test."""

    def __init__(self, forward, channels=3):
        super().__init__()
        self.conv, self.bn = conv_bn(3, channels)
        self.conv2, self.bn2 = conv_bn(3, channels)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


NOT_FOLDED = {
    "conv read by two norms": (lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv(x)), {"conv": "SHARED"}),
    "one output read by two norms": (
        lambda m, x: (lambda z: m.bn(z) + m.bn2(z))(m.conv(x)),
        {"conv": "SHARED"},
    ),
    "norm reads two convolutions": (lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv2(x)), {"conv": "SHARED"}),
    "norm reads something else too": (lambda m, x: m.bn(m.conv(x)) + m.bn(x), {"conv": "SHARED"}),
    "output used beside the norm": (lambda m, x: (lambda z: m.bn(z) + z)(m.conv(x)), {"conv": "OTHER_USE"}),
    "output viewed beside the norm": (lambda m, x: (lambda z: m.bn(z) + z[:1])(m.conv(x)), {"conv": "OTHER_USE"}),
    "output changed in place": (lambda m, x: m.bn(m.conv(x).mul_(2)), {"conv": "OTHER_USE"}),
    "output returned": (lambda m, x: (lambda z: (m.bn(z), z))(m.conv(x)), {"conv": "OTHER_USE"}),
    "weight used elsewhere": (lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum(), {"conv": "OTHER_USE"}),
    "statistics used elsewhere": (lambda m, x: m.bn(m.conv(x)) * m.bn.running_mean.sum(), {"conv": "OTHER_USE"}),
    "something between": (lambda m, x: m.bn(torch.relu(m.conv(x))), {"conv": "NO_NORM", "bn": "NO_CONV"}),
    "not reached": (lambda m, x: m.bn2(m.conv2(x)), {"conv": "NOT_REACHED", "bn": "NOT_REACHED"}),
}


@pytest.mark.parametrize("case", NOT_FOLDED)
def test_41_shared_and_otherwise_used_modules_are_left_alone_with_a_reason(case):
    forward, expected = NOT_FOLDED[case]
    net = trained(Net(forward), 4, 3, 8, 8)
    x = torch.randn(2, 3, 8, 8)
    frozen = quick(net, x)
    assert expected.items() <= reasons(frozen).items(), frozen.report
    assert frozen.report.verification  # the answers are right whatever was folded
    assert all(row.message for row in frozen.report.rows)


def test_41_a_pair_used_twice_as_a_pair_is_folded_once():
    net = trained(Net(lambda m, x: m.bn(m.conv(torch.relu(m.bn(m.conv(x)))))), 4, 3, 8, 8)
    frozen = quick(net, torch.randn(2, 3, 8, 8))
    assert frozen.report.folded == 1 and frozen.report.verification


def test_41_modules_registered_under_two_names_and_tied_weights():
    net = Net(lambda m, x: m.bn2(m.conv2(torch.relu(m.bn(m.conv(x))))))
    net.alias = net.bn
    net.conv2.weight = net.conv.weight
    trained(net, 4, 3, 8, 8)
    frozen = quick(net, torch.randn(2, 3, 8, 8))
    assert frozen.report.folded == 2 and frozen.report.verification
    assert isinstance(frozen.module.alias, nn.Identity) and frozen.module.conv.weight is not frozen.module.conv2.weight


def test_41_a_resnet_with_one_block_twice():
    net = models.cifar_resnet(20, num_classes=4)
    net.layer1[1] = net.layer1[2]
    trained(net, 4, 3, 8, 8)
    frozen = quick(net, torch.randn(2, 3, 8, 8))
    assert frozen.report.verification and frozen.report.folded == 17


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda n: n[0].register_forward_hook(lambda *_: None), {"0": "HAS_HOOKS", "1": "NO_CONV"}),
        (lambda n: n[1].register_forward_pre_hook(lambda *_: None), {"0": "NO_NORM", "1": "HAS_HOOKS"}),
        (lambda n: nn.utils.parametrizations.weight_norm(n[0]), {"0": "CONV_TYPE", "1": "NO_CONV"}),
        (lambda n: replace(n, nn.BatchNorm2d(4, track_running_stats=False)), {"0": "NO_NORM", "1": "BATCH_STATISTICS"}),
        (lambda n: replace(n, type("MyBatchNorm", (nn.BatchNorm2d,), {})(4)), {"0": "NO_NORM", "1": "NORM_TYPE"}),
        (lambda n: replace(n, nn.GroupNorm(2, 4)), {"0": "NO_NORM"}),
    ],
    ids=["conv hook", "norm hook", "parametrized", "batch statistics", "subclass", "group norm"],
)
def test_modules_with_a_life_of_their_own_are_left_alone(change, expected):
    net = nn.Sequential(*conv_bn(), nn.ReLU())
    change(net)
    trained(net, 4, 3, 8, 8)
    frozen = quick(net, torch.randn(2, 3, 8, 8))
    assert reasons(frozen) == expected and frozen.report.folded == 0
    assert frozen.report.verification and "no BN was folded" in frozen.report.notes
