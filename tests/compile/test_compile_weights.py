"""torch.compile(model, backend="fastres") keeps nothing made of weights: whatever is written to one, in whatever way,
the next call follows, without another compilation."""

import copy
import gc
import threading
import weakref

import numpy
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compile_cases import CONV, agree, close, compiled, images, net, seen


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    seen.clear()
    yield
    torch._dynamo.reset()


def step(model):
    model.train()
    model(images).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.zero_grad()
    model.eval()


def average(model):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    averaged.update_parameters(net())
    model.load_state_dict(averaged.module.state_dict())


def numpy_view(model):
    model.conv2.weight.detach().numpy()[...] = numpy.float32(0.25)


def swap_memory(model):
    model.bn.weight.set_(torch.rand(4) + 1)


def set_data(model):
    model.conv2.weight.data = torch.randn_like(model.conv2.weight)


def replace(model):
    model.conv.weight = nn.Parameter(torch.randn_like(model.conv.weight))


CHANGES = {
    "an optimizer's step": step,
    "load_state_dict": lambda m: m.load_state_dict(net().state_dict()),
    "load_state_dict(assign)": lambda m: m.load_state_dict(net().state_dict(), assign=True),
    "AveragedModel": average,
    "p.data.mul_": lambda m: [p.data.mul_(0.5).add_(0.01) for p in m.parameters()],
    "one element": lambda m: m.conv.weight.data[3, 2, 1, 0].add_(5),
    "an element of the last BN": lambda m: m.bn2.weight.data[2].add_(3),
    "a NumPy view": numpy_view,
    "p.set_": swap_memory,
    "p.data =": set_data,
    "another Parameter": replace,
    "running_mean": lambda m: m.bn.running_mean.add_(1),
    "running_mean.data": lambda m: m.bn.running_mean.data.add_(1),
    "running_var.data": lambda m: m.bn2.running_var.data.mul_(9),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_followed(change):
    torch.manual_seed(1)
    model = net()
    fast = agree(model, images)
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        old = fast(images)
    with torch.set_grad_enabled(change is step):
        change(model)
    with torch.no_grad():
        for _ in range(2):
            close(fast(images), model(images), 1e-4)
        assert not torch.allclose(fast(images), old, atol=1e-3)
    assert counters["stats"]["unique_graphs"] <= before + (
        change in (step, replace, CHANGES["load_state_dict(assign)"])
    )
    assert all(graph[CONV] == 2 for graph in seen)


def test_an_evaluation_of_averages_and_back():
    """The issue's example: p.data.copy_(ema), evaluate, restore."""
    model, ema = net(), net()
    fast = agree(model, images)
    stored = [p.data.clone() for p in model.parameters()]
    with torch.no_grad():
        own = fast(images)
        for values in ([p.data for p in ema.parameters()], stored):
            for p, value in zip(model.parameters(), values, strict=True):
                p.data.copy_(value)
            close(fast(images), model(images))
        assert torch.equal(fast(images), own)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("variance", [-1.0, torch.nan, torch.inf, 0.0])
def test_statistics_without_a_root(variance):
    """What they give in eager they give here, and sound ones again afterwards."""
    model = net()
    model.bn.running_var.data.fill_(variance)
    fast = agree(model, images)
    with torch.no_grad():
        model.bn.running_var.data.fill_(2)
        close(fast(images), model(images))
    assert seen[0][CONV] == 2 and len(seen) == 1


def test_weights_that_are_computed_are_followed():
    model = net()
    nn.utils.parametrizations.weight_norm(model.conv)
    fast = agree(model, images)
    with torch.no_grad():
        model.conv.parametrizations.weight.original0.data.mul_(3)
        close(fast(images), model(images))


def test_norms_in_training_mode_stay_and_move_their_statistics():
    model = net()
    model.bn2.train()
    other, fast = copy.deepcopy(model), compiled(model)
    with torch.no_grad():
        for _ in range(2):
            close(fast(images), other(images))
    for name, t in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], t)


def test_models_of_one_class_share_a_graph_and_keep_their_own_weights():
    models = [net() for _ in range(3)]
    fast = [compiled(model) for model in models]
    fast.append(copy.deepcopy(fast[0]))
    with torch.no_grad():
        for turn in range(3):
            models[turn].bn.bias.data.add_(1)
            for one in fast:
                close(one(images), one._orig_mod(images))
        assert not torch.allclose(fast[0](images), fast[3](images), atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_graphs_keep_no_model_alive():
    model = net()
    fast, gone = agree(model, images), weakref.ref(model)
    del model, fast
    gc.collect()
    assert gone() is None


def test_threads():
    model = net()
    fast = agree(model, images)
    xs = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    with torch.no_grad():
        wants = [model(x) for x in xs]
    errors = []

    def run(x, want):
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(fast(x), want, atol=1e-5):
                    errors.append(x)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(xs, wants, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
