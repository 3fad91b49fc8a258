"""What the paper's experiments need of the networks: names, blocks of one and three layers, Caffe's ways, counts."""

import copy

import pytest
import torch
from torch import nn

import fastres
from fastres import models
from fastres.lab import networks
from fastres.lab.networks import NetworkError, build, names
from fastres.models import SingleLayerBlock, ThreeLayerBlock, average_statistics, counts
from fastres.nn import BasicBlock, Bottleneck


def meta(name, classes=10, channels=3, **options):
    with torch.device("meta"):
        return build(name, classes, channels, **options)


# ---- counts ----------------------------------------------------------------------------------------------------------

COUNTS = [  # to the unit, by arithmetic from Table 1 and section 4.2; the published digits are in test_models.py
    ("resnet20", "A", 32, 269_722, 40_551_040),
    ("resnet20", "B", 32, 272_474, 40_813_184),
    ("resnet20", "C", 32, 283_962, 42_648_192),
    ("plain20", None, 32, 269_722, 40_551_040),
    ("resnet110", "B", 32, 1_730_714, 253_149_824),
    ("resnet18", "A", 224, 11_515_688, 1_794_805_760),
    ("resnet34", "C", 224, 22_716_840, 3_830_747_136),
    ("plain34", None, 224, 21_623_848, 3_644_493_824),
    ("resnet50", None, 224, 25_557_032, 4_089_184_256),
    ("resnet50-v1", None, 224, 25_557_032, 3_857_973_248),
    ("resnet152-v1", None, 224, 60_192_808, 11_282_415_616),
]


@pytest.mark.parametrize(("name", "shortcut", "size", "parameters", "multiply_adds"), COUNTS)
def test_counts_to_the_unit(name, shortcut, size, parameters, multiply_adds):
    net = meta(name, 10 if size == 32 else 1000, **({"shortcut": shortcut} if shortcut else {}))
    found = counts(net, size)
    assert (found.parameters, found.multiply_adds) == (parameters, multiply_adds)


def test_counts_leave_the_model_alone():
    net = models.cifar_resnet(8)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    counts(net, 16)
    assert net.training and all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(ValueError, match="size: got 0"):
        counts(net, 0)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_every_name_builds():
    for name in names():
        if not name.endswith("1202"):
            weighted = [n for n, m in meta(name).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            layers = [n for n in weighted if "downsample" not in n]
            assert len(layers) == int("".join(filter(str.isdigit, name.removesuffix("-v1")))), name


def test_names_of_two_networks():
    assert type(meta("resnet50").layer1[0]) is Bottleneck and type(meta("cifar-resnet50").layer1[0]) is BasicBlock
    assert meta("resnet50-v1").layer2[0].conv1.stride == (2, 2) and meta("resnet50").layer2[0].conv2.stride == (2, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet51", {}, "network resnet51: depth: got 51, expected 6n"),
        ("vgg16", {}, "network: got 'vgg16', expected one of resnet18"),
        ("resnet5o", {}, "did you mean .*resnet50"),
        ("", {}, "network: got ''"),
        ("resnet20", {"shortcuts": "A"}, "options of resnet20: got 'shortcuts', expected shortcut"),
        ("resnet20", {"shortcut": "D"}, "network resnet20: shortcut: got 'D'"),
        ("resnet20", {"layers_per_block": 4}, "layers_per_block: got 4, expected 1, 2 or 3"),
        ("resnet26", {"layers_per_block": 3}, "depth: got 26, expected 9n"),
        ("plain20", {"layers_per_block": 3}, "layers_per_block: got 3, expected 2 for PlainBlock"),
        ("resnet20", {"depth": 3}, "got 'depth'"),
        ("resnet18", {"layers_per_block": 1}, "got 'layers_per_block'"),
    ],
)
def test_networks_refuse(name, options, message):
    with pytest.raises(NetworkError, match=message) as caught:
        meta(name, **options)
    assert "\n" not in str(caught.value)


def test_networks_take_classes_and_channels():
    assert networks.build("plain8", 7, 1)(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    with pytest.raises(NetworkError, match="num_classes: got 0"):
        build("resnet20", 0)


# ---- residual functions of one and three layers ----------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "layers"), [(SingleLayerBlock, 1), (ThreeLayerBlock, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_chain_block_computes_its_formula(cls, layers, training):
    torch.manual_seed(0)
    block = cls(4, 6, 2, nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))).double().train(training)
    twin = copy.deepcopy(block)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    y = x
    for i in range(1, layers + 1):
        y = getattr(twin, f"bn{i}")(getattr(twin, f"conv{i}")(y))
        y = torch.relu(y) if i < layers else torch.relu(y + twin.downsample(x))
    torch.testing.assert_close(block(x), y)
    y.square().sum().backward()
    if not training:  # in training mode the first call has moved the statistics
        block(x).square().sum().backward()
        for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("depth", [20, 56, 110])
def test_blocks_of_one_two_and_three_layers_cost_the_same(depth, layers):
    net = meta(f"resnet{depth}", layers_per_block=layers)
    assert len(net.layer1) == (depth - 2) // 3 // layers
    assert counts(net, 32) == counts(meta(f"resnet{depth}"), 32)


def test_chain_blocks_are_fused_freeze_and_start_as_the_identity():
    for layers in (1, 3):
        net = build("resnet20", layers_per_block=layers, zero_init_residual=True)
        x = torch.rand(2, 16, 4, 4)
        torch.testing.assert_close(net.layer1[0](x), x)
    net = build("resnet20", layers_per_block=3)
    with torch.profiler.profile() as trace:
        net(torch.randn(2, 3, 8, 8)).sum().backward()
    ran = {event.key for event in trace.key_averages()}
    assert any(key.startswith("fastres::") for key in ran)
    assert not {"aten::batch_norm", "aten::relu", "aten::relu_"} & ran
    net = build("resnet11", layers_per_block=3).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    frozen = fastres.freeze(net, x, tune=False)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-3, atol=1e-4)


# ---- Caffe's ways ----------------------------------------------------------------------------------------------------


def test_caffe_stem():
    net = build("resnet50-v1", 10, 3, conv1_bias=True, ceil_pool=True).eval()
    assert net.conv1.bias is not None and not net.conv1.bias.any()
    x = torch.randn(1, 3, 64, 64)
    stem = torch.relu(net.bn1(net.conv1(x)))
    assert net.maxpool(stem).shape == (1, 64, 16, 16)
    assert torch.equal(net.maxpool(stem)[..., 0, 0], stem[..., :3, :3].amax((2, 3)))  # no padding in front
    assert net(x).shape == (1, 10)
    assert counts(net, 224).parameters == counts(meta("resnet50"), 224).parameters + 64


def test_average_statistics_are_true_averages():
    torch.manual_seed(0)
    net = models.cifar_resnet(8, in_channels=1)
    net(torch.randn(4, 1, 8, 8) + 5)  # statistics to be forgotten
    net.eval()
    net.layer1.train()
    batches = [torch.randn(6, 1, 8, 8) for _ in range(4)]
    outputs = [net.conv1(batch).detach() for batch in batches]
    weights = copy.deepcopy(list(net.parameters()))
    average_statistics(net, iter(batches))
    torch.testing.assert_close(net.bn1.running_mean, torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0))
    torch.testing.assert_close(net.bn1.running_var, torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0))
    assert net.bn1.num_batches_tracked == 4 and net.bn1.momentum == 0.1
    assert not net.training and all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))


def test_average_statistics_refuses_no_batches():
    net = models.cifar_resnet(8)
    before = net.bn1.running_var.clone()
    with pytest.raises(ValueError, match="batches: got none"):
        average_statistics(net, [])
    assert torch.equal(net.bn1.running_var, before)
