"""Detectors, which have no graph as a whole: their parts that have one are frozen (rows 6 and 8)."""

import copy

import pytest
import torch
from torch import nn

import fastres
from fastres.inference import FrozenModel
from freeze_cases import conv_bn, freeze, images, notes, settle

torchvision = pytest.importorskip("torchvision")


def detector():
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)
    sizes = {"min_size": 64, "max_size": 96, "rpn_pre_nms_top_n_test": 50, "box_score_thresh": 0.0}
    return settle(FasterRCNN(backbone, 5, **sizes).eval())


def pictures(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def assert_detects_alike(model, want):
    for size in ((64, 64), (80, 60), (61, 93)):
        given = pictures(size)
        with torch.no_grad():
            (got,), (found,) = model(given), want(given)
        for key in ("scores", "boxes", "labels"):
            a, b = (d[key].double().sort(0).values for d in (got, found))
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


def test_row8_the_parts_of_a_detector_are_frozen_and_the_report_says_which(caplog):
    net = detector()
    frozen = fastres.freeze(net, (pictures((64, 64)),), tune=False, verify="warn")
    assert "2 parts have a graph and are frozen: backbone, rpn.head" in notes(frozen)
    assert frozen.report.counts["folded"] == 20 and "fault" not in caplog.text
    assert isinstance(frozen.fallback.backbone, FrozenModel) and frozen.report.verification is not None
    lines = [line for line in str(frozen.report).splitlines() if " stays " in line]
    assert len({line.partition(" stays ")[2] for line in lines}) == len(lines) < 20  # no two alike
    assert_detects_alike(frozen, net)
    with torch.no_grad():
        for p in net.backbone.parameters():
            p.mul_(1.02)
    twin = copy.deepcopy(frozen)
    frozen.refresh()
    assert_detects_alike(frozen, net)
    assert not torch.equal(twin.fallback.backbone(images(1, 64))["0"], frozen.fallback.backbone(images(1, 64))["0"])


def test_row6_a_frozen_backbone_in_a_detector_takes_any_input_size():
    net = detector()
    other = copy.deepcopy(net)
    other.backbone = freeze(other.backbone, images(1, 64), tune=False)
    assert_detects_alike(other, net)
    assert not other.backbone._variants


def test_row8_a_part_that_is_called_with_something_else_is_left_as_it_is():
    class Box:
        def __init__(self, x):
            self.x = x

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.boxed = nn.Sequential(*conv_bn(), nn.ReLU()), Boxed()

        def forward(self, x):
            y = self.body(x) + self.body(x[:1])
            return self.boxed(Box(y)) if float(y.sum()) < 1e9 else y

    class Boxed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(*conv_bn(4, 4), nn.ReLU())

        def forward(self, box):
            return self.inner(box.x)

    net = Odd().eval()
    frozen = fastres.freeze(net, images(2), tune=False)
    assert "2 parts have a graph and are frozen: body, boxed.inner" in notes(frozen)
    x = images(2).requires_grad_()
    fastres.freeze(net, images(2), tune=False, differentiable=True)(x).sum().backward()
    mine, x.grad = x.grad, None
    net(x).sum().backward()
    torch.testing.assert_close(mine, x.grad, rtol=1e-4, atol=1e-4)
    for x in (images(2), images(3), images(1, 12)):
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-4)
    net.body[1].eps = 0.5
    with pytest.raises(RuntimeError, match="freeze it again: body.1.eps, which was"):
        frozen.refresh()
