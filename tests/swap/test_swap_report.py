"""SwapReport: as text and data, undoing; and register_block."""

import copy
import gc
import json
import logging
import pickle
import weakref

import pytest
import torch
from torch import nn

import fastres
from fastres.swap import BlockAdapter, SwapReport, register_block, swap, swapped, unswap
from swap_cases import TINY_CALLS, Custom, assert_same_steps, fused_calls, images, pair, statuses, tiny, torchvision

vision = torchvision.models.resnet


def classes(model):
    return [(name, type(module)) for name, module in model.named_modules()]


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report_as_text_and_as_data(caplog):
    net = tiny()
    net.layer2[0].bn3.register_forward_hook(lambda *a: None)
    with caplog.at_level(logging.INFO, "fastres"):
        report = swap(net, exclude="stem")
    text = str(report).splitlines()
    assert text[0] == "Sequential: 5 of 7 blocks swapped; 1 FILTERED, 1 HAS_HOOKS"
    assert text[1].split() == ["block", "pattern", "status", "reason", "message"]
    assert any(line.split()[:4] == ["layer2.0", "bottleneck", "skipped", "HAS_HOOKS"] for line in text)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["swapped"] == 5 and data["backend"] == "auto" and not data["dry_run"]
    assert data["rows"][0] == {
        "name": "stem",
        "pattern": "sequence",
        "status": "skipped",
        "reason": "FILTERED",
        "message": "by include or exclude",
        "error_ratio": None,
    }
    assert report.raise_if_none() is report
    assert sum(record.levelno == logging.INFO for record in caplog.records) == 7


def test_row37_report_as_an_attribute_of_the_model_copies_and_pickles():
    net = tiny()
    net.report = swap(net)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.report.rows == net.report.rows
        twin.report.revert()
        assert fused_calls(twin, images()) == TINY_CALLS
    net.report.revert()
    assert fused_calls(net, images()) == 0


def test_names_are_importable_beside_the_function():
    import importlib

    assert fastres.swap is swap and fastres.swapped is swapped and fastres.register_block is register_block
    assert importlib.import_module("fastres.swap.report").SwapReport is SwapReport


# ---- undoing ---------------------------------------------------------------------------------------------------------


def test_revert_gives_back_the_same_objects():
    net, stock = pair()
    before, objects, attributes = classes(net), list(net.modules()), [dict(m.__dict__) for m in net.modules()]
    report = swap(net, backend="reference")
    assert classes(net) != before
    report.revert()
    assert classes(net) == before and report.reverted and "since reverted" in report.summary()
    assert all(a is b for a, b in zip(objects, net.modules(), strict=True))
    assert [list(m.__dict__) for m in net.modules()] == [list(d) for d in attributes]
    assert_same_steps(net, stock, images(), tolerance=0)
    report.revert()
    assert classes(net) == before


def test_revert_after_blocks_were_replaced_or_deleted():
    net = tiny()
    report = swap(net)
    old, fresh = net.layer1[0], vision.BasicBlock(8, 8).double()
    net.layer1[0] = fresh
    gone = weakref.ref(net.layer2[0])
    del net.layer2[0]
    gc.collect()
    assert gone() is None, "the report keeps blocks alive"
    report.revert()
    assert type(old) is vision.BasicBlock and type(fresh) is vision.BasicBlock
    assert not any(hasattr(m, "fastres_stock") for m in net.modules())


def test_revert_leaves_a_class_that_another_tool_made(caplog):
    net = tiny()
    report = swap(net)
    block = net.layer1[0]
    block.__class__ = type("Wrapped", (type(block),), {})
    with caplog.at_level(logging.WARNING, "fastres"):
        report.revert()
    assert type(block).__name__ == "Wrapped" and "layer1.0 is a Wrapped now" in caplog.text
    assert type(net.layer1[1]) is vision.BasicBlock


def test_swapped_reverts_after_an_exception():
    net = tiny()
    before = classes(net)
    with swapped(net) as report:
        assert len(report.swapped) == 7 and fused_calls(net, images()) == TINY_CALLS
    assert classes(net) == before
    with pytest.raises(KeyError, match="inside"), swapped(net, include="stem"):
        assert fused_calls(net, images()) == 1
        raise KeyError("inside")
    assert classes(net) == before


def test_swapped_inside_a_swap_leaves_the_outer_one():
    net = tiny()
    swap(net, include="layer1")
    with swapped(net):
        assert fused_calls(net, images()) == TINY_CALLS
    assert {n for n, m in net.named_modules() if hasattr(m, "fastres_stock")} == {
        *("layer1.0", "layer1.1", "layer1.1.downsample")
    }


def test_unswap_needs_no_report():
    net = tiny()
    before = classes(net)
    swap(net, backend="reference")
    twin = copy.deepcopy(net)
    assert unswap(twin) == 7 and classes(twin) == before and unswap(twin) == 0
    assert fused_calls(net, images()) == TINY_CALLS


# ---- register_block --------------------------------------------------------------------------------------------------


def fused_custom(block, x, scale=1.0):
    return fastres.nn.norm_act(block.conv(x) * scale, block.norm, block.act, x, block.fastres_backend)


class Registered(Custom):
    def forward(self, x, scale=1.0):
        return super().forward(x, scale)


def test_register_block():
    net, stock = pair(lambda: nn.Sequential(Registered(), Registered()).double())
    assert set(statuses(swap(net, dry_run=True)).values()) == {"NOT_MATCHED"}
    register_block(Registered, BlockAdapter(fused_custom, norms=("norm",), acts=("act",)))
    report = swap(net)
    assert statuses(report) == {"0": "swapped", "1": "swapped"} and report.rows[0].pattern == "Registered"
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert fused_calls(copy.deepcopy(net), x) == 2
    assert_same_steps(net, stock, x)
    torch.testing.assert_close(net.eval()[0](x, scale=2.0), stock.eval()[0](x, scale=2.0))
    register_block(Registered, BlockAdapter(lambda b, x, scale=1.0: x, pattern="again"))  # the swapped blocks follow
    torch.testing.assert_close(net[0](x), stock[0](x))
    swap(nn.Sequential(Registered()))
    torch.testing.assert_close(net[0](x), x)
    register_block(Registered, BlockAdapter(fused_custom, norms=("norm",), acts=("act",)))


@pytest.mark.parametrize(
    ("cls", "adapter", "error", "message"),
    [
        (tiny, BlockAdapter(fused_custom), TypeError, "cls: got"),
        (Custom(), BlockAdapter(fused_custom), TypeError, "cls: got"),
        (Custom, fused_custom, TypeError, "adapter: got function"),
        (Custom, BlockAdapter(fused_custom, method="forwards"), ValueError, "adapter.method: got 'forwards'"),
    ],
)
def test_register_block_refuses(cls, adapter, error, message):
    with pytest.raises(error, match=message):
        register_block(cls, adapter)


def test_missing_children_are_a_refusal():
    class Empty(nn.Module):
        def forward(self, x):
            return x

    register_block(Empty, BlockAdapter(fused_custom, norms=("norm",)))
    assert statuses(swap(Empty())) == {"": "SUBCLASS_FORWARD"}
