"""swap: what is matched, what is left alone and why, the report, filters, undoing."""

import copy
import logging

import pytest
import torch
from torch import nn

import fastres
from fastres.swap import swap, swapped, unswap
from swap_cases import (
    TINY_BLOCKS,
    TINY_CALLS,
    Custom,
    assert_same_steps,
    fused_calls,
    images,
    pair,
    statuses,
    tiny,
    torchvision,
)

vision = torchvision.models.resnet


def classes(model):
    return [(name, type(module)) for name, module in model.named_modules()]


def reason(block, name=""):
    return statuses(swap(block))[name]


# ---- matching and running --------------------------------------------------------------------------------------------


def test_every_block_is_swapped_in_place_and_computes_the_same():
    net, stock = pair()
    objects = list(net.modules())
    report = swap(net)
    assert statuses(report) == dict.fromkeys(TINY_BLOCKS, "swapped")
    assert all(a is b for a, b in zip(objects, net.modules(), strict=True))
    assert isinstance(net.layer1[0], vision.BasicBlock) and type(net.layer1[0]) is not vision.BasicBlock
    assert list(net.state_dict()) == list(stock.state_dict())
    assert_same_steps(net, stock, images())
    assert fused_calls(net, images()) == TINY_CALLS


def test_patterns_name_what_was_matched():
    report = swap(tiny())
    assert [row.pattern for row in report.rows] == [
        *("sequence", "basic", "basic", "sequence", "bottleneck", "bottleneck", "sequence")
    ]


def test_stem_of_a_resnet_is_the_model_itself():
    net, stock = pair(lambda: vision.ResNet(vision.BasicBlock, [1, 1, 1, 1], num_classes=3).double())
    report = swap(net)
    assert report.rows[0].name == "" and report.rows[0].pattern == "stem"
    assert isinstance(net, vision.ResNet) and "(model)" in str(report)
    assert fused_calls(copy.deepcopy(net), images(2, 32)) == 1 + 4 * 2 + 3
    assert_same_steps(net, stock, images(2, 64), modes=(True,))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("build", "calls"),
    [
        (lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()], 1),
        (lambda: [nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)], 2),
        (lambda: [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU()], 1),
        (lambda: [nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.SiLU()], 2),
        (lambda: [nn.BatchNorm2d(3), nn.SyncBatchNorm(3), nn.ReLU()], 1),
        (lambda: [nn.BatchNorm2d(3), nn.ReLU(), nn.Identity()], 1),
    ],
)
def test_sequences(build, calls, train):
    net, stock = pair(lambda: nn.Sequential(*build()).double())
    swap(net, strict=True)
    assert fused_calls(copy.deepcopy(net), images()) == calls
    assert_same_steps(net, stock, images(), modes=(train,))


def test_fused_sequence_keeps_being_a_sequence():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    swap(net)
    net.append(nn.BatchNorm2d(4).double())
    assert len(net[:2]) == 2 and isinstance(net[0], nn.Conv2d)
    stock = nn.Sequential(*copy.deepcopy(list(net)))
    assert_same_steps(net, stock, images())


class Unchanged(vision.BasicBlock):
    """Leaves the forward alone."""


class Changed(vision.BasicBlock):
    def forward(self, x):
        return super().forward(x) + 1


def test_row42_subclasses():
    block, stock = pair(lambda: Unchanged(4, 4).double())
    assert reason(block) == "swapped"
    assert isinstance(block, Unchanged)
    assert_same_steps(block, stock, torch.randn(2, 4, 6, 6, dtype=torch.float64))
    assert reason(Changed(4, 4)) == "SUBCLASS_FORWARD"


def test_class_patched_by_another_tool_is_left_alone(monkeypatch):
    monkeypatch.setattr(vision.BasicBlock, "forward", lambda self, x: self.conv2(self.conv1(x)))
    report = swap(vision.BasicBlock(4, 4))
    assert statuses(report) == {"": "SUBCLASS_FORWARD"}
    assert "not the one that the adapter knows" in report.rows[0].message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda b: setattr(b, "bn1", nn.SyncBatchNorm(4)), "NORM_TYPE"),
        (lambda b: setattr(b, "bn2", nn.LocalResponseNorm(4)), "NORM_TYPE"),
        (lambda b: setattr(b, "bn2", nn.GroupNorm(2, 4)), "NORM_TYPE"),
        (lambda b: setattr(b, "relu", nn.ReLU6()), "ACT_TYPE"),
        (lambda b: b.bn1.register_forward_hook(lambda *a: None), "HAS_HOOKS"),
        (lambda b: b.bn2.register_forward_pre_hook(lambda *a: None), "HAS_HOOKS"),
        (lambda b: b.bn1.register_full_backward_hook(lambda *a: None), "HAS_HOOKS"),
        (lambda b: b.relu.register_full_backward_pre_hook(lambda *a: None), "HAS_HOOKS"),
        (lambda b: setattr(b.bn1, "forward", b.bn1.forward), "HAS_HOOKS"),
        (lambda b: setattr(b, "forward", b.forward), "HAS_HOOKS"),
        (lambda b: nn.utils.parametrizations.weight_norm(b.bn1, "weight", dim=None), "HAS_PARAMETRIZATION"),
        (lambda b: nn.utils.parametrizations.weight_norm(b.conv1), "swapped"),
        (lambda b: b.conv1.register_forward_hook(lambda *a: None), "swapped"),
        (lambda b: b.register_forward_hook(lambda *a: None), "swapped"),
    ],
)
def test_reason_codes(change, code):
    block = vision.BasicBlock(4, 4)
    block.relu.inplace = False  # autograd refuses backward hooks before an in-place ReLU, swapped or not
    change(block.double())
    stock = copy.deepcopy(block.double())
    report = swap(block)
    assert statuses(report) == {"": code}
    assert (report.rows[0].message == "") == (code == "swapped")
    assert_same_steps(block.eval(), stock.eval(), torch.randn(2, 4, 6, 6, dtype=torch.float64), modes=(False,))


@pytest.mark.parametrize(
    ("layers", "code"),
    [
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6()], "ACT_TYPE"),
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU()], "ACT_TYPE"),
        ([nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()], "NORM_TYPE"),
        ([nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU()], "NORM_TYPE"),
    ],
)
def test_reason_codes_of_sequences(layers, code):
    assert reason(nn.Sequential(*layers)) == code


def test_an_unknown_block_is_reported(caplog):
    with caplog.at_level(logging.WARNING, "fastres"):
        report = swap(nn.Sequential(Custom()))
    assert statuses(report) == {"0": "NOT_MATCHED"}
    assert "register_block" in report.rows[0].message
    assert "nothing to swap in Sequential" in caplog.text


def test_our_own_modules_need_no_swap(caplog):
    net = nn.Sequential(fastres.nn.ConvBNReLU(3, 4), fastres.nn.BasicBlock(4, 4))
    with caplog.at_level(logging.WARNING, "fastres"):
        assert statuses(swap(net, strict=True)) == {"0": "ALREADY", "1": "ALREADY"}
    assert not caplog.records


def test_a_second_swap_changes_nothing():
    net = tiny()
    first = swap(net, backend="reference")
    second = swap(net)
    assert set(statuses(second).values()) == {"ALREADY"}
    assert "backend 'reference'" in second.rows[0].message
    second.revert()
    assert fused_calls(net, images()) == TINY_CALLS
    first.revert()
    assert fused_calls(net, images()) == 0


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": "layer1"}, {"layer1.0", "layer1.1", "layer1.1.downsample"}),
        ({"include": "*.downsample"}, {"layer1.1.downsample", "layer2.1.downsample"}),
        ({"include": ["stem", "layer2.0"]}, {"stem", "layer2.0"}),
        ({"include": "layer*", "exclude": "layer2"}, {"layer1.0", "layer1.1", "layer1.1.downsample"}),
        (
            {"exclude": lambda name, module: isinstance(module, nn.Sequential)},
            {f"layer{i}.{j}" for i in "12" for j in "01"},
        ),
        ({"include": lambda name, module: getattr(module, "stride", 1) == 2}, {"layer1.1", "layer2.1"}),
        ({"include": "layer3"}, set()),
        ({"include": []}, set()),
    ],
)
def test_filters(options, names):
    net = tiny()
    report = swap(net, **options)
    assert {row.name for row in report.rows if row.status == "swapped"} == names
    assert {row.reason for row in report.rows if row.name not in names} <= {"FILTERED"}
    assert {name for name, module in net.named_modules() if hasattr(module, "fastres_stock")} == names


@pytest.mark.parametrize("model", [None, torch.ones(1), tiny, [nn.ReLU()]])
def test_model_must_be_a_module(model):
    for function in (swap, unswap, lambda m: swapped(m).__enter__()):
        with pytest.raises(TypeError, match="model: got .*, expected an nn.Module"):
            function(model)


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("value", [3, ["a", 3], {1: 2}])
def test_filters_must_be_globs_or_callables(option, value):
    net = tiny()
    with pytest.raises(TypeError, match=f"{option}: got"):
        swap(net, **{option: value})
    assert not hasattr(net.stem, "fastres_stock")


def test_unknown_backend_names_the_choices():
    net = tiny()
    with pytest.raises(ValueError, match=r"backend: got 'fast', expected one of \[.*'auto'.*'reference'"):
        swap(net, backend="fast")
    assert not hasattr(net.stem, "fastres_stock")


def test_backend_is_kept_by_every_block():
    net = tiny(torch.float32)
    swap(net, backend="reference")
    blocks = [m for m in net.modules() if hasattr(m, "fastres_stock")]
    assert {b.fastres_backend for b in blocks} == {"reference"} and len(blocks) == len(TINY_BLOCKS)
    assert {m.fastres_backend for m in copy.deepcopy(net).modules() if hasattr(m, "fastres_stock")} == {"reference"}


def test_dry_run_changes_nothing_and_tells_the_same():
    net, twin = pair()
    before = classes(net)
    dry = swap(net, dry_run=True)
    assert classes(net) == before and fused_calls(net, images()) == 0
    assert dry.rows == swap(twin).rows and dry.dry_run
    assert "7 of 7 blocks would be swapped" in str(dry)
    dry.revert()
    assert not dry.reverted


@pytest.mark.parametrize("build", [lambda: nn.Linear(2, 2), lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())])
def test_nothing_to_swap_warns_and_strict_raises(build, caplog):
    with caplog.at_level(logging.WARNING, "fastres"):
        report = swap(build())
    assert "nothing to swap" in caplog.text and report.rows == []
    assert "no block known" in str(report)
    with pytest.raises(ValueError, match="nothing to swap"):
        report.raise_if_none()
    with pytest.raises(ValueError, match="nothing to swap"):
        swap(build(), strict=True)


def test_strict_raises_before_anything_changes():
    block = vision.BasicBlock(4, 4, norm_layer=nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="1 NORM_TYPE"):
        swap(block, strict=True)
    assert type(block) is vision.BasicBlock
