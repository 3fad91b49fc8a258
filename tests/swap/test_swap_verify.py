"""swap(..., verify=example): planted faults are rolled back, sound blocks pass, and the model is left as it was."""

import copy

import pytest
import torch
from torch import nn

import fastres
from fastres.swap import BlockAdapter, register_block, swap
from swap_cases import TINY_BLOCKS, assert_same, fused_calls, images, pair, tiny, torchvision

vision = torchvision.models.resnet


class Block(nn.Module):
    """relu(norm(conv(x)) + x)."""

    def __init__(self, c=3):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + x)


def faulty(fault):
    def forward(block, x):
        y, bn = block.conv(x), block.norm
        if fault == "residual dropped":
            return fastres.nn.norm_act(y, bn, block.act)
        if fault == "residual and input swapped":
            return fastres.nn.norm_act(x, bn, block.act, y)
        if fault == "relu before the residual":
            return fastres.nn.norm_act(y, bn, block.act) + x
        if fault == "eps omitted":
            eps, bn.eps = bn.eps, 0.0
            try:
                return fastres.nn.norm_act(y, bn, block.act, x)
            finally:
                bn.eps = eps
        if fault == "statistics not updated":
            with torch.no_grad():
                saved = copy.deepcopy(bn.state_dict())
            y = fastres.nn.norm_act(y, bn, block.act, x)
            with torch.no_grad():
                for name, t in bn.named_buffers():
                    t.copy_(saved[name])
            return y
        if fault == "gradient of the residual lost":
            return fastres.nn.norm_act(y, bn, block.act, x.detach())
        if fault == "raises":
            raise IndexError("planted")
        return fastres.nn.norm_act(y, bn, block.act, x)

    return forward


FAULTS = [
    "residual dropped",
    "residual and input swapped",
    "relu before the residual",
    "eps omitted",
    "statistics not updated",
    "gradient of the residual lost",
    "raises",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_rolled_back(fault, caplog):
    cls = type("Planted", (Block,), {"forward": lambda self, x: Block.forward(self, x)})
    register_block(cls, BlockAdapter(faulty(fault), norms=("norm",), acts=("act",), pattern="planted"))
    net = nn.Sequential(vision.BasicBlock(3, 3), cls(), vision.BasicBlock(3, 3))
    report = swap(net, verify=torch.randn(4, 3, 8, 8))
    rows = {row.name: row for row in report.rows}
    assert (rows["1"].status, rows["1"].reason) == ("rolled_back", "NUMERICS")
    assert rows["1"].error_ratio > 2 and rows["1"].message.startswith(("eval mode", "training mode"))
    assert type(net[1]) is cls and "rolled_back NUMERICS" in caplog.text
    for name in "02":
        assert (
            rows[name].status == "swapped" and rows[name].error_ratio <= 2 and hasattr(net[int(name)], "fastres_stock")
        )
    assert "NUMERICS" in str(report) and report.to_dict()["rows"][1]["status"] == "rolled_back"


def test_sound_blocks_pass_and_the_ratio_is_reported():
    net = tiny(torch.float32)
    report = swap(net, verify=images(dtype=torch.float32))
    assert {row.name: row.status for row in report.rows} == dict.fromkeys(TINY_BLOCKS, "swapped")
    assert all(0 <= row.error_ratio <= 2 for row in report.rows)
    assert "error ratio" in str(report)


def test_stem_is_measured_apart():
    net = vision.ResNet(vision.BasicBlock, [1, 1, 1, 1], num_classes=3)
    report = swap(net, include=lambda name, module: name == "", verify=torch.randn(2, 3, 64, 64))
    assert (report.rows[0].pattern, report.rows[0].status) == ("stem", "swapped")
    assert report.rows[0].error_ratio is not None


def test_nothing_of_the_model_moves():
    net, twin = pair(lambda: tiny(torch.float32))
    net.layer1.eval()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in net.parameters()]
    flags = [m.training for m in net.modules()]
    x = images(dtype=torch.float32)
    random_state = torch.get_rng_state()
    swap(net, verify=x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in net.modules()] == flags
    assert all(p.grad is g and (g == 1).all() for p, g in zip(net.parameters(), grads, strict=True))
    assert_same(net.state_dict(), twin.state_dict(), 0)


def test_dry_run_with_verify_tells_the_same_and_changes_nothing():
    cls = type("Planted", (Block,), {"forward": lambda self, x: Block.forward(self, x)})
    register_block(cls, BlockAdapter(faulty("residual dropped"), norms=("norm",), acts=("act",)))
    net, twin = pair(lambda: nn.Sequential(vision.BasicBlock(3, 3), cls()))
    x = torch.randn(4, 3, 8, 8)
    dry = swap(net, verify=x, dry_run=True)
    assert not any(hasattr(m, "fastres_stock") for m in net.modules())
    assert [(r.status, r.reason) for r in dry.rows] == [("swapped", None), ("rolled_back", "NUMERICS")]
    assert dry.rows == swap(twin, verify=x).rows


def test_everything_rolled_back_counts_as_nothing_swapped():
    cls = type("Planted", (Block,), {"forward": lambda self, x: Block.forward(self, x)})
    register_block(cls, BlockAdapter(faulty("residual dropped"), norms=("norm",), acts=("act",)))
    net = cls()
    with pytest.raises(ValueError, match="1 NUMERICS"):
        swap(net, verify=torch.randn(4, 3, 8, 8), strict=True)
    assert type(net) is cls


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = vision.BasicBlock(3, 3)
        self.unused = vision.BasicBlock(3, 3)

    def forward(self, image, scale):
        return self.block(image * scale)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_examples_as_tuple_or_dict(kind):
    x = torch.randn(4, 3, 8, 8)
    example = (x, 2.0) if kind == "tuple" else {"image": x, "scale": 2.0}
    report = swap(TwoInputs(), verify=example)
    ratios = {row.name: row.error_ratio for row in report.rows}
    assert ratios["block"] is not None and ratios["unused"] is None  # the example never reaches it


@pytest.mark.parametrize("example", [torch.randn(4, 2, 8, 8), (), torch.randn(1, 3, 1, 1)])
def test_an_example_that_does_not_run_is_refused_before_anything_changes(example):
    net = nn.Sequential(vision.BasicBlock(3, 3))
    with pytest.raises(ValueError, match="verify: the example does not run through the model in (eval|training) mode"):
        swap(net, verify=example)
    assert type(net[0]) is vision.BasicBlock


def test_a_model_that_cannot_be_copied_is_refused():
    net = nn.Sequential(vision.BasicBlock(3, 3))
    net.lock = __import__("threading").Lock()
    with pytest.raises(TypeError, match="verify: Sequential cannot be deep-copied"):
        swap(net, verify=torch.randn(4, 3, 8, 8))
    assert len(swap(net).swapped) == 1


def test_verify_with_a_backend_by_name():
    net = nn.Sequential(vision.BasicBlock(3, 3))
    report = swap(net, backend="reference", verify=torch.randn(4, 3, 8, 8))
    assert report.rows[0].status == "swapped" and fused_calls(net, torch.randn(4, 3, 8, 8)) == 2


def test_a_wrong_pass_over_the_convolution_is_rolled_back(monkeypatch):
    """Inference is a path of its own, judged too: gradients or training would not show it. Hence the planted fault."""
    from fastres.nn import conv_steps

    real = conv_steps.bn_act_over

    def wrong(z, *args, **kwargs):
        y = real(z, *args, **kwargs)
        return y if y is None else y.mul_(1.001)

    monkeypatch.setattr(conv_steps, "bn_act_over", wrong)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    if fastres.explain("bn_act", torch.zeros(1)).chosen != "cpu":
        pytest.skip("without fastres._C nothing is written over")
    report = fastres.swap(net, verify=torch.randn(2, 3, 8, 8))
    assert [row.status for row in report.rows] == ["rolled_back"] and "inference" in report.rows[0].message
