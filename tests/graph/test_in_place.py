"""In-place calls, views and aliases of a captured forward: undone where nobody sees them, refused where they hide."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from freeze_cases import Net, agree, freeze, images, notes


def written(function):
    """A forward: what `function` does to y in place, then y twice over."""

    def forward(net, x):
        t = net.first(x)
        function(net, x, t)
        return t * 2

    return forward


def of_y(function):
    return lambda net, x: function(net.first(x))


ALIASES = {
    "act seen through its input": lambda y: (F.relu_(y), y.sum((2, 3))),
    "input returned": lambda y: (F.relu_(y), y),
    "view read behind": lambda y: (lambda v: (F.relu_(y), v + 1))(y[:, :2]),
    "written through a view": lambda y: (y[:, :2].mul_(0), y * 1)[1],
    "sliced and added": lambda y: (y[:].add_(1), y.sigmoid())[1],
    "chain": lambda y: (F.relu_(y), y.add_(1), y.mul_(2), y + 0)[3],
    "before and behind": lambda y: (y.exp(), F.relu_(y), y.sigmoid())[::2],
    "chunks": lambda y: (lambda a, b: (a.relu_(), torch.cat([b, a], 1))[1])(*y.chunk(2, 1)),
    "unflattened": lambda y: (F.relu_(y), y.flatten(1))[1],
    "copied": lambda y: (lambda c: (F.relu_(y), c)[1])(y.clone()),
    "filled": lambda y: (y.zero_(), y + 1)[1],
    "indexed": lambda y: (y.__setitem__((slice(None), 0), 7.0), y)[1],
    "copied into": lambda y: y.copy_(y.flip(1)) + y,
    "out": lambda y: (lambda z: (torch.add(y, 1, out=z), y * z)[1])(y.clone()),
    "out, a view": lambda y: (torch.add(y[:, :2], 1, out=y[:, :2]), y * 2)[1],
    "dtype of a double": lambda y: y.add_(y.double()[:, :1]) * 2,
    "dtype of a product": lambda y: y.mul_(y.double()[:, :1]).relu_() * 2,
    "dtype of gt": lambda y: y.gt_(0) * 2,
    "dtype of not": lambda y: y.logical_not_() * 2,
    "dtype of eq": lambda y: y.eq_(y.relu()) * 2,
    "output is a copy": lambda y: (y, y.clone()),
    "outputs that are read": lambda y: {"a": y, "b": [F.relu(y), y[:, :2], None, 3], "c": y.mean((2, 3))},
}


@pytest.mark.parametrize("case", ALIASES)
def test_24_aliases_and_in_place_calls(case):
    agree(Net(of_y(ALIASES[case])), convs=1)


ONE_TRACE = {
    "view taken behind": lambda net, x: torch.cat(F.relu_(net.first(x)).chunk(2, 1)[::-1], 1),
    "view of a view": lambda net, x: F.relu_(net.first(x))[:, 1:][:, :2] + 1,
    "dropout in place": lambda net, x: F.dropout(F.relu_(net.first(x)), 0.5, net.training, inplace=True).tanh(),
}


@pytest.mark.parametrize("case", ONE_TRACE)
def test_harmless_in_place_calls_cost_no_second_trace(case, monkeypatch):
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)  # PyTorch's functionalization
    agree(Net(ONE_TRACE[case]), convs=1, folded=1, acts=1)


HIDDEN = {  # views that no schema tells of
    "einsum": lambda t: torch.einsum("nchw->nhwc", t),
    "unsafe_chunk": lambda t: torch.unsafe_chunk(t, 2, 1)[0],
    "channel_shuffle": lambda t: F.channel_shuffle(t, 1),
    "dropout": lambda t: F.dropout(t, 0.5, False),
}


@pytest.mark.parametrize("view", HIDDEN)
def test_24_views_that_no_schema_tells_of_are_seen_by_their_memory(view):
    frozen = agree(Net(written(lambda net, x, t: HIDDEN[view](t).relu_())), capture="auto")
    if view != "dropout" or frozen.report.capture == "modules":  # torch 2.15 has a graph of it, with eager's answers
        assert frozen.report.capture == "modules" and "hands it on" in frozen.report.capture_reason
    agree(Net(of_y(lambda y: HIDDEN[view](y) * 2)))  # nothing is written to


@pytest.mark.parametrize(
    "view",
    [torch.atleast_2d, torch.conj_physical, lambda t: t.sum_to_size(t.shape), lambda t: torch.broadcast_tensors(t)[0]],
)
def test_24_views_that_functionalization_knows(view):
    agree(Net(written(lambda net, x, t: view(t).relu_())))


def test_outputs_that_are_copies_stay_copies_and_every_call_has_its_own():
    frozen = agree(Net(of_y(ALIASES["output is a copy"])))
    for _ in range(3):
        first, second = frozen(images())
        assert torch.equal(first, second) and not torch.equal(first.zero_(), second)
    frozen = agree(Net(lambda net, x: (x * 1, x + 0)))
    x = images(1)
    assert all(torch.equal(y, x) and y.data_ptr() != x.data_ptr() for y in frozen(x))


# ---- the input, buffers and parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [lambda net, x: net.first(net.relu(x)), lambda net, x: (lambda v: (net.first(x), v.mul_(2))[0])(x[:, 0])],
    ids=["itself", "a view that nobody reads"],
)
def test_24_the_input_is_never_written_to_and_the_report_says_so(forward):
    frozen = agree(Net(forward), convs=1)
    assert "the source writes to its input" in notes(frozen)


@pytest.mark.parametrize(
    ("function", "name"),
    [(lambda net, x, t: net.bn.weight.view(-1).mul_(1.5), "bn.weight"), (lambda net, x, t: net.n[:2].add_(1), "n")],
)
def test_a_write_to_a_view_of_a_parameter_or_buffer_is_one_to_it(function, name):
    net = Net(
        lambda net, x: written(function)(net, x) * net.n, lambda net: net.register_buffer("n", torch.ones(4, 1, 1))
    )
    with pytest.raises(ValueError, match=f"its forward writes to {name}"):
        freeze(net, images(), capture="graph", tune=False)


def test_tensors_made_in_the_forward_and_written_to():
    def forward(net, x):
        scale, plane = torch.tensor([1.0, 2, 3, 4]), torch.ones(4, 1, 1)
        scale.mul_(2)
        plane[0] = 3
        return net.first(x).index_put_((torch.tensor([0]),), x.new_ones(1, 4, 8, 8)) * scale[:, None, None] * plane

    agree(Net(forward), batches=(1, 3))


# ---- memory as it lies -----------------------------------------------------------------------------------------------

BY_MEMORY = {
    "as_strided": lambda y: torch.as_strided(y, (y.shape[0], 4, 64), (256, 64, 1)).relu(),
    "as_strided of a copy": lambda y: torch.as_strided(y.transpose(1, 3).contiguous(), (y.shape[0], 64), (256, 1)),
    "complex": lambda y: torch.view_as_complex(y.permute(0, 2, 3, 1).contiguous().view(-1, 8, 8, 2, 2)).abs(),
    "bits": lambda y: (y.contiguous().view(torch.int32) ^ -(2**31)).view(torch.float32),
    "complex output": lambda y: torch.fft.fft2(y),
}


@pytest.mark.parametrize("case", BY_MEMORY)
def test_what_reads_memory_as_it_lies(case):
    agree(Net(of_y(BY_MEMORY[case])), verify=False)


def test_what_reads_memory_as_it_lies_in_a_network_without_a_graph():
    def forward(net, x):
        t = BY_MEMORY["as_strided"](net.first(x))
        return t if float(t.sum()) == 0.5 else t + 1

    frozen = agree(Net(forward), capture="auto")
    assert frozen.report.capture == "modules" and not frozen.plan.channels_last


# ---- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_a_dropout_that_is_on_stays_random(inplace):
    net = Net(lambda net, x: F.dropout(net.first(x), 0.5, True, inplace))
    frozen, x = freeze(net, images(), tune=False, verify=False), images(2, 32)
    first, second = frozen(x), frozen(x)
    assert 0.4 < (first == 0).float().mean() < 0.6 and not torch.equal(first, second)


def test_a_network_that_draws_numbers_draws_the_sources(caplog):
    net = Net(lambda net, x: F.relu(net.first(x)) * torch.rand(x.shape[0], 1, 1, 1))
    frozen = freeze(net, images(), capture="graph", tune=False, verify=False)
    x, answers = images(3), []
    for model in (net, frozen, frozen, frozen):
        torch.manual_seed(5)
        with torch.no_grad():
            answers.append(model(x))
    for got in answers[1:]:
        torch.testing.assert_close(got, answers[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(frozen(x), frozen(x)) and "fault" not in caplog.text


def test_a_bare_sequence_with_an_activation_in_place_first():
    agree(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)).eval(), convs=1, acts=1)
