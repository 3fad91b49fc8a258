"""Networks frozen by default, by PyTorch's profiler: one fused call for each convolution, nothing left of the rest."""

import pytest
import torch
import torch.nn.functional as F

import fastres
from freeze_cases import compare, images, operators, written_over
from freeze_nets import NETS, prepared

CONVOLUTIONS = [f"mkldnn::_convolution_pointwise{end}" for end in ("", "_")]
CONVOLUTIONS += [
    f"fastres::_conv_{kind}{into}_native" for kind in ("winograd", "1x1", "direct") for into in ("", "_into")
]
GONE = ("aten::batch_norm", "aten::native_batch_norm", "aten::add", "aten::add_", "aten::relu", "aten::relu_")
GONE += ("aten::max_pool2d_with_indices",)  # the stem's
NETWORKS = [("resnet18", 20, 8), ("resnet50", 53, 16)]


def fused(seen):
    return sum(seen.get(name, 0) for name in CONVOLUTIONS)


pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize(("name", "convs", "residuals"), NETWORKS)
def test_one_fused_call_for_each_convolution(name, convs, residuals):
    net = prepared(NETS[name])
    frozen = fastres.freeze(net, images(2, 64), tune=False, verify=False)
    for batch in (1, 8):
        x = images(batch, 64)
        compare(net, frozen, x, tol=1e-3)
        seen = operators(frozen, x)
        assert fused(seen) == convs
        assert written_over(frozen, x) == residuals, "a residual that nobody reads later is written over"
        assert [gone for gone in GONE if gone in seen] == []
        assert seen["aten::addmm"] == 1
        assert not any("conv" in event and event.startswith(("aten::", "fastres::conv")) for event in seen)


def test_the_tuned_network_runs_on_packed_weights():
    frozen = fastres.freeze(prepared(NETS["resnet18"]), images(2, 64), verify=False)
    assert 1 <= frozen.report.packed <= 20 - sum(frozen.report.winograd.values())
    seen = operators(frozen, images(2, 64))
    assert fused(seen) == 20
    assert "mkldnn::_reorder_convolution_weight" not in seen, "packed once, not in every call"


def test_bfloat16():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no native bfloat16")
    net, x = prepared(NETS["resnet18"]), images(2, 64)
    frozen = fastres.freeze(net, x, dtype=torch.bfloat16, tune=False)
    assert frozen.report.verification
    frozen(x)
    seen = operators(frozen, x)
    assert fused(seen) == 20
    with torch.no_grad():
        assert F.cosine_similarity(frozen(x).float(), net(x), dim=1).min() > 0.99
