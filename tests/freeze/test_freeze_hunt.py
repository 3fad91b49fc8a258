"""freeze on graphs that a hostile reader thought of: each case was once a wrong answer, a crash or a lie.

Each network is compared with its source twice for each batch: the second call runs the recorded program.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from fastres.inference import freeze


class Net(nn.Module):
    """Convolutions and norms under fixed names, and a forward given as a function."""

    def __init__(self, forward, prepare=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        for norm in (self.bn, self.bn2):
            for t in (norm.weight, norm.running_var):
                t.data.copy_(torch.rand(4, generator=generator) + 0.5)
            for t in (norm.bias, norm.running_mean):
                t.data.copy_(torch.randn(4, generator=generator))
        for conv in (self.conv, self.conv2):
            conv.weight.data.copy_(torch.randn(conv.weight.shape, generator=generator) / 5)
        if prepare is not None:
            prepare(self)
        self.function = forward
        self.eval()

    def forward(self, *inputs):
        return self.function(self, *inputs)


def compare(net, frozen, *inputs, tol=1e-4, dtypes=True):
    with torch.no_grad():
        wants, _ = tree_flatten(net(*(t.clone() for t in inputs)))
    for _ in range(2):
        given = tuple(t.clone(memory_format=torch.preserve_format) for t in inputs)
        gots, _ = tree_flatten(frozen(*given))
        assert len(gots) == len(wants) and all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True))
        for got, want in zip(gots, wants, strict=True):
            assert got.shape == want.shape and (got.dtype == want.dtype or not dtypes)
            torch.testing.assert_close(got.to(want.dtype), want, rtol=tol, atol=tol, equal_nan=True)


def agree(net, capture="auto", batches=(2, 1, 3), sizes=(8,), tol=1e-4, dtype=None):
    frozen = freeze(net, torch.randn(2, 3, 8, 8), capture=capture, tune=False, verify=False, dtype=dtype)
    for size in sizes:
        for batch in batches:
            compare(net, frozen, torch.randn(batch, 3, size, size), tol=tol, dtypes=dtype is None)
    return frozen


def y(net, x):
    return net.bn(net.conv(x))


# ---- in-place calls --------------------------------------------------------------------------------------------------


def written(function):
    """A forward: what `function` does to y in place, then y twice over."""

    def forward(net, x):
        t = y(net, x)
        function(net, x, t)
        return t * 2

    return forward


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x, t: t.add_(x.double()[:, :1]),
        lambda net, x, t: t.mul_(x.double()[:, :1]).relu_(),
        lambda net, x, t: t.gt_(0),
        lambda net, x, t: t.logical_not_(),
        lambda net, x, t: t.eq_(t.relu()),
    ],
    ids=["add double", "mul double", "gt", "not", "eq"],
)
def test_a_call_in_place_keeps_the_dtype_of_what_it_writes_to(function):
    agree(Net(lambda net, x: net.conv2(written(function)(net, x))), "graph")


@pytest.mark.parametrize(
    "view",
    [
        lambda t: torch.einsum("nchw->nhwc", t),
        lambda t: torch.unsafe_chunk(t, 2, 1)[0],
        lambda t: F.channel_shuffle(t, 1),
        lambda t: F.dropout(t, 0.5, False),
    ],
    ids=["einsum", "unsafe_chunk", "channel_shuffle", "dropout"],
)
def test_views_that_no_schema_tells_of_are_seen_by_their_memory(view):
    frozen = agree(Net(written(lambda net, x, t: view(t).relu_())))
    assert frozen.report.capture == "modules" and "hands it on" in frozen.report.capture_reason
    agree(Net(lambda net, x: view(y(net, x)) * 2), "graph")  # nothing is written to


@pytest.mark.parametrize(
    "view",
    [torch.atleast_2d, torch.conj_physical, lambda t: t.sum_to_size(t.shape), lambda t: torch.broadcast_tensors(t)[0]],
)
def test_views_that_functionalization_knows(view):
    agree(Net(written(lambda net, x, t: view(t).relu_())), "graph")


def test_out_arguments_are_writes():
    def forward(net, x):
        t = y(net, x)
        z = t.clone()
        torch.add(t, 1, out=z)
        return t * z

    agree(Net(forward), "graph")
    agree(Net(written(lambda net, x, t: torch.add(t[:, :2], 1, out=t[:, :2]))), "graph")


@pytest.mark.parametrize(
    "function, name",
    [(lambda net, x, t: net.bn.weight.view(-1).mul_(1.5), "bn.weight"), (lambda net, x, t: net.n[:2].add_(1), "n")],
)
def test_a_write_to_a_view_of_a_parameter_or_buffer_is_one_to_it(function, name):
    net = Net(
        lambda net, x: written(function)(net, x) * net.n, lambda net: net.register_buffer("n", torch.ones(4, 1, 1))
    )
    with pytest.raises(ValueError, match=f"its forward writes to {name}"):
        freeze(net, torch.randn(2, 3, 8, 8), capture="graph", tune=False)


def test_a_write_to_a_view_of_the_input_is_in_the_report():
    def forward(net, x):
        first, t = x[:, 0], y(net, x)
        first.mul_(2)  # nobody reads it
        return t

    frozen = agree(Net(forward), "graph")
    assert any("writes to its input" in note for note in frozen.report.notes)


def test_tensors_made_in_the_forward_and_written_to():
    def forward(net, x):
        scale, plane = torch.tensor([1.0, 2, 3, 4]), torch.ones(4, 1, 1)
        scale.mul_(2)
        plane[0] = 3
        return y(net, x).index_put_((torch.tensor([0]),), x.new_ones(1, 4, 8, 8)) * scale[:, None, None] * plane

    agree(Net(forward), "graph")


# ---- the batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: y(net, x) * 2 if x.shape[0] > 4 else y(net, x),
        lambda net, x: y(net, x) * 2 if len(x) > 4 else y(net, x),
        lambda net, x: y(net, x) * 2 if x.shape[0] % 2 else y(net, x),
        lambda net, x: y(net, x) * 2 if x.shape[0] == 3 else y(net, x),
        lambda net, x: y(net, x)[: min(x.shape[0], 4)],
        lambda net, x: torch.stack([y(net, t[None])[0] for t in x]),
        lambda net, x: y(net, x)[::2],
    ],
    ids=["large", "len", "odd", "three", "min", "loop", "every other"],
)
def test_a_forward_that_asks_for_the_batch_is_captured_for_each(forward):
    agree(Net(forward), "graph", batches=(2, 1, 3, 5, 8))


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: y(net, x).view(-1, 2, 2, 8, 8).sum(2).flatten(1),
        lambda net, x: sum(net.conv(torch.cat([x, x])).chunk(2)),
        lambda net, x: y(net, x).view(x.shape[0], 2, 2, 8, 8).transpose(1, 2).reshape(x.shape[0], -1),
        lambda net, x: y(net, x).repeat(2, 1, 1, 1).reshape(x.shape[0], -1) / x.shape[0],
    ],
)
def test_a_forward_that_only_uses_the_batch_is_captured_once(forward):
    frozen = agree(Net(forward), "graph", batches=(2, 1, 3, 5, 8))
    assert not frozen._variants.found and not any("fixes its batch" in note for note in frozen.report.notes)


def remembers(net, x):
    t = y(net, x)
    net.last, last = t.mean(), getattr(net, "last", 0.0)
    return t + last


def counts(net, x):
    net.numbers["calls"] += 1
    return y(net, x) * net.numbers["calls"]


@pytest.mark.parametrize("forward", [remembers, counts])
def test_state_that_no_buffer_holds_is_no_graph(forward):
    net = Net(forward, lambda net: setattr(net, "numbers", {"calls": 0}))
    with pytest.raises(ValueError, match="capture: got 'graph', and .* has none: .*differently from call to call"):
        freeze(net, torch.randn(2, 3, 8, 8), capture="graph", tune=False)


@pytest.mark.parametrize("forward", [lambda net, x: y(net, x).nonzero(), lambda net, x: x[y(net, x)[:, :3] > 0]])
def test_sizes_that_depend_on_the_data(forward):
    agree(Net(forward))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: torch.as_strided(y(net, x), (x.shape[0], 4, 64), (256, 64, 1)).relu(),
        lambda net, x: torch.as_strided(y(net, x).transpose(1, 3).contiguous(), (x.shape[0], 64), (256, 1)),
        lambda net, x: torch.view_as_complex(y(net, x).permute(0, 2, 3, 1).contiguous().view(-1, 8, 8, 2, 2)).abs(),
        lambda net, x: (y(net, x).contiguous().view(torch.int32) ^ -(2**31)).view(torch.float32),
        lambda net, x: torch.fft.fft2(y(net, x)),
    ],
    ids=["as_strided", "as_strided of a copy", "complex", "bits", "complex output"],
)
def test_what_reads_memory_as_it_lies(forward):
    agree(Net(forward), "graph")


def test_what_reads_memory_as_it_lies_in_a_network_without_a_graph():
    def forward(net, x):
        t = torch.as_strided(y(net, x), (x.shape[0], 4, 64), (256, 64, 1))
        return t if float(t.sum()) == 0.5 else t + 1

    frozen = agree(Net(forward))
    assert frozen.report.capture == "modules" and not frozen.channels_last


# ---- folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: y(net, x) * torch.tensor(float(x.shape[-1])),
        lambda net, x: y(net, x).sigmoid() + torch.tensor(float(x.shape[-1])),
    ],
    ids=["folded", "kept"],
)
def test_tensors_that_the_forward_makes_of_the_image_size_are_those_of_that_size(forward):
    agree(Net(forward), "graph", sizes=(8, 6, 12))


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


def test_a_linear_layer_of_one_output():
    net = Net(lambda net, x: F.linear(y(net, x).mean((2, 3)), net.fc.weight[0]))
    agree(net, "graph")


def test_outputs_that_are_copies_stay_copies():
    frozen = agree(Net(lambda net, x: (lambda t: (t, t.clone()))(y(net, x))), "graph")
    for _ in range(3):
        first, second = frozen(torch.randn(2, 3, 8, 8))
        assert torch.equal(first, second) and not torch.equal(first.zero_(), second)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def test_casts_of_weights_that_round_do():
    agree(Net(lambda net, x: F.conv2d(x, net.conv.weight.to(torch.bfloat16).to(x.dtype))), "graph", tol=1e-5)
    agree(Net(lambda net, x: net.conv(x) * net.bn.weight.half().float()[:, None, None]), "graph", tol=1e-5)
    agree(Net(lambda net, x: net.conv(x) * net.bn.weight.double().float()[:, None, None]), "graph", tol=1e-5)


MIXED = {
    "buffer": (
        lambda net, x: (y(net, x).double() @ net.table).float(),
        lambda net: net.register_buffer("table", torch.randn(8, 8, dtype=torch.float64)),
    ),
    "promoted": (
        lambda net, x: y(net, x) * net.table,
        lambda net: net.register_buffer("table", torch.randn(8, 8, dtype=torch.float64)),
    ),
    "tail": (
        lambda net, x: net.bn2(net.conv2(y(net, x).double())).relu(),
        lambda net: (net.conv2.double(), net.bn2.double()),
    ),
    "middle": (
        lambda net, x: y(net, x).mean() + F.relu(net.bn2(net.conv2(y(net, x).bfloat16()))).float(),
        lambda net: (net.conv2.bfloat16(), net.bn2.bfloat16()),
    ),
    "backbone": (
        lambda net, x: net.fc(F.relu(y(net, x.bfloat16())).float().mean((2, 3))),
        lambda net: (net.conv.bfloat16(), net.bn.bfloat16()),
    ),
}


@pytest.mark.parametrize("case", MIXED)
def test_networks_of_several_dtypes(case):
    forward, prepare = MIXED[case]
    frozen = agree(Net(forward, prepare), "graph", tol=0.1 if case in ("middle", "backbone") else 1e-4)
    assert frozen.report.folded >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.conv2(y(net, x.to(net.conv.weight.dtype)).to(net.conv2.weight.dtype)),
        lambda net, x: net.conv2(torch.cat([y(net, x)[:, :2], torch.zeros(len(x), 2, 8, 8, dtype=x.dtype)], 1)),
        lambda net, x: net.fc(F.layer_norm(y(net, x).mean((2, 3)).float(), (4,)).to(x.dtype)),
        lambda net, x: y(net, x).masked_fill(x[:, :1] > 0, torch.finfo(x.dtype).min).softmax(1),
        lambda net, x: net.conv2(y(net, x - torch.tensor([0.1, 0.2, 0.3])[:, None, None])),
    ],
    ids=["weight's", "zeros", "float and back", "finfo", "constant"],
)
def test_code_that_asks_for_the_dtype_sees_the_frozen_one(forward, dtype):
    agree(Net(forward), "graph", tol=0.2, dtype=dtype)


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
def test_constants_that_lie_on_a_step_fall_where_they_do_in_the_sources_dtype(scale):
    net = Net(
        lambda net, x: net.conv(x) * scale(net.q)[:, None, None],
        lambda net: net.register_buffer("q", torch.tensor([0.3, 0.4, 0.5, 0.7])),
    )
    agree(net, "graph")
    q = net.q
    assert not torch.equal(scale(q), scale(q.double()).float())  # or this shows nothing


# ---- NaN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        lambda t: t.sqrt(),
        lambda t: t.log(),
        lambda t: t.pow(0.5),
        lambda t: t / t.relu().mul(0),
        lambda t: t.sub(1).acos(),
        lambda t: t / t.std(0) if len(t) else t,
    ],
    ids=["sqrt", "log", "pow", "division", "acos", "std"],
)
@pytest.mark.filterwarnings("ignore:std\\(\\)")
def test_nan_that_the_network_makes_itself_is_not_turned_into_0(step):
    net = Net(lambda net, x: F.relu(net.bn2(net.conv2(step(y(net, x))))))
    frozen = agree(net, "graph", sizes=(8, 6), tol=1e-3)
    assert [conv.exact for conv in frozen.module.children()] == [False, True]  # what is before it stays fast


@pytest.mark.parametrize(
    "step", [lambda t: t.pow(2), lambda t: t / 6, lambda t: t / torch.ones(4, 1, 1), torch.sigmoid]
)
def test_steps_that_make_no_nan_cost_nothing(step):
    frozen = agree(Net(lambda net, x: F.relu(net.bn2(net.conv2(step(y(net, x)))))), "graph")
    assert not any(conv.exact for conv in frozen.module.modules() if hasattr(conv, "exact"))
