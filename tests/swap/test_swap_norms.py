"""Norms other than BatchNorm2d: FrozenBatchNorm2d of detection networks, and timm's that hold an activation."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.ops import FrozenBatchNorm2d

import fastres
from fastres.nn.norms import is_frozen_norm
from fastres.swap import swap, unswap
from nets import transformers_module
from swap_cases import (
    TINY_CALLS,
    assert_same,
    assert_same_steps,
    fused_calls,
    images,
    scramble,
    statuses,
    tiny,
    torchvision,
)

timm = pytest.importorskip("timm")
from timm.layers import BatchNormAct2d, ConvNormAct, FrozenBatchNormAct2d  # noqa: E402

DETECTION = {"detr": "Detr", "rt_detr": "RTDetr"}
OTHERS = {
    "conditional_detr": "ConditionalDetr", "d_fine": "DFine", "dab_detr": "DabDetr", "rt_detr_v2": "RTDetrV2",
    "deformable_detr": "DeformableDetr", "grounding_dino": "GroundingDino", "table_transformer": "TableTransformer",
}  # fmt: skip


def hugging_face(model):
    module = transformers_module(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, f"{(DETECTION | OTHERS)[model]}FrozenBatchNorm2d")


FROZEN = {
    "torchvision": lambda n: FrozenBatchNorm2d(n),
    "torchvision, eps 0": lambda n: FrozenBatchNorm2d(n, eps=0.0),  # torchvision's own pretrained detectors
    **{name: lambda n, name=name: hugging_face(name)(n) for name in DETECTION},
}
every_frozen = pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)


def replace_norms(net, make):
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, make(child.num_features))
    return scramble(net)


def frozen_tiny(make, dtype=torch.float64):
    return replace_norms(tiny(), make).to(dtype)


# ---- statistics that are fixed ---------------------------------------------------------------------------------------


@every_frozen
def test_frozen_norms_answer_and_train_as_stock(make):
    stock = frozen_tiny(make)
    net = copy.deepcopy(stock)
    assert set(statuses(swap(net, strict=True)).values()) == {"swapped"}
    assert_same_steps(net, stock, images())
    assert_same(net.state_dict(), frozen_tiny(make).state_dict(), 0)
    assert fused_calls(net.train(), images()) == fused_calls(net.eval(), images()) == TINY_CALLS
    weights = {k: v.detach() for k, v in net.named_parameters()}
    gradients = [
        torch.func.vmap(
            torch.func.grad(lambda w, x, m=m: torch.func.functional_call(m, w, (x[None],)).square().sum()),
            in_dims=(None, 0),
        )(weights, images(3))
        for m in (net, stock)
        if torch.manual_seed(0)
    ]
    assert_same(*gradients)


@every_frozen
@pytest.mark.parametrize("memory", ["default", "min"])
def test_frozen_norms_in_fp32_are_as_good_as_eager(make, memory):
    stock = frozen_tiny(make, torch.float32)
    net, x = copy.deepcopy(stock), images(dtype=torch.float32)
    report = swap(net, memory=memory, verify=x)
    assert set(statuses(report).values()) == {"swapped"}, str(report)
    for training in (True, False):
        assert fastres.verify(stock, net, x, training=training)
        with torch.no_grad():
            y = net.train(training)(x)
        torch.testing.assert_close(y, stock(x).detach(), rtol=1e-4, atol=1e-5)
    stock.layer1[0].bn1.running_var.data.mul_(9)
    net.load_state_dict(stock.state_dict())
    torch.testing.assert_close(net(x), stock(x), rtol=1e-4, atol=1e-5)


def test_frozen_norms_promote_as_stock():
    """Under autocast the norm's fp32 buffers make its output fp32, and so does ours."""
    stock = frozen_tiny(FROZEN["torchvision"], torch.float32)
    net, x = copy.deepcopy(stock), images(dtype=torch.float32)
    swap(net)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (model.layer1(model.stem(x)) for model in (net, stock))
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


@pytest.mark.full
@pytest.mark.parametrize("model", OTHERS)
def test_the_frozen_norms_of_hugging_face_are_known(model):
    assert is_frozen_norm(hugging_face(model)(4))


class Lookalike(FrozenBatchNorm2d):
    """eps outside of the root."""

    def forward(self, x):
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv.sqrt() + self.eps).reciprocal()
        bias = b - rm * scale
        return x * scale + bias


def test_a_frozen_norm_is_known_by_its_formula_and_not_guessed():
    stock = frozen_tiny(Lookalike)
    net = copy.deepcopy(stock)
    assert set(statuses(swap(net)).values()) == {"NORM_TYPE"}
    hooked = frozen_tiny(FROZEN["torchvision"])
    hooked.layer1[0].bn1.register_forward_hook(lambda module, args, y: y + 1)
    other, found = copy.deepcopy(hooked), statuses(swap(hooked))
    assert found["layer1.0"] == "HAS_HOOKS" and found["layer1.1"] == "swapped"
    assert_same_steps(hooked, other, images())


def test_a_detector_trains_and_detects_as_stock():
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    few = {f"rpn_{when}_nms_top_n_{mode}": 40 for when in ("pre", "post") for mode in ("train", "test")}
    head = torchvision.models.detection.faster_rcnn.TwoMLPHead(256 * 49, 8)
    predictor = torchvision.models.detection.faster_rcnn.FastRCNNPredictor(8, 3)
    stock = FasterRCNN(body, min_size=64, max_size=64, box_head=head, box_predictor=predictor, **few)
    stock = scramble(stock).double()
    assert type(body.body.bn1) is FrozenBatchNorm2d
    net = copy.deepcopy(stock)
    assert sum(row.status == "swapped" for row in swap(net).rows) == 11
    photographs = [torch.rand(3, 64, 64, dtype=torch.float64), torch.rand(3, 48, 64, dtype=torch.float64)]
    boxes = torch.tensor([[4.0, 4.0, 40.0, 30.0]], dtype=torch.float64)
    targets = [{"boxes": boxes, "labels": torch.tensor([label])} for label in (1, 2)]
    results = []
    for model in (net, stock):
        torch.manual_seed(1)
        losses = model.train()(photographs, targets)
        sum(losses.values()).backward()
        found = losses | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            detected = model.eval()(photographs)
        results.append(found | {f"{i} {k}": v for i, one in enumerate(detected) for k, v in one.items()})
    assert "backbone.body.layer2.0.conv1.weight" in results[0] and len(results[0]["0 scores"])
    assert_same(*results, tolerance=1e-7)


@pytest.mark.parametrize(
    "build",
    [lambda: frozen_tiny(FROZEN["torchvision"]), lambda: scramble(nn.Sequential(ConvNormAct(3, 8, 3))).double()],
    ids=["frozen", "timm"],
)
@pytest.mark.parametrize("train", [False, True])
def test_compiled(build, train):
    stock, x = build().train(train), images()
    net = copy.deepcopy(stock)
    swap(net, strict=True)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), stock(x))


# ---- eps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, -1e-3])
@pytest.mark.parametrize("train", [True, False])
def test_row56_eps_that_stock_refuses(eps, train):
    x, bn = torch.randn(2, 3, 4, 4), nn.BatchNorm2d(3, eps=eps).train(train)
    conv = nn.Conv2d(3, 3, 1)
    if eps == 0.0 and not train and torch.__version__ >= (2, 15):
        torch.testing.assert_close(fastres.functional.bn_act_module(x, bn, act="none"), bn(x))  # stock takes it there
        return
    refuses = pytest.raises(ValueError, match=f"batch_norm eps must be .*, but got {eps}")
    with refuses:
        bn(x)
    with refuses:
        fastres.functional.bn_act(x, bn.running_mean, bn.running_var, training=train, eps=eps)
    with refuses:
        fastres.functional.bn_act_module(x, bn)
    with refuses:
        fastres.nn.conv_bn_act(x, conv, bn)
    net = torchvision.models.resnet.BasicBlock(3, 3).train(train)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    swap(net, strict=True)
    for grad in (True, False):
        for module in (net.bn1, net.bn2):
            net.bn1.eps = net.bn2.eps = 1e-5
            net.load_state_dict(before)
            module.eps = eps
            with torch.set_grad_enabled(grad), refuses:
                net(x)
            assert not module.num_batches_tracked  # nothing has moved


# ---- norms that hold an activation: timm -----------------------------------------------------------------------------


class Doubled(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()

    def forward(self, x):
        return 2 * x


UNITS = {
    "relu": (lambda: ConvNormAct(3, 8, 3, stride=2), {"": "swapped", "bn": "swapped"}, 1),
    "none": (lambda: ConvNormAct(3, 8, 3, apply_act=False), {"": "swapped", "bn": "swapped"}, 1),
    "silu": (lambda: ConvNormAct(3, 8, 3, act_layer=nn.SiLU), {"": "swapped", "bn": "swapped"}, 1),
    "leaky, in place": (lambda: ConvNormAct(3, 8, 3, act_layer=nn.LeakyReLU), {"": "swapped", "bn": "swapped"}, 1),
    "an act of its own": (lambda: ConvNormAct(3, 8, 3, act_layer=Doubled), {"": "ACT_TYPE", "bn": "ACT_TYPE"}, 0),
    "dropout": (lambda: ConvNormAct(3, 8, 3, drop_layer=lambda: nn.Dropout(0.0)),
                {"": "HAS_EXTRA_LAYER", "bn": "HAS_EXTRA_LAYER"}, 0),
    "blur": (lambda: ConvNormAct(3, 8, 3, stride=2, aa_layer=lambda channels, stride: nn.AvgPool2d(stride)),
             {"": "HAS_EXTRA_LAYER", "bn": "swapped"}, 1),
    "no norm": (lambda: ConvNormAct(3, 8, 3, apply_norm=False), {"": "NORM_TYPE"}, 0),
    "a norm alone": (lambda: BatchNormAct2d(3), {"": "swapped"}, 1),
    "a frozen norm": (lambda: FrozenBatchNormAct2d(3), {"": "swapped"}, 1),
    "a frozen norm behind": (lambda: timm.layers.freeze_batch_norm_2d(ConvNormAct(3, 8, 3)),
                             {"": "swapped", "bn": "swapped"}, 1),
    "torchvision": (lambda: importlib.import_module("torchvision.models.inception").BasicConv2d(3, 8, kernel_size=3),
                    {"": "swapped"}, 1),
}  # fmt: skip


@pytest.mark.parametrize(("build", "rows", "calls"), UNITS.values(), ids=UNITS)
def test_conv_norm_act_units(build, rows, calls):
    stock = scramble(nn.Sequential(build())).double()
    net, x = copy.deepcopy(stock), images()
    assert statuses(swap(net[0])) == rows
    assert fused_calls(copy.deepcopy(net), x) == calls
    assert_same_steps(net, stock, x)
    for block in net[0].modules():  # a hook that comes later still fires
        if "fastres_stock" in type(block).__dict__ and hasattr(block, "act"):
            block.act.register_forward_hook(lambda module, args, y: y * 2)
            stock.get_submodule(dict((m, n) for n, m in net.named_modules())[block]).act.register_forward_hook(
                lambda module, args, y: y * 2
            )
    assert_same_steps(net, stock, x)
    unswap(net)
    assert_same_steps(net, stock, x)


def hugging_face_layer(path, name, *arguments):
    return getattr(transformers_module(f"transformers.models.{path}"), name)(*arguments)


@pytest.mark.parametrize(
    ("layer", "calls"),
    [
        (("regnet.modeling_regnet", "RegNetConvLayer", 3, 8), 1),
        (("regnet.modeling_regnet", "RegNetShortCut", 3, 8), 1),
        (("rt_detr.modeling_rt_detr_resnet", "RTDetrResNetConvLayer", 3, 8), 1),
        (("rt_detr.modeling_rt_detr_resnet", "RTDetrResNetShortCut", 3, 8), 1),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_hugging_face_layers_train_and_evaluate_the_same(layer, calls):
    stock = scramble(hugging_face_layer(*layer)).double()
    net = copy.deepcopy(stock)
    assert statuses(swap(net)) == {"": "swapped"} and fused_calls(copy.deepcopy(net), images()) == calls
    assert_same_steps(net, stock, images())


ZOO = {
    "inception_v3": {"swapped": 188},
    "cspresnet50": {"swapped": 110},  # LeakyReLU behind the fused step
    "vovnet39a": {"swapped": 78},
    "repvgg_a0": {"swapped": 105, "NOT_MATCHED": 17},
}


@pytest.mark.parametrize("name", ZOO)
def test_timm_networks_of_such_units(name):
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=7)
    rows = [row.reason or row.status for row in swap(net).rows]
    assert {reason: rows.count(reason) for reason in rows} == ZOO[name]
    assert net.train()(images(2, 96).float().to("meta")).shape == (2, 7)


@pytest.mark.parametrize(
    "name", ["repvgg_a0", *(pytest.param(n, marks=pytest.mark.full) for n in ("ese_vovnet19b_dw", "inception_v3"))]
)
def test_timm_networks_of_such_units_train_and_evaluate_the_same(name):
    stock = scramble(timm.create_model(name, num_classes=7)).double()
    net = copy.deepcopy(stock)
    swap(net, strict=True)
    assert_same_steps(net, stock, images(2, 96), tolerance=1e-8)
