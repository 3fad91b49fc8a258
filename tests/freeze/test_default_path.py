"""Networks frozen by default, seen by the profiler: one fused call for each convolution, nothing left of the rest."""

from collections import Counter

import pytest
import torch
import torchvision
from torch.profiler import ProfilerActivity, profile

import fastres

FUSED = ("mkldnn::_convolution_pointwise", "mkldnn::_convolution_pointwise_")
GONE = ("aten::batch_norm", "aten::native_batch_norm", "aten::add", "aten::add_", "aten::relu", "aten::relu_")
NETWORKS = [("resnet18", 20, 8), ("resnet50", 53, 16)]

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def calls(frozen, x):
    """How often each operator is called at the top level by a call of the frozen network."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        frozen(x)
    return Counter(event.name for event in seen.events())


@pytest.mark.parametrize(("name", "convs", "residuals"), NETWORKS)
@pytest.mark.parametrize("batch", [1, 8])
def test_one_fused_call_for_each_convolution(name, convs, residuals, batch):
    x = torch.randn(2, 3, 64, 64)
    frozen = fastres.freeze(getattr(torchvision.models, name)().eval(), x, tune=False, verify=False)
    x = torch.randn(batch, 3, 64, 64)
    frozen(x), frozen(x)
    seen = calls(frozen, x)
    assert seen[FUSED[0]] + seen[FUSED[1]] == convs
    assert seen[FUSED[1]] == residuals, "a residual that nobody reads later is written over"
    assert [gone for gone in GONE if seen[gone]] == []
    assert seen["aten::addmm"] == 1 and seen["aten::max_pool2d_with_indices"] == 1
    assert sum(count for event, count in seen.items() if "conv" in event and event.startswith("aten::")) == 0


@pytest.mark.parametrize(("name", "convs", "residuals"), NETWORKS[:1])
def test_the_tuned_network_runs_on_packed_weights(name, convs, residuals):
    x = torch.randn(2, 3, 64, 64)
    frozen = fastres.freeze(getattr(torchvision.models, name)().eval(), x, verify=False)
    assert 1 <= frozen.report.packed <= convs
    seen = calls(frozen, x)
    assert seen[FUSED[0]] + seen[FUSED[1]] == convs
    assert seen["mkldnn::_reorder_convolution_weight"] == 0, "packed once, not in every call"
