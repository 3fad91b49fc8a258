"""Large batches in parts, and only those of networks that answer each image by itself (row 1)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastres.inference import tune
from fastres.inference.parts import _mixes, answers_each_alone
from freeze_cases import Net, cifar, compare, freeze, images

MIX = {
    "centered": lambda net, x: (lambda y: y + (y - y.mean(0, keepdim=True)))(net.conv(x)),
    "a little": lambda net, x: (lambda y: y + 0.02 * y.mean(0))(net.conv(x)),
    "batch norm of the batch": lambda net, x: F.batch_norm(net.conv(x), None, None, training=True),
    "sorted": lambda net, x: net.conv(x).sort(0).values,
    "flipped": lambda net, x: net.conv(x).flip(0),
    "rolled": lambda net, x: net.conv(x).roll(1, 0),
    "indexed": lambda net, x: net.conv(x)[torch.arange(len(x) - 1, -1, -1)],
    "softmax": lambda net, x: net.conv(x).softmax(0),
    "running sum": lambda net, x: net.conv(x).cumsum(0),
    "shuffled": lambda net, x: net.conv(x).view(2, -1, 4, 8, 8).transpose(0, 1).reshape(-1, 4, 8, 8),
    "attention": lambda net, x: (lambda q: (q @ q.t()).softmax(-1) @ q)(net.conv(x).flatten(1)),
    "norm": lambda net, x: net.conv(x) / (1 + net.conv(x).norm()),
    "brightest": lambda net, x: net.conv(x) * (net.conv(x).amax() > 1e3),
    "joined": lambda net, x: torch.cat([net.conv(x), x.mean(0, keepdim=True).expand(len(x), 3, 8, 8)], 1),
    "distances": lambda net, x: torch.einsum("nchw,mchw->nm", x, x),
    "next image": lambda net, x: net.conv(x) + net.conv(torch.cat([x[1:], x[:1]])),
    "group of images": lambda net, x: F.group_norm(net.conv(x).flatten(0, 1)[None], 4)[0].view(len(x), 4, 8, 8),
    "number of images": lambda net, x: net.conv(x) / x.shape[0],
    "numbers of images": lambda net, x: net.conv(x).flip(1) * torch.arange(x.shape[0]).sum(),
    "vector norm": lambda net, x: (lambda y: y.unsqueeze(1).expand(-1, 16, -1).norm(2, 0))(
        net.fc(net.conv(x).mean((2, 3)))
    ),
    "count": lambda net, x: net.conv(x) * (x > 0).sum(),
}
ALONE = {
    "head": lambda net, x: net.fc(F.relu(net.first(x)).mean((2, 3))),
    "residual": lambda net, x: F.relu(net.second(F.relu(net.first(x))) + net.first(x)),
    "rolled pixels": lambda net, x: net.conv(x).roll(1, 1),
    "gates": lambda net, x: net.first(x) * F.adaptive_avg_pool2d(net.first(x), 1).sigmoid(),
    "joined": lambda net, x: torch.cat([net.first(x), x], 1).chunk(7, 1)[0],
    "attention": lambda net, x: (lambda q: (q @ q.transpose(1, 2)).softmax(-1) @ q)(net.conv(x).flatten(2)),
    "resized": lambda net, x: F.interpolate(net.first(x), scale_factor=2.0, mode="bilinear"),
    "layer norm": lambda net, x: F.layer_norm(net.first(x), (4, 8, 8)),
}


@pytest.mark.parametrize("example", ["zeros", "alike", "noise"])
@pytest.mark.parametrize("case", MIX)
def test_row1_a_network_that_mixes_images_never_runs_in_parts(case, example, monkeypatch):
    """Whatever the example is: the parts would be faster, and agree on it."""
    monkeypatch.setattr(tune, "prefer", lambda times, default, margin=0: list(times)[-1] if "8" in times else default)
    x = {"zeros": torch.zeros(16, 3, 8, 8), "alike": images(1).repeat(16, 1, 1, 1), "noise": images(16)}[example]
    net = Net(MIX[case])
    frozen = freeze(net, x, tune=True, verify=False)
    assert frozen.plan.images_at_a_time is None
    compare(net, frozen, images(32))


@pytest.mark.parametrize("case", [*ALONE, "cifar"])
def test_row1_one_that_does_not_may(case, monkeypatch):
    monkeypatch.setattr(tune, "prefer", lambda times, default, margin=0: list(times)[-1] if "8" in times else default)
    net = cifar() if case == "cifar" else Net(ALONE[case])
    frozen = freeze(net, images(16), tune=True, verify=False)
    assert frozen.plan.images_at_a_time == 4
    compare(net, frozen, images(17))


def test_row1_the_graph_decides_where_it_can():
    for net, verdict in (
        (cifar(), False),
        (Net(MIX["a little"]), True),
        (Net(MIX["brightest"]), True),  # which no noise shows
        (Net(MIX["rolled"]), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()).eval(), True),
    ):
        x = images(16)
        frozen = freeze(net, x, tune=False, verify=False)
        executor, (x,), constants = frozen.prepared(x)
        assert _mixes(executor.graph, x, constants) is verdict or (
            verdict is True and not answers_each_alone(frozen, x)
        )
