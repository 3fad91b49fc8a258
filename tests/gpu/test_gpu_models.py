"""Swap, freeze and torch.compile on a GPU: small networks of torchvision, timm and Hugging Face, by the referee.

Training is judged block by block, forward and backward, and by the network's outputs and statistics: over a whole
network two right answers differ wherever rounding decides a ReLU's mask.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastres
from gpu_device import DEVICE, DRY, captured, late_on_another_stream, needs_device, needs_gpus, on_gpu_alone
from measure import Meter
from swap_cases import fused_calls, hugging_face_resnet, scramble, torchvision

pytestmark = [pytest.mark.gpu, needs_device]
resnet = torchvision.models.resnet
LAYOUTS = {"nhwc": torch.channels_last} | ({} if DRY else {"nchw": torch.contiguous_format})
CAST = (torch.bfloat16,) if DRY else (torch.bfloat16, torch.float16)
SIZE = 32 if DRY else 96
COMPILER = "aot_eager" if DRY else "inductor"  # the second compiles half a minute on a CPU


def timm_network():
    return pytest.importorskip("timm").create_model("resnet10t", num_classes=7)


def hugging_face_network():
    library = hugging_face_resnet()
    config = library.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], num_labels=7, layer_type="basic"
    )
    return Logits(library.ResNetForImageClassification(config))


class Logits(nn.Module):
    """The logits alone of a Hugging Face model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


NETWORKS = {
    "torchvision-basic": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=7),
    "torchvision-bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=7),
    "timm": timm_network,
    "hugging face": hugging_face_network,
}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def build(name, layout="nhwc"):
    torch.manual_seed(0)
    return scramble(NETWORKS[name]()).to(DEVICE, memory_format=LAYOUTS[layout])


def images(n=4, layout="nhwc"):
    return torch.randn(n, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=LAYOUTS[layout])


def swapped(stock, memory="default"):
    net = copy.deepcopy(stock)
    fastres.swap(net, strict=True, memory=memory)
    return net


class Autocast(nn.Module):
    def __init__(self, module, dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x):
        with torch.autocast(DEVICE.type, self.dtype):
            y = self.module(x)
        return y if y.dtype is torch.float64 else y.float()


def bottleneck():
    torch.manual_seed(0)
    block = nn.Sequential(resnet.Bottleneck(64, 16), resnet.BasicBlock(64, 64))
    return scramble(block).to(DEVICE, memory_format=torch.channels_last)


# ---- training --------------------------------------------------------------------------------------------------------


@every_layout
@every_network
def test_swapped_training_is_as_good_as_eager(name, layout):
    stock, x = build(name, layout), images(layout=layout)
    net = copy.deepcopy(stock)
    report = fastres.swap(net, verify=x, strict=True)  # every block, forward and backward, on its real inputs
    assert {row.status for row in report.rows} == {"swapped"}, str(report)
    for training in (True, False):
        verdict = fastres.verify(stock, net, x, training=training, backward=False)
        assert verdict, str(verdict)


@every_network
def test_every_batch_norm_is_ours(name):
    stock, x = build(name), images()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in stock.modules())
    assert fused_calls(swapped(stock).train(), x) == norms
    if not DRY:
        assert fastres.explain("bn_act", x).chosen in ("triton", "cuda")


@pytest.mark.parametrize("dtype", CAST)
@every_network
def test_autocast_is_as_good_as_eager(name, dtype):
    stock = build(name)
    verdict = fastres.verify(
        Autocast(stock, dtype), Autocast(swapped(stock), dtype), images(), training=True, backward=False
    )
    assert verdict, str(verdict)


@pytest.mark.parametrize("dtype", CAST)
def test_training_under_autocast_learns_as_eager_does(dtype):
    """A scaler's loss scale, clipped gradients and 24 steps on one batch: both learn it, at the same pace."""
    stock = build("torchvision-basic")
    x, labels, losses = images(8), torch.arange(8, device=DEVICE) % 7, []
    for net in (stock, swapped(stock)):
        scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype is torch.float16)
        optimizer = torch.optim.SGD(net.train().parameters(), lr=0.02, momentum=0.9)
        for _ in range(24):
            optimizer.zero_grad()
            loss = F.cross_entropy(Autocast(net, dtype)(x), labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
        assert all(p.isfinite().all() for p in net.parameters())
    assert losses[1] < 0.7 and abs(losses[1] - losses[0]) < 0.2, losses


def test_row45_twenty_training_steps_of_blocks_are_bitwise_equal(deterministic):
    block, x = swapped(bottleneck()), torch.randn(8, 64, 28, 28, device=DEVICE).to(memory_format=torch.channels_last)
    dy, first = torch.randn_like(x), None
    state = copy.deepcopy(block.state_dict())
    for _ in range(20):
        block.load_state_dict(state)
        leaf = x.clone().requires_grad_()
        y = block(leaf)
        grads = torch.autograd.grad(y, (leaf, *block.parameters()), dy)
        results = [y.detach(), *grads, *block.state_dict().values()]
        first = first or [t.clone() for t in results]
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@every_layout
@pytest.mark.parametrize("name", ["torchvision-bottleneck", "hugging face"])
def test_memory_min_is_the_default_in_less_memory(name, layout, deterministic):
    stock, x, found = build(name, layout), images(8, layout), {}
    for memory in ("default", "min"):
        net = swapped(stock, memory).train()
        meter = Meter(DEVICE)
        loss = net(x).square().mean()
        kept, _ = meter.end()
        loss.backward()
        found[memory] = kept, [p.grad for p in net.parameters()], list(net.state_dict().values())
    (kept, *default), (kept_min, *least) = found["default"], found["min"]
    assert kept_min < 0.75 * kept
    for a, b in zip(default, least, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


# ---- streams, graphs, devices ----------------------------------------------------------------------------------------


@on_gpu_alone
def test_row30_a_block_runs_on_the_current_stream():
    block, x = swapped(bottleneck()).eval(), torch.randn(32, 64, 28, 28, device=DEVICE)
    with torch.no_grad():
        wanted, y = block(x), late_on_another_stream(x, block)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@on_gpu_alone
@pytest.mark.parametrize("memory", ["default", "min"])
def test_a_whole_training_step_is_captured_and_replayed_a_hundred_times(memory):
    """Forward, loss, backward and optimizer in one graph; the same steps run eagerly give the same losses."""
    stock = build("torchvision-basic")
    batches = [(images(8), torch.randint(7, (8,), device=DEVICE)) for _ in range(4)]
    losses = []
    for in_a_graph in (True, False):
        net = swapped(stock, memory).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        x, labels = (t.clone() for t in batches[0])

        def step(net=net, optimizer=optimizer, x=x, labels=labels):
            optimizer.zero_grad(set_to_none=False)
            loss = F.cross_entropy(net(x), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        if in_a_graph:
            graph, loss = captured(step, warm_up=3)
        else:
            _ = [step() for _ in range(3)]
        run = []
        for i in range(100):
            x.copy_(batches[i % 4][0])
            labels.copy_(batches[i % 4][1])
            if in_a_graph:
                graph.replay()
            else:
                loss = step()
            run.append(loss.item())
        losses.append(run)
        tracked = [m.num_batches_tracked.item() for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        assert set(tracked) == {103}
    ours, theirs = torch.tensor(losses)
    assert ours.isfinite().all() and len(set(losses[0])) > 90  # another loss each time: it learns
    # the same kernels in the same order; convolutions' gradients may sum in another
    torch.testing.assert_close(ours[:4], theirs[:4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[-4:].mean(), theirs[-4:].mean(), rtol=0.1, atol=0.02)


@needs_gpus(2)
def test_row28_a_tensor_on_another_gpu_than_the_current_one():
    block = bottleneck().to("cuda:1")
    x = torch.randn(4, 64, 14, 14, device="cuda:1")
    with torch.cuda.device(0), torch.no_grad():
        torch.testing.assert_close(swapped(block).eval()(x), block.eval()(x), rtol=1e-4, atol=1e-4)


# ---- freeze ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, *CAST))
@every_network
def test_frozen_is_as_good_as_eager(name, dtype):
    """freeze raises where its referee rejects; other batch sizes, and a hundred replays, are the same function."""
    net, x = build(name).eval(), images()
    fast = fastres.freeze(net, x, dtype=dtype, tune=False, cuda_graph="auto" if DRY else True)
    assert fast.report.verification and fast.report.folded > 0, fast.report
    assert DRY or fast.report.cuda_graph.startswith("on")
    plain = copy.deepcopy(fast)  # graphs belong to one model: the copy has none
    for i in range(2 if DRY else 100):
        other = images()
        if i % 25 in (0, 1):
            torch.testing.assert_close(fast(other), plain(other), rtol=1e-2, atol=1e-2)
        else:
            fast(other)
    for n in (1, 3):
        few = images(n)
        with torch.no_grad():
            wanted = net(few)
        error = (fast(few).float() - wanted).abs().max() / wanted.abs().max()
        assert error < (1e-2 if dtype is torch.float32 else 0.1), f"batch {n}: {error:.1e}"


def test_frozen_beside_the_referee_at_another_batch():
    net = build("torchvision-bottleneck").eval()
    fast = fastres.freeze(net, images(), dtype=CAST[-1], tune=False)
    verdict = fastres.verify(net, fast, images(7), training=False, backward=False, dtype=CAST[-1])
    assert verdict, str(verdict)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@every_network
def test_compiled_inference_is_as_good_as_eager(name, fresh_compiler):
    stock, x = build(name).eval(), images()
    compiled = torch.compile(swapped(stock), fullgraph=True, backend=COMPILER)
    with torch.no_grad():
        y = compiled(x)
    verdict = fastres.verify(stock, lambda _: y, x, training=False, backward=False, calibrate_bn=False)
    assert verdict, str(verdict)


def test_compiled_training_of_blocks_is_as_good_as_eager(fresh_compiler):
    """Outputs, gradients and statistics of one step, each beside eager's error against fp64."""
    stock = bottleneck()
    x = torch.randn(8, 64, 14, 14, device=DEVICE).contiguous(memory_format=torch.channels_last)
    dy, found = torch.randn_like(x), {}
    for kind in ("exact", "eager", "ours"):
        net = copy.deepcopy(stock).double() if kind == "exact" else copy.deepcopy(stock)
        run = torch.compile(swapped(net), fullgraph=True, backend=COMPILER) if kind == "ours" else net
        leaf = x.to(next(net.parameters()).dtype).detach().requires_grad_()
        y = run(leaf)
        grads = torch.autograd.grad(y, (leaf, *run.parameters()), dy.to(y.dtype))
        states = [t for t in run.state_dict().values() if t.is_floating_point()]
        found[kind] = [y.detach(), *grads, *states]
    for ours, eager, exact in zip(found["ours"], found["eager"], found["exact"], strict=True):
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (ours, eager))
        floor = 4 * torch.finfo(torch.float32).eps * exact.square().mean().sqrt()
        assert error <= 2 * allowed + floor, f"{tuple(exact.shape)}: {error:.2e}, eager {allowed:.2e}"
