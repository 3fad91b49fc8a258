"""Every write to a weight or a statistic between two eval calls is followed, by ResNet-18 and ResNet-50, swapped and
through torch.compile(backend="fastres"). Most of the ways to write move no version counter."""

import copy

import pytest
import torch

import fastres
from swap_cases import scramble, torchvision

pytestmark = pytest.mark.xdist_group("writes between eval calls")  # the networks are compiled once

X = torch.randn(4, 3, 33, 33, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def stock(request):
    """A network whose statistics are those of its activations, so that every layer shows in its output."""
    torch.manual_seed(0)
    net = scramble(getattr(torchvision.models, request.param)(num_classes=7), statistics=False)
    for module in net.modules():
        module.momentum = 1.0
    net(X)
    return net.eval()


@pytest.fixture(scope="module", params=["swapped", "compiled"])
def nets(request, stock):
    """The model that is written to, what runs it, and a stock network."""
    model = copy.deepcopy(stock)
    if request.param == "swapped":
        fastres.swap(model, strict=True)
        return model, model, stock
    torch._dynamo.reset()
    return model, torch.compile(model, backend="fastres", options={"inner": "aot_eager"}), stock


def _all_weights(m):
    for p in m.parameters():
        p.data.copy_(p + 0.2 * p.abs().mean() * torch.randn_like(p))


def _all_scaled(m):
    for p in m.parameters():
        p.data.mul_(0.9)


def _all_statistics(m):
    for name, buffer in m.named_buffers():
        buffer.data.mul_(2) if name.endswith("running_var") else buffer.data.add_(1)


def _numpy(m):
    m.layer2[0].conv1.weight.detach().numpy()[...] *= 3
    m.layer1[0].bn2.running_mean.numpy()[1] += 4


def _set(m):
    m.layer2[1].conv2.weight.set_(torch.randn_like(m.layer2[1].conv2.weight))
    m.layer2[0].downsample[1].running_var.set_(torch.rand_like(m.layer2[0].downsample[1].running_var) + 3)


WRITES = {
    "p.data.copy_": _all_weights,
    "p.data.mul_": _all_scaled,
    "an element of a convolution": lambda m: m.conv1.weight.data[3, 2, 1, 1].add_(9),
    "an element of a BN": lambda m: m.layer3[0].bn1.weight.data[2].add_(30),
    "a numpy view": _numpy,
    "p.set_": _set,
    "p.data =": lambda m: setattr(m.layer1[1].bn1.bias, "data", m.layer1[1].bn1.bias + 2),
    "buffer.data": _all_statistics,
    "an element of a buffer": lambda m: m.layer4[0].bn1.running_var.data[0].mul_(0.001),
}


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_between_two_eval_calls_are_followed(nets, write):
    model, fast, stock = nets
    before, kept = fast(X), copy.deepcopy(model.state_dict())
    write(model)
    stock.load_state_dict(model.state_dict())
    got, wanted = fast(X), stock(X)
    scale = wanted.abs().max().item()
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * scale)
    assert (wanted - before).abs().max() > 2e-3 * scale, "the write changes too little to be missed"
    model.load_state_dict(kept)
    assert torch.equal(fast(X), before)
