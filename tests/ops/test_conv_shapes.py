"""The referee at every convolution without groups of ResNet, ResNeXt, VGG and DenseNet, by every way that there is."""

import pytest
import torch
import torchvision
from torch import nn

import fastres
from fastres._extension import native_cpu

pytestmark = [pytest.mark.full, pytest.mark.skipif(native_cpu() is None, reason="the C++ extension is not built")]
NETWORKS = ("resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "vgg16", "densenet121")


def convolutions(name):
    """(C, K, image's side, kernel, stride, padding) of each, alike ones once."""
    found = {}

    def note(conv, given, _):
        size = conv.in_channels, conv.out_channels, given[0].shape[-1]
        found[(*size, conv.kernel_size, conv.stride, conv.padding)] = conv.groups

    with torch.device("meta"):
        net = getattr(torchvision.models, name)().eval()
        for conv in (module for module in net.modules() if isinstance(module, nn.Conv2d)):
            conv.register_forward_hook(note)
        net(torch.empty(1, 3, 224, 224))
    return [conv for conv, groups in found.items() if groups == 1]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_of_our_own_at_every_shape(name):
    failed, seen = [], set()
    for c, k, size, *where in convolutions(name):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(c, k, *where), nn.ReLU()).eval()
        x = torch.randn(1, c, size, size)
        frozen = fastres.freeze(net, x, tune=False, verify=False)
        executor, *given = frozen.prepared(x)
        ((choices, _),) = executor.find_choices(*given)
        frozen.plan.winograd = 4
        onednn = (
            2.0  # the referee's bound, or what oneDNN itself reaches: eager sums 2048 channels more exactly than it
        )
        for way in ("packed", *(way for way in choices.ways if way not in ("packed", "plain"))):
            frozen.choose({choices.key: way})
            verdict = fastres.verify(net, frozen, x, backward=False)
            frozen(x)
            assert executor.ways(given[0]) == {0: way}
            seen.add(way)
            onednn = max(onednn, verdict.error_ratio) if way == "packed" else onednn
            # a layer by itself: F(4x4) has up to 2.2 times the error, and the referee judges it in the whole network
            if verdict.error_ratio > (1.25 if way == "winograd4" else 1) * onednn:
                failed.append(f"{choices.key} by {way}: {verdict}")
    assert not failed, "\n".join(failed)
    assert {"packed", "direct"} <= seen or {"packed", "winograd2", "winograd4"} <= seen
