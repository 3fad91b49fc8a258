"""The paper's networks: parameter and multiply-add counts, names, shortcuts, initialization, refusals."""

import pytest
import torch
from torch import nn

from fastres import models
from fastres.models import PlainBlock, ZeroPadShortcut
from fastres.nn import BasicBlock, Bottleneck

IMAGENET = [  # builder, options, parameters, multiply-adds at 224x224 in G, to the digits published
    ("resnet18", {}, 11_689_512, 1.814),
    ("resnet18", {"shortcut": "A"}, 11_515_688, 1.795),
    ("resnet18", {"shortcut": "C"}, 12_043_816, 1.878),
    ("plain18", {}, 11_515_688, 1.795),
    ("resnet34", {}, 21_797_672, 3.664),
    ("resnet34", {"shortcut": "A"}, 21_623_848, 3.644),
    ("resnet34", {"shortcut": "C"}, 22_716_840, 3.831),
    ("plain34", {}, 21_623_848, 3.644),
    ("resnet50", {}, 25_557_032, 4.089),
    ("resnet50", {"stride_in_1x1": True}, 25_557_032, 3.858),
    ("resnet101", {}, 44_549_160, 7.801),
    ("resnet101", {"stride_in_1x1": True}, 44_549_160, 7.570),
    ("resnet152", {}, 60_192_808, 11.514),
    ("resnet152", {"stride_in_1x1": True}, 60_192_808, 11.282),
]
CIFAR = [  # depth, parameters with A, B, C, multiply-adds with A in M at 32x32
    (20, 269_722, 272_474, 283_962, 40.6),
    (32, 464_154, 466_906, 489_594, 68.9),
    (44, 658_586, 661_338, 695_226, 97.2),
    (56, 853_018, 855_770, 900_858, 125.5),
    (110, 1_727_962, 1_730_714, 1_826_202, 252.9),
    (1202, 19_421_274, 19_424_026, 20_538_714, 2829.0),
]


def build(name, *args, **options):
    with torch.device("meta"):
        return getattr(models, name)(*args, **options).eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model, size):
    """Of convolutions and the classifier, as the paper counts them: outputs times weights per output."""
    counts = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, y: counts.append(y.numel() * m.weight[0].numel()))
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return sum(counts)


@pytest.mark.parametrize("name, options, count, macs", IMAGENET)
def test_imagenet_counts_are_the_papers(name, options, count, macs):
    model = build(name, **options)
    assert parameters(model) == count
    assert round(multiply_adds(model, 224) / 1e9, 3) == macs


@pytest.mark.parametrize(
    "depth, a, b, c, macs", [*CIFAR[:4], *(pytest.param(*row, marks=pytest.mark.full) for row in CIFAR[4:])]
)
def test_cifar_counts_are_the_papers(depth, a, b, c, macs):
    counts = [parameters(build("cifar_resnet", depth, shortcut)) for shortcut in "ABC"]
    assert counts == [a, b, c]
    assert parameters(build("cifar_plain", depth)) == a
    got = multiply_adds(build("cifar_resnet", depth), 32)
    assert round(got / 1e6, 1 if depth < 1000 else 0) == macs
    assert multiply_adds(build("cifar_plain", depth), 32) == got


def test_depth_is_the_number_of_weighted_layers():
    for model, depth in ((build("cifar_resnet", 44), 44), (build("resnet50"), 50), (build("plain34"), 34)):
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]
        assert len(layers) == depth


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_state_dict_is_torchvisions(name):
    torchvision = pytest.importorskip("torchvision")
    ours = build(name).state_dict()
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_checkpoint_loads_and_gives_its_answers(name):
    torchvision = pytest.importorskip("torchvision")
    theirs = getattr(torchvision.models, name)(num_classes=7)
    theirs(torch.randn(2, 3, 64, 64))  # statistics that are not the initial ones
    ours = getattr(models, name)(num_classes=7)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    theirs.load_state_dict(ours.state_dict())  # and back


def test_shortcuts_are_where_the_paper_puts_them():
    def projections(model):
        return sum(name.endswith("downsample.0") for name, _ in model.named_modules())

    assert [projections(build("resnet34", shortcut=kind)) for kind in "ABC"] == [0, 3, 16]
    assert projections(build("resnet50")) == 4
    zero_padded = [n for n, m in build("cifar_resnet", 56).named_modules() if isinstance(m, ZeroPadShortcut)]
    assert zero_padded == ["layer2.0.downsample", "layer3.0.downsample"]


@pytest.mark.parametrize("zeros, first", [("end", 0), ("both", 1)])
def test_zero_padded_shortcut(zeros, first):
    x = torch.arange(2 * 2 * 5 * 5.0).view(2, 2, 5, 5) + 1
    y = ZeroPadShortcut(2, 5, stride=2, zeros=zeros)(x)
    assert y.shape == (2, 5, 3, 3)
    assert torch.equal(y[:, first : first + 2], x[:, :, ::2, ::2])
    assert y.count_nonzero() == 2 * 2 * 3 * 3


def test_shortcut_a_is_the_same_network_wherever_its_zeros_go():
    """End or both sides: a permutation of channels, so counts and shapes agree."""
    x = torch.randn(2, 3, 16, 16)
    for zeros in ("end", "both"):
        net = models.cifar_resnet(20, zeros=zeros).eval()
        assert net(x).shape == (2, 10)
        assert parameters(net) == 269_722


def test_stride_moves_to_the_first_1x1():
    for stride_in_1x1, strides in ((True, [2, 1, 1]), (False, [1, 2, 1])):
        block = build("resnet50", stride_in_1x1=stride_in_1x1).layer2[0]
        assert [block.conv1.stride[0], block.conv2.stride[0], block.conv3.stride[0]] == strides


def test_blocks_are_the_fused_ones():
    assert {type(b) for b in build("resnet34").layer3} == {BasicBlock}
    assert {type(b) for b in build("resnet101").layer3} == {Bottleneck}
    assert {type(b) for b in build("cifar_plain", 20).layer3} == {PlainBlock}


def test_plain_network_computes_its_formula():
    block = PlainBlock(4, 6, stride=2).eval()
    x = torch.randn(2, 4, 8, 8)
    expected = torch.relu(block.bn1(block.conv1(x)))
    expected = torch.relu(block.bn2(block.conv2(expected)))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("init", ["fan_out", "fan_in"])
def test_initialization_is_he(init):
    net = models.resnet18(num_classes=5, init=init, zero_init_residual=True)
    weight = net.layer3[0].conv1.weight.detach()  # 128 -> 256, 3x3
    fan = 256 * 9 if init == "fan_out" else 128 * 9
    assert float(weight.std()) == pytest.approx((2 / fan) ** 0.5, rel=0.02)
    assert abs(weight.mean()) < 1e-3
    assert all(not block.bn2.weight.any() and block.bn1.weight.eq(1).all() for block in net.layer1)
    assert not net.fc.bias.any()


def test_zero_init_residual_of_bottlenecks():
    net = models.resnet50(num_classes=5, zero_init_residual=True)
    assert all(not block.bn3.weight.any() for block in net.layer4)


def test_trains_a_step_and_takes_any_channels():
    net = models.cifar_resnet(8, in_channels=1, num_classes=3)
    net(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: models.cifar_resnet(21), ValueError, "depth: got 21"),
        (lambda: models.cifar_resnet(2), ValueError, "depth: got 2"),
        (lambda: models.cifar_resnet("20"), TypeError, "depth: got '20'"),
        (lambda: models.cifar_resnet(20, shortcut="D"), ValueError, "shortcut: got 'D'"),
        (lambda: models.cifar_resnet(20, zeros="start"), ValueError, "zeros: got 'start'"),
        (lambda: models.resnet18(num_classes=0), ValueError, "num_classes: got 0"),
        (lambda: models.resnet18(in_channels=1.0), TypeError, "in_channels: got 1.0"),
        (lambda: models.resnet18(stride_in_1x1=True), ValueError, "stride_in_1x1: got True"),
        (lambda: models.resnet18(init="normal"), ValueError, "init: got 'normal'"),
        (lambda: models.ResNet(BasicBlock, (1, 1, 1)), ValueError, "layers: got 3 stages"),
        (lambda: ZeroPadShortcut(8, 4), ValueError, "out_planes: got 4"),
    ],
)
def test_refusals_name_the_argument(make, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        make()
