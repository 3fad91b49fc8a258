"""Constants of a captured forward, and dtypes: what is computed once, how it rounds, what the frozen dtype changes."""

import pytest
import torch
from torch.nn import functional as F

from freeze_cases import Net, agree, compare, freeze

# ---- tensors that the forward makes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.first(x) * torch.tensor(float(x.shape[-1])),
        lambda net, x: net.first(x).sigmoid() + torch.tensor(float(x.shape[-1])),
    ],
    ids=["folded", "kept"],
)
def test_those_of_the_image_size_are_those_of_that_size(forward):
    agree(Net(forward), sizes=(8, 6, 12))


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.conv(x[0]) * net.column,
        lambda net, x: F.batch_norm(net.conv(x[0]), *list(net.bn.buffers())[:2], net.bn.weight, net.bn.bias),
    ],
    ids=["product", "norm"],
)
def test_one_image_as_high_as_it_has_channels(forward):
    net = Net(forward, lambda net: net.register_buffer("column", torch.tensor([[1.0], [2], [3], [4]])))
    x = torch.randn(2, 3, 4, 4)
    compare(net, freeze(net, x, capture="graph", tune=False, verify=False), x)


# ---- rounding --------------------------------------------------------------------------------------------------------


def test_casts_of_weights_that_round_do():
    agree(Net(lambda net, x: F.conv2d(x, net.conv.weight.to(torch.bfloat16).to(x.dtype))), tol=1e-5, verify=False)
    agree(Net(lambda net, x: net.conv(x) * net.bn.weight.half().float()[:, None, None]), tol=1e-5, verify=False)
    agree(Net(lambda net, x: net.conv(x) * net.bn.weight.double().float()[:, None, None]), tol=1e-5, verify=False)


@pytest.mark.parametrize(
    "scale",
    [
        lambda q: (q / 0.1).floor(),
        lambda q: (q / 0.1).to(torch.int64),
        lambda q: (q * 10 == torch.tensor([3.0, 4, 5, 7])).float() + 1,
        lambda q: (q * 1e-30).square().gt(0) + 1.0,
    ],
    ids=["floor", "cast", "equal", "underflow"],
)
def test_those_that_lie_on_a_step_fall_where_they_do_in_the_sources_dtype(scale):
    net = Net(
        lambda net, x: net.conv(x) * scale(net.q)[:, None, None],
        lambda net: net.register_buffer("q", torch.tensor([0.3, 0.4, 0.5, 0.7])),
    )
    agree(net, verify=False)
    assert not torch.equal(scale(net.q), scale(net.q.double()).float())  # or this shows nothing


def test_a_large_constant_made_of_a_small_one_is_computed_in_every_call():
    net = Net(
        lambda net, x: (net.first(x).mean((1, 2, 3), True) * net.q.repeat(200, 200)).amax((2, 3)),
        lambda net: net.register_buffer("q", torch.randn(8, 8)),
    )
    frozen = agree(net, verify=False)
    assert max(t.numel() for t in frozen.weights.buffers()) < 1000


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def table(net):
    net.register_buffer("table", torch.randn(8, 8, dtype=torch.float64))


MIXED = {
    "buffer": (lambda net, x: (net.first(x).double() @ net.table).float(), table),
    "promoted": (lambda net, x: net.first(x) * net.table, table),
    "tail": (
        lambda net, x: net.second(net.first(x).double()).relu(),
        lambda net: (net.conv2.double(), net.bn2.double()),
    ),
    "middle": (
        lambda net, x: net.first(x).mean() + F.relu(net.second(net.first(x).bfloat16())).float(),
        lambda net: (net.conv2.bfloat16(), net.bn2.bfloat16()),
    ),
    "backbone": (
        lambda net, x: net.fc(F.relu(net.first(x.bfloat16())).float().mean((2, 3))),
        lambda net: (net.conv.bfloat16(), net.bn.bfloat16()),
    ),
}


@pytest.mark.parametrize("case", MIXED)
def test_20_networks_of_several_dtypes(case):
    half = case in ("middle", "backbone")
    frozen = agree(Net(*MIXED[case]), tol=0.1 if half else 1e-4, verify=False, batches=(1, 3))
    assert frozen.report.folded >= 1


ASKS = {
    "weight's": lambda net, x: net.conv2(net.first(x.to(net.conv.weight.dtype)).to(net.conv2.weight.dtype)),
    "zeros": lambda net, x: net.conv2(torch.cat([net.first(x)[:, :2], torch.zeros(len(x), 2, 8, 8, dtype=x.dtype)], 1)),
    "float and back": lambda net, x: net.fc(F.layer_norm(net.first(x).mean((2, 3)).float(), (4,)).to(x.dtype)),
    "finfo": lambda net, x: net.first(x).masked_fill(x[:, :1] > 0, torch.finfo(x.dtype).min).softmax(1),
    "constant": lambda net, x: net.conv2(net.first(x - torch.tensor([0.1, 0.2, 0.3])[:, None, None])),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ASKS)
def test_20_code_that_asks_for_the_dtype_sees_the_frozen_one(case, dtype):
    agree(Net(ASKS[case]), tol=0.2, dtype=dtype, verify=False)
