"""What the swap tests share: small networks, what operators a call runs, equality of two models' steps."""

import copy
from collections import Counter
from collections import OrderedDict as Named

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nets import randomize_bn as scramble
from nets import transformers_module

torchvision = pytest.importorskip("torchvision")

from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402
from torchvision.ops import Conv2dNormActivation  # noqa: E402


def projection(inplanes, planes, stride):
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def tiny(dtype=torch.float64):
    """A ResNet of 8 and 16 channels: a stem, two basic blocks, two bottlenecks, of torchvision's classes alone.

    fp64 runs through the reference, so that what is compared is the wiring, to 1e-10.
    """
    torch.manual_seed(1)
    net = nn.Sequential(
        Named(
            stem=Conv2dNormActivation(3, 8),
            layer1=nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, 2, projection(8, 16, 2))),
            layer2=nn.Sequential(Bottleneck(16, 4), Bottleneck(16, 8, 2, projection(16, 32, 2))),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(32, 5),
        )
    )
    return scramble(net).to(dtype)


TINY_BLOCKS = ("stem", "layer1.0", "layer1.1", "layer1.1.downsample", "layer2.0", "layer2.1", "layer2.1.downsample")
TINY_CALLS = 1 + 2 * 2 + 1 + 3 * 2 + 1  # BN layers, each one operator


def images(n=4, size=16, dtype=torch.float64):
    return torch.randn(n, 3, size, size, dtype=dtype)


class Ops(TorchDispatchMode):
    """Counts operators by name: `with Ops() as ops: net(x)`, then `ops["fastres::bn_act"]`."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().rpartition(".")[0] if func.name().count(".") else func.name()] += 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, name):
        return self.counts[name]


def fused_calls(function, *args):
    """How many bn_act calls `function(*args)` makes."""
    with Ops() as ops:
        function(*args)
    return ops["fastres::bn_act"]


def step(net, *inputs, train=True):
    """Output, gradients of the inputs and parameters, and state of one forward and backward; `net` moves."""
    net.train(train)
    net.zero_grad()
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = net(*leaves)
    y = getattr(y, "logits", y)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    results = {"y": y.detach()}
    results |= {f"dx{i}": x.grad for i, x in enumerate(leaves)}
    results |= {f"grad {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    results |= {f"state {name}": t.detach().clone() for name, t in net.state_dict().items()}
    return results


def assert_same(got, wanted, tolerance=1e-10):
    """Relative to each tensor's largest value; integers exactly; the same keys in the same order."""
    assert list(got) == list(wanted)
    for name, t in wanted.items():
        assert got[name].dtype == t.dtype and got[name].shape == t.shape, name
        assert torch.isfinite(t.double()).all(), name
        scale = 1.0 if not t.numel() else max(t.double().abs().max().item(), 1e-3)
        torch.testing.assert_close(
            got[name].double(), t.double(), rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_steps(net, stock, *inputs, modes=(True, False), tolerance=1e-10):
    """Training and eval steps of `net` and of `stock` agree, statistics included."""
    for train in modes:
        assert_same(step(net, *inputs, train=train), step(stock, *inputs, train=train), tolerance)


def hugging_face_resnet():
    """transformers' ResNet module."""
    return transformers_module("transformers.models.resnet.modeling_resnet")


def pair(build=tiny):
    """(a model to swap, an untouched copy)."""
    net = build()
    return net, copy.deepcopy(net)


def statuses(report):
    """Each block's reason, or its status where there is none."""
    return {row.name: row.reason or row.status for row in report.rows}


class Custom(nn.Module):
    """relu(norm(conv(x)) + x), a class that nobody registered."""

    def __init__(self, c=4):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()

    def forward(self, x, scale=1.0):
        return self.act(self.norm(self.conv(x) * scale) + x)
