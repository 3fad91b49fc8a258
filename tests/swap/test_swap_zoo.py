"""Real networks: all ResNets of torchvision, timm's plain and other ResNets, Hugging Face's; every block accounted for.

Wiring is compared in fp64 (the reference backend, so to 1e-8 through a network); some networks also run in fp32 through
whatever backend the chooser takes, judged against fp64.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import fastres
from fastres.swap import swap
from swap_cases import assert_same, assert_same_steps, fused_calls, hugging_face_resnet, scramble, step, torchvision

models = torchvision.models


def expected_rows(layers, expansion):
    """Blocks, projections (the first stage has one only in bottleneck nets) and the stem."""
    return sum(layers) + (3 if expansion == 1 else 4) + 1


def counts(report):
    return dict(Counter(row.reason or row.status for row in report.rows))


def batch_norms(net):
    return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def images(n=2, size=64, dtype=torch.float32):
    return torch.randn(n, 3, size, size, dtype=dtype)


# ---- torchvision -----------------------------------------------------------------------------------------------------

TORCHVISION = {
    "resnet18": ([2, 2, 2, 2], 1),
    "resnet34": ([3, 4, 6, 3], 1),
    "resnet50": ([3, 4, 6, 3], 4),
    "resnet101": ([3, 4, 23, 3], 4),
    "resnet152": ([3, 8, 36, 3], 4),
    "resnext50_32x4d": ([3, 4, 6, 3], 4),
    "resnext101_32x8d": ([3, 4, 23, 3], 4),
    "resnext101_64x4d": ([3, 4, 23, 3], 4),
    "wide_resnet50_2": ([3, 4, 6, 3], 4),
    "wide_resnet101_2": ([3, 4, 23, 3], 4),
}


def test_the_list_is_torchvisions():
    built = {
        name for name in models.list_models() if models.get_model_builder(name).__module__ == models.resnet.__name__
    }
    assert built == set(TORCHVISION)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_every_block_swaps_and_runs(name):
    """On the meta device: all BN layers run as our operator, in training and eval, with the right shapes."""
    with torch.device("meta"):
        net = models.get_model(name, num_classes=7)
    keys, layers = list(net.state_dict()), TORCHVISION[name]
    report = swap(net, strict=True)
    assert counts(report) == {"swapped": expected_rows(*layers)}
    x = images().to("meta")
    for train in (True, False):
        assert fused_calls(net.train(train), x) == batch_norms(net)
        assert net(x).shape == (2, 7)
    assert list(net.state_dict()) == keys


def build(name):
    if name == "resnet10":  # the smallest with every stage, projections and the stem
        return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7)
    return models.get_model(name, num_classes=7)


def wiring(name):
    net = scramble(build(name)).double()
    stock = copy.deepcopy(net)
    swap(net)
    assert_same_steps(net, stock, images(size=48, dtype=torch.float64), tolerance=1e-8)


def test_torchvision_resnet18_trains_and_evaluates_the_same():
    wiring("resnet18")


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in TORCHVISION if name != "resnet18"])
def test_torchvision_trains_and_evaluates_the_same(name):
    wiring(name)


@pytest.mark.parametrize("name", ["resnet10", *(pytest.param(f"resnet{n}", marks=pytest.mark.full) for n in (18, 50))])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(torch.contiguous_format, marks=pytest.mark.full, id="nchw"),
        pytest.param(torch.channels_last, id="channels_last"),
    ],
)
def test_torchvision_in_fp32_is_as_good_as_eager(name, layout):
    """The referee: every block, forward and backward, on its real inputs; then the network's outputs and statistics.

    Not the whole network's gradients: a ReLU whose input is at rounding's mercy moves all gradients below it, in eager
    as in ours (ResNet-50: 1 of 322 tensors at 2.02 times eager's error, at most 2; its blocks: at most 0.70).
    """
    stock = scramble(build(name)).to(memory_format=layout)
    net, x = copy.deepcopy(stock), images(3, 48).to(memory_format=layout)
    report = swap(net, verify=x)
    assert counts(report) == {"swapped": len(report.rows)}, str(report)
    for train in (True, False):
        verdict = fastres.verify(stock, net, x, training=train, backward=False)
        assert verdict, str(verdict)


def test_row42_torchvision_detection_backbone_has_frozen_norms():
    with torch.device("meta"):
        net = models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, norm_layer=None)
        frozen = models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    assert counts(swap(net.backbone.body))["swapped"] == 20  # no stem: the children are called one by one
    assert counts(swap(frozen)) == {"swapped": 21}


def test_row42_quantizable_blocks_have_their_own_forward():
    with torch.device("meta"):
        net = models.quantization.resnet18(weights=None)
    assert counts(swap(net)) == {"SUBCLASS_FORWARD": 8, "swapped": 4}  # the blocks; the stem and the projections


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("vgg11_bn", {"swapped": 1}),
        ("mobilenet_v2", {"ACT_TYPE": 35, "swapped": 17}),
        ("googlenet", {"swapped": 57}),
        ("densenet121", {"NOT_MATCHED": 58, "swapped": 4}),
    ],
)
def test_other_networks_are_accounted_for(name, wanted):
    with torch.device("meta"):
        net = models.get_model(name, weights=None, **({"aux_logits": False} if name == "googlenet" else {}))
    assert counts(swap(net)) == wanted


# ---- timm ------------------------------------------------------------------------------------------------------------

TIMM = {
    "resnet18": {"swapped": 12},
    "resnet26": {"swapped": 13},
    "resnet34": {"swapped": 20},
    "resnet50": {"swapped": 21},
    "resnet50d": {"swapped": 22},  # the deep stem is a sequence of its own
    "resnext50_32x4d": {"swapped": 21},
    "wide_resnet50_2": {"swapped": 21},
    "seresnet50": {"HAS_EXTRA_LAYER": 16, "swapped": 5},
    "ecaresnet26t": {"HAS_EXTRA_LAYER": 8, "swapped": 6},
    "resnetblur50": {"HAS_EXTRA_LAYER": 3, "swapped": 18},
}


@pytest.mark.parametrize("name", TIMM)
def test_row42_timm_every_block_is_accounted_for(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=7)
    report = swap(net)
    assert counts(report) == TIMM[name]
    assert all(row.message for row in report.rows if row.status == "skipped")
    x = images().to("meta")
    for train in (True, False):
        assert net.train(train)(x).shape == (2, 7)


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        *(pytest.param(n, marks=pytest.mark.full) for n in ("resnet26", "resnet34", "resnet50d", "seresnet50")),
    ],
)
def test_timm_trains_and_evaluates_the_same(name):
    timm = pytest.importorskip("timm")
    net = scramble(timm.create_model(name, num_classes=7)).double()
    stock = copy.deepcopy(net)
    swap(net, strict=True)
    assert_same_steps(net, stock, images(dtype=torch.float64), tolerance=1e-8)


def test_row42_timm_drop_path_drop_block_and_other_norms():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        dropped = timm.create_model("resnet18", drop_path_rate=0.1)
        blocked = timm.create_model("resnet18", drop_block_rate=0.1)
        grouped = timm.create_model("resnet18", norm_layer=timm.layers.GroupNorm)
        fused_act = timm.create_model("resnet18", norm_layer=timm.layers.BatchNormAct2d)
        silu = timm.create_model("resnet18", act_layer="silu")
    assert counts(swap(dropped)) == {"HAS_EXTRA_LAYER": 7, "swapped": 5}  # the first block's rate is 0
    assert counts(swap(blocked)) == {"HAS_EXTRA_LAYER": 4, "swapped": 8}
    assert counts(swap(grouped)) == {"NORM_TYPE": 12}
    assert counts(swap(fused_act)) == {"NORM_TYPE": 12, "swapped": 20}  # each norm with its activation
    assert counts(swap(silu)) == {"ACT_TYPE": 9, "swapped": 3}


def test_timm_stem_under_gradient_checkpointing_and_features():
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet10t", num_classes=7).double()
    stock = copy.deepcopy(net)
    swap(net)
    x = images(dtype=torch.float64)
    for model in (net, stock):
        model.set_grad_checkpointing(True)
    ours, theirs = step(net, x), step(stock, x)  # recomputation moves statistics twice, in its own way
    assert_same(*({k: t for k, t in r.items() if not k.startswith("state")} for r in (ours, theirs)), tolerance=1e-8)
    net.load_state_dict(stock.state_dict())
    ours, theirs = (model.eval().forward_intermediates(x, indices=[0, 2, 4])[1] for model in (net, stock))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face(**options):
    resnet = hugging_face_resnet()
    config = resnet.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3, **options)
    return scramble(resnet.ResNetForImageClassification(config)).double()


@pytest.mark.parametrize(
    ("options", "rows", "calls"),
    [
        ({"layer_type": "basic"}, 11, 8),
        ({"layer_type": "bottleneck"}, 14, 11),
        ({"layer_type": "bottleneck", "downsample_in_bottleneck": True, "downsample_in_first_stage": True}, 15, 12),
    ],
)
def test_row42_hugging_face(options, rows, calls):
    net = hugging_face(**options)
    stock = copy.deepcopy(net)
    report = swap(net)
    assert counts(report) == {"swapped": rows}
    x = images(2, 32, torch.float64)
    assert fused_calls(copy.deepcopy(net), x) == calls == batch_norms(net)
    assert_same_steps(net, stock, x)
    ours, theirs = (model(x, output_hidden_states=True).hidden_states for model in (net, stock))
    assert_same(dict(enumerate(ours)), dict(enumerate(theirs)), 1e-10)


@pytest.mark.parametrize("path", ["layer", "layer.1", "layer.1.normalization", "activation"])
def test_row40_hugging_face_hooks_inside_a_layer_fire(path):
    net = hugging_face(layer_type="basic")
    stock, seen = copy.deepcopy(net), []
    swap(net)
    for model in (net, stock):
        layer = model.resnet.encoder.stages[1].layers[1]
        layer.get_submodule(path).register_forward_hook(lambda m, a, y: seen.append(path))
    assert_same_steps(net, stock, images(2, 32, torch.float64))
    assert len(seen) == 4
    layer = copy.deepcopy(stock).resnet.encoder.stages[1].layers[1]
    assert swap(layer).rows[0].reason == "HAS_HOOKS"


def test_hugging_face_other_activation_is_skipped():
    report = swap(hugging_face(layer_type="basic", hidden_act="gelu"))
    assert {row.reason for row in report.rows if row.pattern == "basic"} == {"ACT_TYPE"}
