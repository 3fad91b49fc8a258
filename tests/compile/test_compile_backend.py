"""torch.compile(model, backend="fastres"): what is fused, what passes through, and what is said of it."""

import logging
import subprocess
import sys
import warnings
from collections import Counter
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn
from torch._dynamo import register_backend
from torch._dynamo.utils import counters
from torch.nn import functional as F

import fastres
from compile_cases import CONV, COUNTING, Net, agree, close, compiled, first, images, net, resnet18, seen
from fastres import compile as backend
from swap_cases import scramble


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    seen.clear()
    backend._warned.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def lines(caplog):
    """What the logger `fastres` says of compilations."""
    caplog.set_level(logging.INFO, logger="fastres")
    return lambda: [record.getMessage() for record in caplog.records if record.getMessage().startswith("compile:")]


# ---- the entry point -------------------------------------------------------------------------------------------------


def test_dynamo_finds_the_backend_by_its_name():
    (entry,) = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "fastres"]
    assert entry.value == "fastres.compile:backend" and entry.load() is fastres.compile.backend
    assert "fastres" in torch._dynamo.list_backends()


def test_importing_the_backend_is_light():
    code = """
import sys, torch, torch._dynamo
before = set(sys.modules)
import fastres.compile
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}), "torch._inductor.compile_fx" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    *roots, inductor = run.stdout.split()
    assert run.returncode == 0 and inductor == "False", run.stderr
    assert {"fastres"} <= set(roots)
    assert not {"triton", "torchvision", "timm", "transformers", "onnx"} & set(roots)


# ---- forward ---------------------------------------------------------------------------------------------------------


def within_conv_act(event):
    return event is not None and (event.name == "fastres::conv_act" or within_conv_act(event.cpu_parent))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_resnet18_is_20_calls_of_conv_act(layout):
    """In the graph and by the profiler: no convolution, BN, ReLU or sum of images is outside the fused operators."""
    model, x = resnet18().to(memory_format=layout), torch.randn(2, 3, 32, 32).contiguous(memory_format=layout)
    fast = agree(model, x, fullgraph=True)
    assert all(graph[CONV] == 20 for graph in seen)
    assert not any(word in name for graph in seen for name in graph for word in ("batch_norm", "relu", "convolution"))
    with torch.no_grad(), torch.profiler.profile() as profile:
        fast(x)
    assert sum(event.name == "fastres::conv_act" for event in profile.events()) == 20
    names = {event.name for event in profile.events() if not within_conv_act(event)}
    assert not names & {f"aten::{name}" for name in ("conv2d", "convolution", "batch_norm", "relu", "relu_", "add_")}
    assert fastres.verify(model, fast, x, backward=False, training=False)


def test_every_batch_size_with_at_most_two_compilations(lines):
    model = resnet18()
    fast = compiled(model, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5, 1, 4, 3):
            x = torch.randn(batch, 3, 32, 32)
            close(fast(x), model(x))
    assert counters["stats"]["unique_graphs"] <= 3  # a batch of 1 has one of its own
    assert lines() and all("(17 act, 8 add, 20 bn, 20 conv)" in line for line in lines())


@pytest.mark.parametrize("dynamic", ["marked", True, False])
def test_dynamic_shapes(dynamic):
    model, x = net(), images.clone()
    if dynamic == "marked":
        torch._dynamo.mark_dynamic(x, 0)
    fast = compiled(model, dynamic=None if dynamic == "marked" else dynamic)
    with torch.no_grad():
        for batch in (2, 7, 3):
            x = x if batch == 2 else torch.randn(batch, 3, 8, 8)
            close(fast(x), model(x))
        assert counters["stats"]["unique_graphs"] == (1 if dynamic else 3)
        x = torch.randn(3, 3, 9, 9)
        close(fast(x), model(x))
    assert all(graph[CONV] == 2 for graph in seen)


def outputs(self, x):
    y = self.bn(self.conv(x))
    z = F.relu(y)
    return z, z.clone(), y, y.flatten(1), x


def test_outputs_have_eager_strides_and_memory_of_their_own():
    fast = agree(net(outputs), images)
    with torch.no_grad():
        z, copied, *_ = fast(images)
    assert z.data_ptr() != copied.data_ptr()
    for forward in (first, lambda self, x: first(self, x).permute(0, 2, 3, 1)):
        agree(net(forward), images)
    assert all(graph[CONV] == 1 for graph in seen)


@pytest.mark.parametrize("strides", ["channels_last", "transposed", "expanded", "slice"])
def test_inputs_of_any_strides(strides):
    x = {
        "channels_last": images.contiguous(memory_format=torch.channels_last),
        "transposed": images.transpose(2, 3),
        "expanded": images[:1, :1].expand(2, 3, 8, 8),
        "slice": torch.randn(2, 3, 16, 8)[:, :, ::2],
    }[strides]
    fast = compiled(net(first))
    with torch.no_grad():
        for _ in range(2):
            close(fast(x), fast._orig_mod(x))
    assert seen[0][CONV] == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float64, 1e-12)])
def test_dtypes(dtype, tolerance):
    agree(net().to(dtype), images.to(dtype), COUNTING, tolerance)
    assert seen[0][CONV] == 2


def test_inference_mode():
    model = net()
    fast = compiled(model)
    with torch.inference_mode():
        y = fast(images)
        assert y.is_inference() and seen[0][CONV] == 2
        close(y, model(images))
        model.bn.running_mean.add_(1)
        close(fast(images), model(images))


def autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = first(self, x)
        with torch.autocast("cpu", enabled=False):
            return self.fc(self.conv2(y.float()).mean((2, 3)))


@pytest.mark.parametrize("forward", [None, autocast], ids=["around", "inside, and off again"])
def test_autocast(forward):
    model = net(forward)
    fast = compiled(model)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            got = fast(images)
            close(got, model(images), 0.05)
        assert seen[0][CONV] >= 1 and got.dtype is (torch.bfloat16 if forward is None else torch.float32)
        close(fast(images), model(images), 0.05 if forward else 1e-5)  # compiled again without


def test_nan_passes():
    model, x = net(), images.clone()
    fast = agree(model, images)
    x[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        got = fast(x)
        close(got, model(x))
    assert got[0].isnan().any() and not got[1].isnan().any()


def test_graph_breaks_make_several_graphs(lines):
    def broken(self, x):
        y = first(self, x)
        torch._dynamo.graph_break()
        return F.relu(self.bn2(self.conv2(y)) + y)

    agree(net(broken), images)
    assert sum("1 bn, 1 conv" in line for line in lines()) == 2


def test_what_else_a_forward_may_hold():
    def constants(self, x):
        return first(self, x) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1) + torch.arange(8.0)

    def sizes(self, x):
        y = first(self, x)
        return y.view(x.shape[0], -1), F.interpolate(y, size=x.shape[-1] * 2)

    def random(self, x):
        return F.dropout(first(self, x), 0.5, True) * 0

    def attention(self, x):
        y = first(self, x).flatten(2)
        return F.scaled_dot_product_attention(y, y, y)

    for forward in (constants, sizes, random, attention):
        agree(net(forward), images, dynamic=forward is sizes)
    assert all(graph[CONV] == 1 for graph in seen), seen


def test_norms_and_sums_without_a_convolution_are_fused(lines):
    def alone(self, x):
        y = self.conv(x)
        norm, pooled = F.relu(self.bn(y)) + y, F.relu(self.bn2(F.avg_pool2d(y, 2)))
        return norm, pooled, F.relu(x + x.flip(-1)), self.bn(self.conv(x))

    agree(net(alone), images)
    (graph,) = seen
    assert (graph["fastres.bn_act.default"], graph["fastres.add_relu.default"]) == (2, 1)
    assert "1 add_relu" in lines()[0] and "2 norm" in lines()[0]


def test_inputs_that_are_written_to():
    def writes(self, x):
        x.add_(1)
        return first(self, x)

    model, x, y = net(writes), images.clone(), images.clone()
    with torch.no_grad():
        close(compiled(model)(x), model(y))
    assert torch.equal(x, y) and seen[0][CONV] == 1


# ---- what passes through ---------------------------------------------------------------------------------------------


def test_training_passes_through_with_one_line(lines):
    fast, stock = compiled(Net().train()), Net().train()
    stock.load_state_dict(fast._orig_mod.state_dict())
    for model in (fast, stock):
        model(images).square().sum().backward()
    assert len(lines()) == 1 and "gradients" in lines()[0]
    assert not any("fastres" in name for name in seen[0])
    for (name, p), q in zip(stock.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_backbone_without_gradients_under_a_head_with_them(lines):
    def frozen_backbone(self, x):
        with torch.no_grad():
            y = first(self, x)
        return self.fc(y.mean((2, 3)))

    model = net(frozen_backbone)
    y = compiled(model)(images)
    assert y.requires_grad and len(lines()) == 1
    y.sum().backward()
    assert model.fc.weight.grad is not None and model.conv.weight.grad is None


def test_a_forward_without_gradients_is_fused_whoever_calls_it():
    model = net(torch.no_grad()(first))
    close(compiled(model)(images), model(images))
    assert seen[0][CONV] == 1


def test_networks_without_convolutions_are_left_alone(lines):
    agree(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)).eval(), torch.randn(2, 4))
    assert seen and not lines()


def test_regions_that_are_not_looked_into_pass_through(lines):
    def branches(self, x):
        return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (first(self, x),))

    agree(net(branches), images)
    assert len(lines()) == 1 and "as it is" in lines()[0]


def test_a_fault_in_the_rewriting_is_one_warning_and_the_graph_as_it_is(monkeypatch, lines):
    def fault(*args):
        raise KeyError("planted")

    monkeypatch.setattr(backend, "fuse", fault)  # no network is known to raise it
    for _ in range(2):
        agree(net(), images)
        torch._dynamo.reset()
    assert sum("KeyError: 'planted'" in line for line in lines()) == 1
    assert all(not any("fastres" in name for name in graph) for graph in seen)


def test_a_compiler_that_fails_on_the_fused_graph_gets_the_graph_as_it_is(lines):
    @register_backend(name="fastres_picky")
    def picky(module, inputs):
        if any("fastres" in str(node.target) for node in module.graph.nodes):
            raise NotImplementedError("planted")
        return module

    agree(net(), images, {"inner": "fastres_picky"})
    assert "NotImplementedError: planted" in lines()[-1]


def test_options():
    for options, message in (
        ({"inner": "nothing"}, "inner: got 'nothing', expected one of"),
        ({"inner": "fastres"}, "inner: got 'fastres', expected one of"),
        ({"inner": "aot_eager", "max_autotune": True}, "settings of Inductor"),
    ):
        with pytest.raises(Exception, match=message), torch.no_grad():
            compiled(net(), options)(images)


def test_switched_off_operators_still_answer(settings):
    settings(FASTRES_DISABLE="all")
    agree(net(), images)
    assert seen[0][CONV] == 2


# ---- Inductor --------------------------------------------------------------------------------------------------------


MODES = [{}, pytest.param({"mode": "max-autotune-no-cudagraphs"}, marks=pytest.mark.full)]


@pytest.mark.parametrize("settings", MODES, ids=["default", "mode"])
def test_inductor_runs_the_fused_operators(settings):
    def mixed(self, x):
        y = torch.sigmoid(first(self, x)) * 2 + x.mean(1, keepdim=True)
        return F.relu(self.bn2(self.conv2(y)) + y) * 3

    model = net(mixed)
    fast = agree(model, images, None, **settings)
    with torch.no_grad(), torch.profiler.profile() as profile:
        close(fast(images), model(images))
    assert Counter(event.name for event in profile.events())["fastres::conv_act"] == 2
    with torch.no_grad():
        for change in (lambda: model.bn.weight.data.mul_(2), lambda: model.conv.weight.data.neg_()):
            change()
            close(fast(images), model(images))


@pytest.mark.full
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision(name):
    torchvision = pytest.importorskip("torchvision")
    model = scramble(getattr(torchvision.models, name)(weights=None)).eval()
    x = torch.randn(2, 3, 64, 64)
    for options in (COUNTING, None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = compiled(model, options)
            with torch.no_grad():
                fast(x)
        assert fastres.verify(model, fast, x, backward=False, training=False), name
