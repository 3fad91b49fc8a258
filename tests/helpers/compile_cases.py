"""What the tests of `torch.compile(model, backend="fastres")` share: a compiler that counts operators, small networks.

`aot_eager` stands in for Inductor where only the graph matters: it runs every operator as it is, and compiles no C++.
"""

from collections import Counter

import torch
from torch import nn
from torch._dynamo import register_backend
from torch.nn import functional as F

from swap_cases import scramble

seen = []  # the graphs that the compiler behind the backend was given, as counts of their operators
COUNTING = {"inner": "fastres_test"}
CONV = "fastres.conv_act.default"
images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@register_backend(name="fastres_test")
def _compiler(module, inputs):
    seen.append(Counter(str(n.target) for n in module.graph.nodes if n.op == "call_function"))
    return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


class Net(nn.Module):
    """Two convolutions, a residual and a head; or another forward, given as a function."""

    def __init__(self, forward=None):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.function = forward

    def forward(self, x):
        if self.function is not None:
            return self.function(self, x)
        y = F.relu(self.bn(self.conv(x)))
        y = F.relu(self.bn2(self.conv2(y)) + y)
        return self.fc(y.mean((2, 3)))


def first(self, x):
    return F.relu(self.bn(self.conv(x)))


def net(forward=None):
    """A Net in eval mode whose batch norms do something."""
    return scramble(Net(forward)).eval()


class Block(nn.Module):
    def __init__(self, c, k, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, 1, 1, bias=False), nn.BatchNorm2d(k)
        self.relu, self.shortcut = nn.ReLU(inplace=True), nn.Identity()
        if c != k:
            self.shortcut = nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


def resnet18():
    """A narrow ResNet-18: 20 convolutions, 8 residual sums."""
    widths = [(8, 8), (8, 8), (8, 16), (16, 16), (16, 24), (24, 24), (24, 32), (32, 32)]
    stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    blocks = [Block(c, k, 1 + (c != k)) for c, k in widths]
    return scramble(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))).eval()


def compiled(model, options=COUNTING, **settings):
    return torch.compile(model, backend="fastres", options=options, **settings)


def close(got, want, tolerance=1e-5):
    got, want = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (got, want))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def agree(model, x, options=COUNTING, tolerance=1e-5, **settings):
    """Compiles, compares twice with eager without gradients, and returns what was compiled."""
    fast = compiled(model, options, **settings)
    with torch.no_grad():
        for _ in range(2):
            close(fast(x.clone()), model(x.clone()), tolerance)
    return fast
