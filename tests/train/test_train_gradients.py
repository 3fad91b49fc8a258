"""Every parameter's gradient in whole swapped networks, as a vector, against float64: relative L2 error and cosine.

    e(g) = |g - exact| / |exact|        allowed for ours: 2 e(eager) + floor

The floor is measured, as fastres/verify/floor.py does: how far the exact gradient itself goes when every parameter and
pixel is multiplied by 1 + 4 eps U(-1, 1), eps that of float32. Nothing below that is anybody's error.

Rounding decides the gate of a ReLU whose input is within rounding of 0, and one gate that goes the other way is a whole
summand in a gradient: both results are right and neither is near the other. So networks are run in two settings.

"stable": the BN biases are +4 and -4 by turns (BN's output has a deviation of about 1 around them), which leaves next
to no values near 0, so that every run has the same gates. Half of the channels pass and half do not, but for their
tails. Errors are then those of arithmetic alone, and a wrong term of any size shows.

"plain": biases within 0.5 of 0, as networks in use have them. Gates differ, in ours, in eager's and in the floor alike;
the same bound holds, a weaker one.

Measured, float32, 4 x 3 x 64 x 64, one core of an AMD EPYC, over all parameters:

                             median e            largest e           largest e(ours)    largest
                             ours     eager      ours     eager      / e(eager)         floor
    resnet18        stable   4.9e-6   5.3e-6     1.5e-5   1.7e-5     1.3                4.0e-6
                    plain    2.7e-6   2.7e-6     4.2e-6   4.2e-6     1.2                5.2e-6
    resnet50        stable   7.6e-6   7.3e-6     2.8e-4   2.7e-4     1.4                3.6e-6
                    plain    5.8e-3   6.0e-3     7.3e-3   7.3e-3     1.7                4.0e-2
    resnext50_32x4d stable   7.1e-6   7.5e-6     2.5e-4   2.2e-4     1.8                5.1e-6
                    plain    1.6e-2   1.7e-2     2.1e-2   2.5e-2     1.0                4.0e-2

In the stable setting some gradients are exactly 0, or nearly: a BN bias in front of a convolution and a BN that takes
the batch's mean away, where few gates of the channel differ. What is left of sums that cancel to below eps times the
network's largest gradient has no relative error worth the name: ours must be as near to 0 as eager's.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastres.swap import swap
from swap_cases import torchvision
from train_cases import every

pytestmark = pytest.mark.xdist_group("gradients of swapped networks")  # the yardsticks are made once
EPS = torch.finfo(torch.float32).eps
SHIFTS = {"stable": 4.0, "plain": 0.0}
NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d")


def build(name, setting):
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(num_classes=10)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            with torch.no_grad():
                module.bias[::2] += SHIFTS[setting]
                module.bias[1::2] -= SHIFTS[setting]
    return net.train()


def images():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def gradient(net, x):
    F.cross_entropy(net(x), torch.arange(4)).backward()
    return {name: p.grad.double() for name, p in net.named_parameters()}


def nudged(t, generator):
    return t.double() * (1 + 4 * EPS * (2 * torch.rand(t.shape, dtype=torch.float64, generator=generator) - 1))


@functools.cache
def yardsticks(name, setting):
    """(exact, eager's, of the nudged network) gradients: made once for all options."""
    stock, x, generator = build(name, setting), images(), torch.Generator().manual_seed(2)
    exact = gradient(copy.deepcopy(stock).double(), x.double())
    moved = copy.deepcopy(stock).double()
    with torch.no_grad():
        for p in moved.parameters():
            p.copy_(nudged(p, generator))
    return exact, gradient(stock, x), gradient(moved, nudged(x, generator))


def judge(ours, exact, eager, moved):
    """Complaints about each parameter's gradient; (error, eager's, floor) of each, for the record."""
    complaints, measured = [], []
    scale = max(t.norm() for t in exact.values())
    for name, wanted in exact.items():
        size = wanted.norm()
        if size < EPS * scale:
            left, theirs = (float((t[name] - wanted).norm()) for t in (ours, eager))
            if left > max(2 * theirs, 4 * EPS * scale):
                complaints.append(f"{name}: off by {left:.1e}, eager by {theirs:.1e}, where the gradient is {size:.1e}")
            continue
        error, theirs, floor = (float((t[name] - wanted).norm() / size) for t in (ours, eager, moved))
        allowed = 2 * theirs + floor
        missed = 1 - float(F.cosine_similarity(ours[name].flatten(), wanted.flatten(), dim=0))
        if not (error <= allowed and missed <= allowed**2 + 1e-12):
            complaints.append(f"{name}: {error:.2e}, eager {theirs:.2e}, floor {floor:.1e}, 1 - cosine {missed:.1e}")
        measured.append((error, theirs, floor))
    return complaints, torch.tensor(measured)


@every("option")
@pytest.mark.parametrize("setting", SHIFTS)
@pytest.mark.parametrize("name", [n if n == "resnet18" else pytest.param(n, marks=pytest.mark.full) for n in NETWORKS])
def test_every_gradient_of_a_network_is_as_good_as_eagers(name, setting, options):
    net = build(name, setting)
    swap(net, strict=True, **options)
    complaints, measured = judge(gradient(net, images()), *yardsticks(name, setting))
    assert not complaints, "\n".join(complaints)
    error, eager, floor = measured.unbind(1)
    ratio = (error / eager).max()
    figures = error.median(), eager.median(), error.max(), eager.max(), ratio, floor.max()
    print(name, setting, *(f"{number:.2g}" for number in figures))  # shown by -s
    assert setting == "plain" or error.median() < 2e-5  # a gate that differs is 1e-3 and more, in every layer before it


FAULTS = {
    "one gate in ten thousand inverted": lambda g: torch.where(torch.arange(g.numel()).view_as(g) % 10_000 == 0, -g, g),
    "a gradient 1e-4 too large": lambda g: g * (1 + 1e-4),
    "a mean not taken away": lambda g: g + 1e-3 * g.abs().mean(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_judge_sees_small_faults(fault):
    """Planted in the gradient that one block of layer3 passes down."""
    net = build("resnet18", "stable")
    swap(net, strict=True)

    def plant(module, args, y):
        y.register_hook(FAULTS[fault])

    net.layer3[0].register_forward_hook(plant)
    complaints, _ = judge(gradient(net, images()), *yardsticks("resnet18", "stable"))
    assert complaints
