"""Swapped models on disk and in other processes: state_dict, weights_only, deepcopy, pickle, spawn, EMA."""

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastres.swap import BlockAdapter, register_block, swap, unswap
from swap_cases import TINY_CALLS, assert_same, assert_same_steps, fused_calls, images, pair, step, tiny, torchvision

PLAIN = """
import sys, torch, torchvision
resnet = torchvision.models.resnet
net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)
state = torch.load(sys.argv[1], weights_only=True)
net.load_state_dict(state["model"])
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
optimizer.load_state_dict(state["optimizer"])
assert not any(name.split(".")[0] == "fastres" for name in sys.modules)
y = net.eval()(state["x"])
assert torch.allclose(y, state["y"], rtol=1e-4, atol=1e-4), (y - state["y"]).abs().max()
"""


def test_row36_weights_load_in_a_process_without_fastres(tmp_path):
    """A checkpoint of a swapped, trained model and its optimizer, read with weights_only=True by plain torchvision."""
    resnet = torchvision.models.resnet
    net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)
    stock_keys = [(name, t.shape, t.dtype) for name, t in net.state_dict().items()]
    swap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(2, 3, 48, 48)
    net(x).square().mean().backward()
    optimizer.step()
    assert [(name, t.shape, t.dtype) for name, t in net.state_dict().items()] == stock_keys
    with torch.no_grad():
        y = net.eval()(x)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "x": x, "y": y}, tmp_path / "c.pt")
    done = subprocess.run([sys.executable, "-c", PLAIN, tmp_path / "c.pt"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_row37_copies_stay_swapped_and_equal(how):
    net = tiny()
    swap(net, backend="reference")
    if how == "deepcopy":
        twin = copy.deepcopy(net)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(net, protocol=pickle.HIGHEST_PROTOCOL))
    else:
        file = io.BytesIO()
        torch.save(net, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert [type(a) for a in twin.modules()] == [type(a) for a in net.modules()]
    assert twin.stem.fastres_backend == "reference"
    assert fused_calls(copy.deepcopy(twin), images()) == TINY_CALLS
    assert_same_steps(twin, net, images(), tolerance=0)
    assert not {id(t) for t in twin.parameters()} & {id(t) for t in net.parameters()}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_row37_every_pickle_protocol(protocol):
    net = tiny()
    swap(net)
    twin = pickle.loads(pickle.dumps(net, protocol=protocol))
    assert [type(a) for a in twin.modules()] == [type(a) for a in net.modules()]


def test_row37_reverted_model_pickles_as_a_plain_one():
    net = tiny()
    report = swap(net)
    assert b"fastres" in pickle.dumps(net)
    report.revert()
    assert b"fastres" not in pickle.dumps(net)


def test_row37_a_copy_is_reverted_by_itself():
    net = tiny()
    report = swap(net)
    twin = copy.deepcopy(net)
    report.revert()
    assert fused_calls(net, images()) == 0 and fused_calls(twin, images()) == TINY_CALLS
    unswap(twin)
    assert fused_calls(twin, images()) == 0


def worker(pipe):
    net, x = pipe.recv()
    results = step(net, x)
    pipe.send((type(net.layer1[0]).__qualname__, {name: t.numpy() for name, t in results.items()}))
    pipe.send(net)
    pipe.recv()  # tensors are handed over by this process: it must outlive their arrival


def test_row37_spawned_worker():
    """A fresh interpreter makes the fused classes again from the pickle, and sends the model back."""
    net = tiny()
    swap(net)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=worker, args=(there,))
    process.start()
    try:
        x = images()
        here.send((copy.deepcopy(net), x))  # what is sent is shared memory from then on
        assert here.poll(240), "no answer from the worker"
        name, results = here.recv()
        back = copy.deepcopy(here.recv())
        here.send("done")
    finally:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert process.exitcode == 0
    assert name == type(net.layer1[0]).__qualname__ == "Fused:torchvision/models/resnet:BasicBlock"
    assert_same({n: torch.from_numpy(a) for n, a in results.items()}, step(net, x))
    assert type(back.layer1[0]) is type(net.layer1[0])


class Mine(nn.Module):
    """relu(norm(x)): a class of this test, known after `register_block`."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(x))


def test_row37_a_user_class_needs_register_block_to_unpickle():
    import fastres.swap.adapters  # noqa: F401
    import fastres.swap.fused  # noqa: F401

    adapter = BlockAdapter(lambda block, x: block.act(block.norm(x)), norms=("norm",), acts=("act",))
    register_block(Mine, adapter)
    net = Mine()
    swap(net)
    data = pickle.dumps(net)
    assert type(pickle.loads(data)) is type(net)
    registry = sys.modules["fastres.swap.adapters"]._REGISTERED
    del registry[Mine]  # as in a process that has not called register_block yet
    with pytest.raises(LookupError, match="call fastres.register_block for it first"):
        pickle.loads(data)
    register_block(Mine, adapter)
    assert type(pickle.loads(data)) is type(net)


def test_row37_local_classes_copy_as_before():
    class Local(torchvision.models.resnet.BasicBlock):
        pass

    block, stock = pair(lambda: Local(4, 4).double())
    swap(block, strict=True)
    assert_same_steps(copy.deepcopy(block), stock, torch.randn(2, 4, 6, 6, dtype=torch.float64))
    for module in (block, stock):  # a local class pickles neither way
        with pytest.raises((pickle.PicklingError, AttributeError)):
            pickle.dumps(module)


@pytest.mark.parametrize("name", ["Fused:os:system", "Fused:torchvision/models/resnet:ResNet50", "Other"])
def test_names_that_are_no_fused_class(name):
    import fastres.swap.fused  # noqa: F401

    with pytest.raises(AttributeError):
        getattr(sys.modules["fastres.swap.fused"], name)


def test_row37_ema_and_swa_copies_follow():
    net, stock = pair()
    swap(net)
    averages = []
    for model in (net, stock):
        average = torch.optim.swa_utils.AveragedModel(model)
        for p in model.parameters():
            p.data.mul_(0.5)
        average.update_parameters(model)
        averages.append(average)
    assert fused_calls(copy.deepcopy(averages[0].module), images()) == TINY_CALLS
    assert_same_steps(averages[0].module, averages[1].module, images())


def test_share_memory_and_half_copies():
    net = tiny(torch.float32)
    swap(net)
    assert all(t.is_shared() for t in net.share_memory().state_dict().values())
    assert copy.deepcopy(net).half().state_dict()["stem.0.weight"].dtype == torch.float16
