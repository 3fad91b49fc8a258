"""freeze on networks that nobody adapted: torchvision's, timm's and Hugging Face's, through their graphs.

For each: one export and no second trace; the referee at batch 2 (the example), 1 and 3 with no second capture; outputs
of the source's structure; counts and reasons as the architecture says (`freeze_nets.py`); every convolution, BN, sum
and activation that the source calls found again in the frozen network.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

import fastres
from fastres.inference import freeze
from freeze_nets import NETS, QUICK, prepared, timm
from swap_cases import Ops

ACTS = {
    "relu": ("aten::relu", "aten::relu_"),
    "relu6": ("aten::hardtanh", "aten::hardtanh_"),
    "silu": ("aten::silu", "aten::silu_"),
    "hardswish": ("aten::hardswish", "aten::hardswish_"),
}
LANES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in NETS]


def images(size, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("name", LANES)
def test_network(name, monkeypatch):
    zoo, net = NETS[name], prepared(NETS[name])
    before = copy.deepcopy(net.state_dict())
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    frozen = freeze(net, images(zoo.size), tune=False)
    report = frozen.report
    assert (report.capture, report.capture_reason) == ("graph", "")
    assert report.verification, report
    assert {kind: n for kind, n in report.counts.items() if n} == zoo.counts, report
    assert Counter(f"{row.kind} {row.reason}" for row in report.rows if row.reason) == zoo.reasons, report
    assert all(row.message for row in report.rows if row.reason)
    assert sum("scale" in row.took for row in report.rows) == zoo.scales
    assert_nothing_is_lost(net, frozen, images(zoo.size))
    monkeypatch.setattr("fastres.inference.network.capture_for", None)  # one capture serves every batch size
    for batch in (1, 3):
        x = images(zoo.size, batch)
        verdict = fastres.verify(net, frozen, x, training=False, backward=False)
        assert verdict, f"batch {batch}: {verdict}"
        assert_same_structure(frozen(x), net(x))
    after = net.state_dict()
    assert all(torch.equal(after[key], t) for key, t in before.items()) and after.keys() == before.keys()


class Tensors(Ops):
    """Counts operators on tensors: x + 0 is none, nor is x + eps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::add", "aten::add_") and not isinstance(args[1], torch.Tensor):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def assert_nothing_is_lost(net, frozen, x):
    """What the source calls, against what the frozen network's rows took in and what its graph still calls."""
    ran = {}
    hooks = [
        module.register_forward_hook(lambda m, *_, name=name: ran.update({name: m}))
        for name, module in net.named_modules()
        if "BatchNorm" in type(module).__name__
    ]
    with Tensors() as ops, torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    rows, left = frozen.report.rows, still_called(frozen)
    found = {row.name for row in rows if row.kind == "norm"}
    for row in rows:
        if row.kind == "conv" and " folded" in row.message:
            found |= set(row.message.partition(" folded")[0].split(", "))
    assert ran.keys() <= found and left["batch_norm"] == 0
    assert frozen.report.counts["convs"] == ops["aten::convolution"]
    affine = sum("Frozen" in type(norm).__name__ for norm in ran.values())  # a sum each: with the shift
    sums = sum("add" in row.took for row in rows) + left["add"]
    assert sums == ops["aten::add"] + ops["aten::add_"] - affine
    for act, theirs in ACTS.items():
        ours = sum(row.took[-1:] == (act,) for row in rows) + left[theirs[0].removeprefix("aten::")]
        assert ours == sum(ops[name] for name in theirs), act


def still_called(frozen):
    """The operators that are steps of their own, by name."""
    return Counter(
        step.operator._schema.name.removeprefix("aten::")
        for step in frozen.graph.steps
        if isinstance(step.operator, torch._ops.OpOverload)
    )


def assert_same_structure(got, want):
    assert type(got) is type(want)
    assert tree_flatten(got)[1] == tree_flatten(want)[1]
    described = [tree_map(lambda t: (t.shape, t.dtype), out) for out in (got, want)]
    assert tree_flatten(described[0])[0] == tree_flatten(described[1])[0]


def test_resnet50_convolution_by_convolution():
    """What the paper draws: every third convolution of a block takes the shortcut, projections end without a ReLU."""
    net = prepared(NETS["resnet50"])
    report = freeze(net, images(32), tune=False).report
    became = {row.name: row.became for row in report.rows if row.kind == "conv"}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            tail = "conv + bias" + " + relu" * ("downsample" not in name) + " + max_pool" * (name == "conv1")
            assert became[name] == ("conv + bias + add + relu" if name.endswith("conv3") else tail), name
    assert Counter(became.values()) == {
        "conv + bias + relu": 32,
        "conv + bias + relu + max_pool": 1,
        "conv + bias + add + relu": 16,
        "conv + bias": 4,
    }
    assert [row.name for row in report.rows if row.kind == "pool_linear"] == ["fc"]
    assert "53 of 53 convolutions took their BN in, 16 a residual" in str(report)


def test_feature_maps_stay_what_they_are():
    """A block's output that is an output too: the block behind it does not write over it, nor does a later call."""
    net = prepared(timm("resnet10t", options={"features_only": True}))
    frozen, x = freeze(net, images(64), tune=False), images(64, 3)
    maps = frozen(x)
    kept = [t.clone() for t in maps]
    frozen(images(64, 1)), frozen(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, kept, strict=True))
    with torch.no_grad():
        for ours, theirs in zip(maps, net(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
