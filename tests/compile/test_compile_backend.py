"""torch.compile(model, backend="fastres"): what is fused, what passes through, and weights that change afterwards.

`aot_eager` stands in for Inductor where only the graph matters: it runs every operator as it is, and compiles no C++.
"""

import copy
import gc
import logging
import subprocess
import sys
import threading
import warnings
from collections import Counter
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn
from torch._dynamo import register_backend
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastres
from fastres.compile import rewrite
from fastres.compile.folds import Folds

seen = []  # the graphs that the compiler behind the backend was given, as counts of their operators


@register_backend(name="fastres_test")
def _compiler(module, inputs):
    seen.append(Counter(str(n.target) for n in module.graph.nodes if n.op == "call_function"))
    return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


BEHIND = {"inner": "fastres_test"}
WAYS = pytest.mark.parametrize("options", [BEHIND, None], ids=["compiler", "packed"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    seen.clear()
    rewrite._warned.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def lines(caplog):
    """What the logger `fastres` says of compilations."""
    caplog.set_level(logging.INFO, logger="fastres")
    return lambda: [record.getMessage() for record in caplog.records if record.getMessage().startswith("compile:")]


def settle(net):
    """Eval mode, statistics and affine parameters that are not the initial ones."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


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
    return settle(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)))


def compiled(net, options=BEHIND, **settings):
    return torch.compile(net, backend="fastres", options=options, **settings)


def close(got, want, tolerance=1e-5):
    got, want = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (got, want))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def agree(net, x, options=BEHIND, tolerance=1e-5, **settings):
    """Compiles, compares twice with eager without gradients, and returns what was compiled."""
    fast = compiled(net, options, **settings)
    with torch.no_grad():
        for _ in range(2):
            close(fast(x.clone()), net(x.clone()), tolerance)
    return fast


images = torch.randn(2, 3, 8, 8)


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


def test_a_resnet18_is_20_calls_of_conv_act():
    net, x = resnet18(), torch.randn(2, 3, 32, 32)
    fast = compiled(net, fullgraph=True)
    with torch.no_grad():
        close(fast(x), net(x))
    (graph,) = seen
    assert graph["fastres.conv_act.default"] == 20
    assert not any(word in name for name in graph for word in ("batch_norm", "relu", "aten.add.", "convolution"))
    assert fastres.verify(net, fast, x, backward=False, training=False)


@WAYS
def test_every_batch_size_with_at_most_two_compilations(options, lines):
    net = resnet18()
    fast = compiled(net, options, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5, 1, 4, 3):
            x = torch.randn(batch, 3, 32, 32)
            close(fast(x), net(x))
    assert counters["stats"]["unique_graphs"] <= 3  # a batch of 1 has one of its own
    assert all("8 add, 20 bn, 20 conv" in line for line in lines())


def test_a_batch_marked_dynamic_compiles_once():
    net, x = settle(Net()), images.clone()
    torch._dynamo.mark_dynamic(x, 0)
    fast = compiled(net, None)
    with torch.no_grad():
        close(fast(x), net(x))
        for batch in (7, 3):
            close(fast(torch.ones(batch, 3, 8, 8)), net(torch.ones(batch, 3, 8, 8)))
    assert counters["stats"]["unique_graphs"] == 1


@WAYS
@pytest.mark.parametrize("dynamic", [True, False])
def test_dynamic_shapes(options, dynamic):
    fast = agree(settle(Net()), images, options, dynamic=dynamic)
    agree(settle(Net()), torch.randn(3, 3, 9, 9), options, dynamic=dynamic)
    assert isinstance(fast, torch._dynamo.OptimizedModule)


@WAYS
def test_channels_last(options):
    net, x = resnet18(), torch.randn(2, 3, 32, 32)
    agree(net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last), options)
    assert all(graph["fastres.conv_act.default"] == 20 for graph in seen)


def test_outputs_have_eager_strides_and_memory_of_their_own():
    def outputs(self, x):
        y = self.bn(self.conv(x))
        z = F.relu(y)
        return z, z.clone(), y, y.flatten(1), x

    z, copied, *_ = agree(settle(Net(outputs)), images)(images)
    assert z.data_ptr() != copied.data_ptr()
    agree(settle(Net(lambda self, x: first(self, x).permute(0, 2, 3, 1))), images)


@WAYS
def test_feature_maps_have_eager_strides(options):
    agree(settle(Net(first)), images, options)


@WAYS
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float64, 1e-12)])
def test_dtypes(options, dtype, tolerance):
    agree(settle(Net()).to(dtype), images.to(dtype), options, tolerance)


@WAYS
def test_inference_mode(options):
    net = settle(Net())
    fast = compiled(net, options)
    with torch.inference_mode():
        y = fast(images)
        assert y.is_inference() and seen == ([] if options is None else seen)
        close(y, net(images))
        net.bn.running_mean.add_(1)
        close(fast(images), net(images))


def test_autocast():
    net = settle(Net())
    fast = compiled(net)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            got, want = fast(images), net(images)
        close(got, want, 0.05)
        assert got.dtype is torch.bfloat16
        close(fast(images), net(images))  # and compiled again without


def test_a_nested_autocast_that_is_off_stays_off():
    def nested(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = first(self, x)
            with torch.autocast("cpu", enabled=False):
                return self.fc(self.conv2(y.float()).mean((2, 3)))

    net = settle(Net(nested))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        close(compiled(net)(images), net(images), 0.05)


@WAYS
def test_nan_passes(options):
    net = settle(Net())
    fast = agree(net, images, options)
    x = images.clone()
    x[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        got, want = fast(x), net(x)
    assert got[0].isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True)


@WAYS
def test_graph_breaks_make_several_graphs(options, lines):
    def broken(self, x):
        y = first(self, x)
        torch._dynamo.graph_break()
        return F.relu(self.bn2(self.conv2(y)) + y)

    agree(settle(Net(broken)), images, options)
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
        agree(settle(Net(forward)), images, dynamic=forward is sizes)
    for count in seen:
        assert count["fastres.conv_act.default"] == 1, count


def test_norms_and_sums_without_a_convolution_are_fused():
    def alone(self, x):
        y = self.conv(x)
        return (
            F.relu(self.bn(y)) + y,
            F.relu(self.bn2(F.avg_pool2d(y, 2))),
            F.relu(x + x.flip(-1)),
            self.bn(self.conv(x)),
        )

    agree(settle(Net(alone)), images)
    (graph,) = seen
    assert (graph["fastres.bn_act.default"], graph["fastres.add_relu.default"]) == (2, 1)


def test_weight_norm_and_other_computed_weights():
    net = settle(Net())
    nn.utils.parametrizations.weight_norm(net.conv)
    for options in (BEHIND, None):
        agree(net, images, options)


def test_inputs_that_are_written_to():
    def writes(self, x):
        x.add_(1)
        return first(self, x)

    net, x, y = settle(Net(writes)), images.clone(), images.clone()
    with torch.no_grad():
        close(compiled(net)(x), net(y))
    assert torch.equal(x, y)
    assert seen[0]["fastres.conv_act.default"] == 1


def test_norms_in_training_mode_stay_and_move_their_statistics():
    net = settle(Net())
    net.bn2.train()
    other = copy.deepcopy(net)
    fast = compiled(net, None, **{})
    with torch.no_grad():
        for _ in range(2):
            close(fast(images), other(images))
    for name, t in other.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], t)


# ---- backward: passed through ----------------------------------------------------------------------------------------


def test_training_passes_through_with_one_line(lines):
    net, stock = Net().train(), None
    stock = copy.deepcopy(net)
    fast = compiled(net)
    for model in (fast, stock):
        model(images).square().sum().backward()
    assert len(lines()) == 1 and "gradients" in lines()[0]
    assert not any("fastres" in name for name in seen[0])
    for (name, p), (_, q) in zip(net.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_backbone_without_gradients_under_a_head_with_them(lines):
    def frozen_backbone(self, x):
        with torch.no_grad():
            y = first(self, x)
        return self.fc(y.mean((2, 3)))

    net = settle(Net(frozen_backbone))
    y = compiled(net)(images)
    assert y.requires_grad and len(lines()) == 1
    y.sum().backward()
    assert net.fc.weight.grad is not None and net.conv.weight.grad is None


def test_a_forward_without_gradients_is_fused_whoever_calls_it():
    @torch.no_grad()
    def forward(self, x):
        return first(self, x)

    net = settle(Net(forward))
    close(compiled(net)(images), net(images))
    assert seen[0]["fastres.conv_act.default"] == 1


# ---- weights that change ---------------------------------------------------------------------------------------------


def step(net):
    net.train()
    net(images).square().sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    net.zero_grad()
    net.eval()


def load(net):
    net.load_state_dict(settle(Net()).state_dict())


def assign(net):
    net.load_state_dict(settle(Net()).state_dict(), assign=True)


def average(net):
    other = settle(Net())
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    averaged.update_parameters(other)
    net.load_state_dict(averaged.module.state_dict())


def through_data(net):
    for p in net.parameters():
        p.data.mul_(0.5).add_(0.01)


def statistics(net):
    net.bn.running_mean.add_(1)


def replace(net):
    net.conv.weight = nn.Parameter(torch.randn_like(net.conv.weight))


def set_data(net):
    net.conv2.weight.data = torch.randn_like(net.conv2.weight)


@WAYS
@pytest.mark.parametrize("change", [step, load, assign, average, through_data, statistics, replace, set_data])
def test_changed_weights_are_followed(options, change):
    torch.manual_seed(1)
    net = settle(Net())
    fast = agree(net, images, options)
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        old = fast(images)
    change(net)
    with torch.no_grad():
        for _ in range(2):
            close(fast(images), net(images), 1e-4)
        assert not torch.allclose(fast(images), old, atol=1e-3)
    assert counters["stats"]["unique_graphs"] <= before + (2 if change is step else 0)


@WAYS
def test_weights_that_no_longer_fold_run_as_they_are(options):
    net = settle(Net())
    fast = agree(net, images, options)
    with torch.no_grad():
        net.bn.running_var.fill_(-1)
        got, want = fast(images), net(images)
        torch.testing.assert_close(got, want, equal_nan=True)
        assert got.isnan().all()
        net.bn.running_var.fill_(2)
        close(fast(images), net(images))


@WAYS
def test_a_network_that_never_folds_is_fused_without(options, lines):
    net = settle(Net())
    net.bn.running_var.fill_(-1)
    fast = compiled(net, options)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), net(images), equal_nan=True)
        net.bn.running_var.fill_(2)
        close(fast(images), net(images))
    assert "1 bn" in lines()[0] and "1 norm" in lines()[0]


@WAYS
def test_models_of_one_class_share_a_graph_and_keep_their_own_weights(options, monkeypatch):
    nets = [settle(Net()) for _ in range(3)]
    fast = [compiled(net, options) for net in nets]
    made = []
    monkeypatch.setattr(Folds, "put", lambda self, *args, put=Folds.put: made.append(self) or put(self, *args))
    with torch.no_grad():
        for _ in range(3):
            for one, net in zip(fast, nets, strict=True):
                close(one(images), net(images))
    assert len(made) == 3
    if len(set(map(id, made))) == 1:
        folds = made[0]
        assert len(folds) == 3
        del one, net, fast[0], nets[0]
        gc.collect()
        assert len(folds) == 2


def test_a_deep_copy_has_its_own_weights():
    net = settle(Net())
    fast = agree(net, images, None)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        net.bn.bias.add_(1)
        close(fast(images), net(images))
        close(other(images), other._orig_mod(images))
        assert not torch.allclose(fast(images), other(images), atol=1e-3)


def test_compiled_graphs_keep_no_model_alive():
    net = settle(Net())
    fast, weight = agree(net, images, None), net.conv.weight
    held = gc.get_referrers(weight)
    del held
    import weakref

    gone = weakref.ref(net)
    del net, fast, weight
    gc.collect()
    assert gone() is None


def test_threads():
    net = settle(Net())
    fast = agree(net, images, None)
    xs = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    with torch.no_grad():
        wants = [net(x) for x in xs]
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


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_networks_without_convolutions_are_left_alone(lines):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)).eval()
    agree(net, torch.randn(2, 4))
    assert seen and not lines()


def test_regions_that_are_not_looked_into_pass_through(lines):
    def branches(self, x):
        return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (first(self, x),))

    agree(settle(Net(branches)), images)
    assert len(lines()) == 1 and "as it is" in lines()[0]


def test_a_fault_in_the_rewriting_is_one_warning_and_the_graph_as_it_is(monkeypatch, lines):
    def fault(*args):
        raise KeyError("planted")

    monkeypatch.setattr(rewrite, "fuse", fault)
    for _ in range(2):
        agree(settle(Net()), images)
        torch._dynamo.reset()
    assert sum("KeyError: 'planted'" in line for line in lines()) == 1
    assert all(not any("fastres" in name for name in graph) for graph in seen)


def test_a_compiler_that_fails_on_the_fused_graph_gets_the_graph_as_it_is(lines):
    @register_backend(name="fastres_picky")
    def picky(module, inputs):
        if any("fastres" in str(node.target) for node in module.graph.nodes):
            raise NotImplementedError("planted")
        return module

    agree(settle(Net()), images, {"inner": "fastres_picky"})
    assert "NotImplementedError: planted" in lines()[-1]


def test_options():
    net = settle(Net())
    for options, message in (
        ({"inner": "nothing"}, "inner: got 'nothing', expected one of"),
        ({"inner": "fastres"}, "inner: got 'fastres', expected one of"),
        ({"inner": "aot_eager", "max_autotune": True}, "settings of Inductor"),
    ):
        with pytest.raises(Exception, match=message), torch.no_grad():
            compiled(net, options)(images)


def test_switched_off_operators_still_answer(settings):
    settings(FASTRES_DISABLE="all")
    agree(settle(Net()), images)
    agree(settle(Net()), images, None)


# ---- Inductor --------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("settings", [{}, {"mode": "max-autotune-no-cudagraphs"}], ids=["default", "mode"])
def test_inductor_runs_the_fused_operators(settings):
    def mixed(self, x):
        y = torch.sigmoid(first(self, x)) * 2 + x.mean(1, keepdim=True)
        return F.relu(self.bn2(self.conv2(y)) + y) * 3

    net = settle(Net(mixed))
    fast = agree(net, images, {"inner": "inductor"}, **settings) if not settings else compiled(net, None, **settings)
    with torch.no_grad(), torch.profiler.profile() as profile:
        close(fast(images), net(images))
    names = Counter(event.name for event in profile.events())
    assert names["fastres::conv_act"] == 2
    with torch.no_grad():
        for batch in (3, 4):
            x = torch.randn(batch, 3, 8, 8)
            close(fast(x), net(x))
        step_like = net.bn.weight.mul_(2)
        assert step_like is net.bn.weight
        close(fast(images), net(images))


@pytest.mark.full
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision(name):
    torchvision = pytest.importorskip("torchvision")
    net = settle(getattr(torchvision.models, name)(weights=None))
    x = torch.randn(2, 3, 64, 64)
    for options in (BEHIND, None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = compiled(net, options)
            with torch.no_grad():
                fast(x)
        assert fastres.verify(net, fast, x, backward=False, training=False), name
