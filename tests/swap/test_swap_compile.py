"""Swapped blocks under torch.compile, torch.export, torch.fx and torchvision's feature extractor."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import fastres
from fastres.swap import swap
from swap_cases import (
    TINY_CALLS,
    Ops,
    assert_same,
    hugging_face_resnet,
    images,
    pair,
    scramble,
    step,
    tiny,
    torchvision,
)

vision = torchvision.models.resnet


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def targets(graph):
    return Counter(getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function")


class Captured:
    """A compiler backend that keeps the graphs it is given: aot_eager's numerics, and what was in the graph."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs):
        self.graphs.append(targets(module.graph))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_compiled_network_is_one_graph_with_our_operator(train):
    net, stock = pair()
    swap(net)
    backend = Captured()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    x = images()
    ours = {k.replace("_orig_mod.", ""): t for k, t in step(compiled, x, train=train).items()}
    assert_same(ours, step(stock, x, train=train))
    assert len(backend.graphs) == 1
    assert sum(n for name, n in backend.graphs[0].items() if "bn_act" in name) == TINY_CALLS
    assert not any("batch_norm" in name for name in backend.graphs[0])


@pytest.mark.parametrize("train", [True, False])
def test_row23_no_recompile_storm_over_batch_sizes(train):
    block = vision.BasicBlock(4, 4).double()
    swap(block)
    backend = Captured()
    compiled, eager = torch.compile(block.train(train), fullgraph=True, backend=backend), copy.deepcopy(block)
    for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11):
        x = torch.randn(n, 4, 6, 6, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), eager(x))
    assert len(backend.graphs) <= 2  # one for the first size, one for any


def test_row40_compiled_block_with_a_hooked_child():
    """The stock forward is traced instead. (torch.compile ignores hooks added after compilation, on any model.)"""
    block, stock = pair(lambda: vision.BasicBlock(4, 4).double())
    swap(block)
    for model in (block, stock):
        model.bn1.register_forward_hook(lambda m, a, y: y + 1)
    backend, x = Captured(), torch.randn(2, 4, 6, 6).double()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=backend)(x), stock(x))
    assert not any("bn_act" in name for name in backend.graphs[0])


def test_compiled_block_whose_child_is_in_eval_alone():
    block, stock = pair(lambda: scramble(vision.BasicBlock(4, 4)).double())
    swap(block)
    compiled, x = torch.compile(block, fullgraph=True, backend="aot_eager"), torch.randn(2, 4, 6, 6).double()
    torch.testing.assert_close(compiled(x), stock(x))
    for model in (block, stock):
        model.bn1.eval()
    torch.testing.assert_close(compiled(x), stock(x))
    assert_same(block.state_dict(), stock.state_dict())


def test_compiled_before_the_swap_sees_it():
    block, stock = pair(lambda: vision.BasicBlock(4, 4).double())
    backend, x = Captured(), torch.randn(2, 4, 6, 6).double()
    compiled = torch.compile(block.eval(), fullgraph=True, backend=backend)
    compiled(x)
    swap(compiled)
    torch.testing.assert_close(compiled(x), stock.eval()(x))
    assert [any("bn_act" in name for name in graph) for graph in backend.graphs] == [False, True]


@pytest.mark.parametrize("cls", ["conv", "basic"])
def test_compiled_hugging_face_layer(cls):
    resnet = hugging_face_resnet()
    block, stock = pair(
        lambda: scramble(resnet.ResNetConvLayer(4, 8) if cls == "conv" else resnet.ResNetBasicLayer(4, 8, 2)).double()
    )
    swap(block)
    backend = Captured()
    x = torch.randn(2, 4, 6, 6).double()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=backend)(x), stock(x))
    assert sum(n for name, n in backend.graphs[0].items() if "bn_act" in name) == (1 if cls == "conv" else 3)


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.full)])
def test_inductor_block(train):
    block, stock = pair(lambda: scramble(vision.Bottleneck(16, 4)))
    swap(block)
    compiled, x = torch.compile(block.train(train), fullgraph=True), torch.randn(2, 16, 8, 8)
    ours = {k.replace("_orig_mod.", ""): t for k, t in step(compiled, x, train=train).items()}
    assert_same(ours, step(stock, x, train=train), tolerance=1e-5)


@pytest.mark.full
def test_inductor_network():
    net, stock = pair(lambda: vision.ResNet(vision.BasicBlock, [1, 1, 1, 1], num_classes=3))
    swap(net)
    compiled, x = torch.compile(net, fullgraph=True), torch.randn(4, 3, 64, 64)
    ours = {k.replace("_orig_mod.", ""): t for k, t in step(compiled, x).items() if k[:4] != "grad"}
    assert_same(ours, {k: t for k, t in step(stock, x).items() if k[:4] != "grad"}, tolerance=1e-3)


# ---- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict):
    net, stock = pair()
    swap(net)
    net.eval()
    stock.eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: batch},), strict=strict)
    found = targets(program.graph)
    assert found["bn_act.default"] == TINY_CALLS and not any("batch_norm" in name for name in found)
    x = images(7)
    torch.testing.assert_close(program.module()(x), stock(x))
    assert set(program.state_dict) == set(stock.state_dict())


def test_export_of_a_reverted_model_is_plain():
    net = tiny().eval()
    report = swap(net)
    report.revert()
    found = targets(torch.export.export(net, (images(),), strict=False).graph)
    assert not any("fastres" in name or "bn_act" in name for name in found)


# ---- torch.fx --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_symbolic_trace(train):
    net, stock = pair()
    swap(net)
    graph = torch.fx.symbolic_trace(net.train(train))
    assert targets(graph.graph)["fused_bn_act"] == TINY_CALLS
    x, twin = images(), copy.deepcopy(graph)
    y = stock.train(train)(x)
    torch.testing.assert_close(graph(x), y)
    torch.testing.assert_close(twin(x), y)
    assert_same(net.state_dict(), stock.state_dict())  # statistics moved through the graph


@pytest.mark.parametrize("name", ["layer1.0", "layer2.1", "stem"])
def test_symbolic_trace_of_one_block(name):
    net, stock = pair()
    swap(net)
    block, plain = net.get_submodule(name), stock.get_submodule(name)
    x = torch.randn(2, {"layer1.0": 8, "layer2.1": 16, "stem": 3}[name], 6, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), plain(x))


def test_row40_feature_extractor():
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    net, stock = pair(lambda: scramble(vision.ResNet(vision.BasicBlock, [1, 1, 1, 1], num_classes=3)).double())
    swap(net)
    nodes = ["maxpool", "layer1", "layer2.0.conv2", "layer4", "avgpool"]
    ours, theirs = (create_feature_extractor(model, nodes) for model in (net, stock))
    x = images(2, 64)
    for train in (True, False):
        with torch.no_grad():
            assert_same(ours.train(train)(x), theirs.train(train)(x))
    assert "layer1.0.fused_bn_act" in get_graph_node_names(net)[0]


def test_pickled_graph_of_a_swapped_model():
    import pickle

    net = tiny().eval()
    swap(net)
    graph = torch.fx.symbolic_trace(net)
    x = images()
    torch.testing.assert_close(pickle.loads(pickle.dumps(graph))(x), net(x))


# ---- nothing hollow --------------------------------------------------------------------------------------------------

STOCK_OPS = ("batch_norm", "aten::relu", "aten::add", "aten::threshold", "native_batch")


def profiled(net, x):
    """(operators of the forward, operators of the backward), as the profiler names them."""
    names = []
    for phase in ("forward", "backward"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            if phase == "forward":
                loss = net(x)
            else:
                loss.backward(torch.ones_like(loss))
        names.append(Counter(event.key for event in trace.key_averages() for _ in range(event.count)))
    return names


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("cls", "inplanes", "planes", "norms"), [("BasicBlock", 8, 8, 2), ("Bottleneck", 16, 4, 3)])
def test_profiler_shows_our_operators_alone(backend, cls, inplanes, planes, norms, train):
    block = getattr(vision, cls)(inplanes, planes).train(train)
    x = torch.randn(2, inplanes, 8, 8, requires_grad=True)
    report = swap(block, backend=backend)
    forward, backward = profiled(block, x)
    assert backward["aten::convolution_backward"] == norms
    if backend == "reference":  # made of eager's own operators
        assert forward["fastres::bn_act"] == norms and backward["fastres::bn_act_backward"] == norms
    else:
        assert forward["fastres::_bn_act_native"] == norms, forward
        assert backward["fastres::_bn_act_backward_native"] == norms, backward
        stock = [name for name in [*forward, *backward] if any(part in name for part in STOCK_OPS)]
        assert set(stock) <= {"aten::add_"}, stock  # gradient accumulation
    report.revert()
    forward, _ = profiled(block, x)
    assert forward["aten::batch_norm"] == norms and not any("fastres" in name for name in forward)


def test_auto_takes_the_native_kernel_where_it_can():
    """Nothing falls to the reference silently: every BN of a network runs in the kernel that `explain` names."""
    net, x = tiny(torch.float32), images(dtype=torch.float32)
    swap(net)
    explanation = fastres.explain("bn_act", x)
    forward, backward = profiled(net, x)
    native = explanation.chosen == "cpu"
    assert native == (not explanation.refusals["cpu"])
    names = ("_bn_act_native", "_bn_act_backward_native") if native else ("bn_act", "bn_act_backward")
    assert forward[f"fastres::{names[0]}"] == backward[f"fastres::{names[1]}"] == TINY_CALLS


def test_add_relu_module_calls_its_operator():
    with Ops() as ops:
        fastres.nn.AddReLU()(torch.ones(3), torch.ones(3))
    assert ops["fastres::add_relu"] == 1 and isinstance(fastres.nn.AddReLU(), nn.Module)
