"""The networks that freeze is tested on, and what must become of each: real ones of three libraries, nothing adapted.

Counts are FreezeReport.counts without the zeros, read off the architectures: convolutions, how many of them take a BN,
a residual and an activation in, and what is left for steps of its own. Comments say why where a number is not obvious.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fastres.verify import calibrate
from nets import randomize_bn, transformers_module

torchvision = pytest.importorskip("torchvision")
models = torchvision.models


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    counts: dict[str, int]
    size: int = 64
    scales: int = 0  # convolutions that take in a product with a number or with one a channel, but no BN

    @property
    def reasons(self) -> Counter[str]:
        """Why rows did not become more: convolutions have no BN, BN have no convolution; nothing else in this zoo."""
        apart = {
            "conv NO_NORM": self.counts["convs"] - self.counts.get("folded", 0) - self.scales,
            "norm NO_CONV": self.counts.get("norms_left", 0),
        }
        return +Counter(apart)


def prepared(zoo: Net) -> nn.Module:
    """The network in eval mode with BN that do something: random parameters, the statistics of random images."""
    torch.manual_seed(1)
    net, x = zoo.make().eval(), torch.randn(4, 3, zoo.size, zoo.size)
    frozen = [m for m in randomize_bn(net, statistics=False).modules() if "FrozenBatchNorm" in type(m).__name__]
    hooks = [m.register_forward_pre_hook(_take_statistics) for m in frozen]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    calibrate(net, x)
    return net


def _take_statistics(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    norm.running_mean.copy_(args[0].mean((0, 2, 3)))  # [C]
    norm.running_var.copy_(args[0].var((0, 2, 3)))  # [C]


def tv(name: str, size: int = 64, options: Any = None, **counts: int) -> Net:
    given = {"num_classes": 7} if options is None else options
    return Net(lambda: models.get_model(name, weights=None, **given), counts, size)


def backbone(make: Callable[[], nn.Module], **counts: int) -> Net:
    return Net(make, counts)


def timm(name: str, frozen: bool = False, scales: int = 0, options: Any = None, **counts: int) -> Net:
    def make() -> nn.Module:
        library = pytest.importorskip("timm")
        net: nn.Module = library.create_model(
            name, pretrained=False, **({"num_classes": 7} if options is None else options)
        )
        return library.layers.freeze_batch_norm_2d(net) if frozen else net

    return Net(make, counts, scales=scales)


def hf(kind: str, size: int = 64, family: str = "ResNetConfig", options: Any = None, **counts: int) -> Net:
    """A class of transformers."""

    def make() -> nn.Module:
        library = transformers_module()
        net: nn.Module = getattr(library, kind)(getattr(library, family)(**(options or {})))
        return net

    return Net(make, counts, size)


R18 = {"convs": 20, "folded": 20, "adds": 8, "acts": 17}
R50 = {"convs": 53, "folded": 53, "adds": 16, "acts": 49}
HEAD = {"pool_linear": 1}
SMALL = {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [2, 1, 2], "num_labels": 4}
NO_AUX = {"init_weights": False, "num_classes": 7}
SEGMENT = {"weights_backbone": None, "num_classes": 5}


def faster_rcnn() -> nn.Module:
    detector = models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    return detector.backbone  # type: ignore[no-any-return]


def feature_pyramid() -> nn.Module:
    """The same with FrozenBatchNorm2d, as it is with pretrained weights."""
    make = models.detection.backbone_utils.resnet_fpn_backbone
    return make(backbone_name="resnet50", weights=None)  # type: ignore[no-any-return]


NETS = {
    # torchvision
    "resnet18": tv("resnet18", **R18, **HEAD),
    "resnet34": tv("resnet34", convs=36, folded=36, adds=16, acts=33, **HEAD),
    "resnet50": tv("resnet50", **R50, **HEAD),
    "resnet101": tv("resnet101", convs=104, folded=104, adds=33, acts=100, **HEAD),
    "resnet152": tv("resnet152", convs=155, folded=155, adds=50, acts=151, **HEAD),
    "resnext50_32x4d": tv("resnext50_32x4d", **R50, **HEAD),
    "wide_resnet50_2": tv("wide_resnet50_2", **R50, **HEAD),
    "regnet_x_400mf": tv("regnet_x_400mf", convs=71, folded=71, adds=22, acts=67, **HEAD),
    # squeeze-excitation: two convolutions without a BN a block, one with the ReLU, one before a sigmoid
    "regnet_y_400mf": tv("regnet_y_400mf", convs=85, folded=53, adds=16, acts=65, **HEAD),
    # pre-activation: the first BN of each layer and transition, and the last one, read a concatenation or a pool
    "densenet121": tv("densenet121", convs=120, folded=59, acts=59, norms_left=62, bn_act=62, **HEAD),
    "mobilenet_v2": tv("mobilenet_v2", convs=52, folded=52, adds=10, acts=35, **HEAD),
    "mobilenet_v3_small": tv("mobilenet_v3_small", convs=52, folded=34, adds=6, acts=32, **HEAD),
    "mobilenet_v3_large": tv("mobilenet_v3_large", convs=62, folded=46, adds=10, acts=39, **HEAD),
    "mnasnet0_5": tv("mnasnet0_5", convs=52, folded=52, adds=10, acts=35, **HEAD),
    # the SE convolution that ends in a SiLU; residuals come without an activation
    "efficientnet_b0": tv("efficientnet_b0", convs=81, folded=49, adds=9, acts=49, **HEAD),
    "googlenet": tv("googlenet", options=NO_AUX, convs=57, folded=57, acts=57, **HEAD),  # auxiliary heads do not run
    "inception_v3": tv("inception_v3", 96, NO_AUX, convs=94, folded=94, acts=94, **HEAD),
    "vgg16_bn": tv("vgg16_bn", convs=13, folded=13, acts=13),  # its pool keeps 7x7
    "shufflenet_v2_x0_5": tv("shufflenet_v2_x0_5", convs=56, folded=56, acts=37, **HEAD),
    "squeezenet1_1": tv("squeezenet1_1", convs=26, acts=26),  # no BN; the pool is behind the classifier
    "convnext_tiny": tv("convnext_tiny", convs=22),  # layer norms: nothing to fold
    # the classifier's last convolution has no BN
    "fcn_resnet50": tv("fcn_resnet50", options=SEGMENT, convs=55, folded=54, adds=16, acts=50),
    "deeplabv3_resnet50": tv("deeplabv3_resnet50", options=SEGMENT, convs=61, folded=60, adds=16, acts=56),
    # the pyramid's sums go into its lateral convolutions, which have no BN, nor have those behind them
    "fasterrcnn-backbone": backbone(faster_rcnn, convs=61, folded=53, adds=19, acts=49),
    "frozen-batch-norm-backbone": backbone(feature_pyramid, convs=61, folded=53, adds=19, acts=49),
    # timm
    "timm-resnet50d": timm("resnet50d", convs=55, folded=55, adds=16, acts=51, **HEAD),
    # sums of SE blocks are of a product: only the four projections can take one in, with its ReLU
    "timm-seresnet50": timm("seresnet50", convs=85, folded=53, adds=4, acts=53, add_relu=12, **HEAD),
    # 5 BN and 1x1 heads: norms before each block and at the end; conv3 and projections have no BN behind them
    "timm-resnetv2_50": timm("resnetv2_50", convs=54, folded=32, adds=16, acts=32, norms_left=17, bn_act=17),
    "timm-resnext50_32x4d": timm("resnext50_32x4d", **R50, **HEAD),
    # the attention's convolutions are one-dimensional
    "timm-ecaresnet26t": timm("ecaresnet26t", convs=39, folded=31, adds=4, acts=23, add_relu=4, **HEAD),
    "timm-skresnet18": timm("skresnet18", convs=44, folded=36, adds=8, acts=33, **HEAD),
    "timm-skresnet50": timm("skresnet50", convs=101, folded=85, adds=16, acts=81, **HEAD),
    # its inner sums come before a convolution, of a slice and an activation
    "timm-res2net50_26w_4s": timm("res2net50_26w_4s", convs=85, folded=85, adds=16, acts=81, **HEAD),
    # sums of up to four branches: each convolution takes one in, the others are left
    "timm-hrnet_w18_small": timm("hrnet_w18_small", convs=91, folded=91, adds=30, acts=67, add_relu=8, **HEAD),
    "timm-dla34": timm("dla34", convs=38, folded=37, adds=12, acts=33),  # the head is a convolution
    "timm-cspresnet50": timm("cspresnet50", convs=55, folded=55, adds=13, **HEAD),  # leaky ReLUs stay
    "timm-regnety_002": timm("regnety_002", convs=70, folded=44, adds=13, acts=53, **HEAD),
    # 33 BN with an activation are one module, BatchNormAct2d; a head of pool, convolution, activation, linear
    "timm-efficientnet_b0": timm("efficientnet_b0", convs=81, folded=49, adds=9, acts=49, **HEAD),
    "timm-mobilenetv3_small_100": timm("mobilenetv3_small_100", convs=53, folded=34, adds=6, acts=33),
    "timm-densenet121": timm("densenet121", convs=120, folded=59, acts=59, norms_left=62, bn_act=62, **HEAD),
    "timm-resnet18-frozen": timm("resnet18", frozen=True, **R18, **HEAD),
    "timm-efficientnet_b0-frozen": timm("efficientnet_b0", frozen=True, convs=81, folded=49, adds=9, acts=49, **HEAD),
    "timm-resnet18-features": timm("resnet18", options={"features_only": True}, **R18),
    # standardized weights are constants, not BN; GroupNorm stays
    "timm-resnetv2_50x1_bit": timm("resnetv2_50x1_bit", convs=54, adds=16),
    # two convolutions a block and, in most, a BN of the input: it takes the second sum and the ReLU
    "timm-repvgg_a0": timm("repvgg_a0", convs=44, folded=44, adds=22, acts=5, norms_left=17, bn_act=17, **HEAD),
    # up to five convolutions and a BN side by side: each but one takes a sum in, the BN or the last one the ReLU
    "timm-mobileone_s0": timm(
        "mobileone_s0", convs=191, folded=191, adds=148, acts=8, norms_left=35, bn_act=35, **HEAD
    ),
    "timm-dpn68": timm("dpn68", convs=72, folded=45, acts=45, norms_left=27, bn_act=27),  # pre-activation
    "timm-ghostnet_100": timm("ghostnet_100", convs=95, folded=80, adds=5, acts=42),  # sums are written into views
    "timm-nf_resnet50": timm("nf_resnet50", scales=16, convs=53, adds=16, acts=36, **HEAD),
    "timm-resnest14d": timm("resnest14d", convs=27, folded=23, adds=4, acts=19, **HEAD),
    "timm-resnetblur18": timm("resnetblur18", convs=24, folded=20, adds=8, acts=17, **HEAD),  # 4 blurs
    "timm-convnext_atto": timm("convnext_atto", scales=12, convs=40, adds=12),
    # Hugging Face
    "hf-v1.5": hf("ResNetForImageClassification", **R50, **HEAD),
    "hf-v1": hf("ResNetForImageClassification", options={"downsample_in_bottleneck": True}, **R50, **HEAD),
    # 5 blocks of 3 convolutions, projections in all stages but the first, the stem
    "hf-small": hf("ResNetForImageClassification", options=SMALL, convs=18, folded=18, adds=5, acts=16, **HEAD),
    "hf-model": hf("ResNetModel", **R50),
    "hf-backbone": hf("ResNetBackbone", options={"out_features": ["stage2", "stage4"]}, **R50),
    "hf-mobilenet_v2": hf(
        "MobileNetV2ForImageClassification", family="MobileNetV2Config", convs=52, folded=52, adds=10, acts=35, **HEAD
    ),
}

QUICK = (
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "timm-ecaresnet26t",
    "timm-resnet18-frozen",
    "hf-small",
)
