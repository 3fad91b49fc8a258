"""Running the list of steps: answers call by call, changes that are followed, plans and packs, copies, modes, parts."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastres.functional import bn_act, conv_act
from freeze_cases import Net, cifar, compare, freeze, images, operators

PACK = "mkldnn::_reorder_convolution_weight"
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def frozen_pair(shape=(2, 16), **how):
    net = cifar()
    return net, freeze(net, images(*shape), **{"tune": False, "verify": False, **how})


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_call_of_every_signature_is_eagers(dtype, channels_last):
    net, frozen = frozen_pair(dtype=dtype)
    frozen.use_channels_last(channels_last)
    for batch, height, width in ((2, 16, 16), (5, 16, 16), (1, 24, 20), (0, 16, 16), (2, 16, 16)):
        x = torch.randn(batch, 3, height, width)
        compare(net, frozen, x, tol=0.2 if dtype is torch.bfloat16 else 1e-4, dtypes=dtype is torch.float32)
        assert torch.equal(frozen(x), frozen(x)) and frozen(x).dtype is dtype


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "strided": lambda x: torch.cat([x, x], 1)[:, ::2],
    "offset": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
    "half of a batch": lambda x: torch.cat([x, x])[3:],
    "within a larger image": lambda x: F.pad(x, (1, 1, 1, 1))[..., 1:-1, 1:-1],
}


def test_06_odd_layouts():
    net, frozen = frozen_pair()
    for layout in (*LAYOUTS.values(), *LAYOUTS.values()):  # each by a plan of its own, all of one shape
        compare(net, frozen, layout(images(3, 16)))


@needs_onednn
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_52_a_kernel_as_wide_as_its_stride_and_the_image_in_bfloat16(batch):
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 4, stride=4), nn.BatchNorm2d(16))
    net = net.eval()
    frozen, x = freeze(net, images(2, 4), dtype=torch.bfloat16, tune=False, verify=False), images(batch, 4)
    with torch.no_grad():
        assert (frozen(x).float() - net(x)).abs().max() < 0.05 * net(x).abs().max()


# ---- plans and packs -------------------------------------------------------------------------------------------------


@needs_onednn
def test_row15_a_signature_is_lowered_on_its_first_call_and_those_used_last_are_kept(monkeypatch, caplog):
    monkeypatch.setattr("fastres.inference.executor._PLANS", 4)
    net, frozen = frozen_pair(precision="exact")
    executor, _, _ = frozen.prepared(images(2, 16))
    assert operators(frozen, images(3, 16))[PACK] == 7
    for _ in range(2):
        assert PACK not in operators(frozen, images(3, 16)) and PACK not in operators(frozen, images(2, 16))
    for batch in range(4, 15):
        frozen(images(batch, 16))
        assert PACK not in operators(frozen, images(2, 16))  # in use all along
    assert len(executor._plans) == 4 and caplog.text.count("take turns") == 1


@needs_onednn
def test_row16_sizes_share_packed_weights_and_plans_are_bounded_by_bytes(monkeypatch):
    net, frozen = frozen_pair()
    executor, _, _ = frozen.prepared(images(2, 16))
    packs = set()
    for size in (16, 20, 24, 32):
        compare(net, frozen, images(2, size))
    for plan in executor._plans.values():
        packs |= {id(t) for t in plan.held}
    assert len(packs) < 4 * 7 and len(executor._plans) == 4
    monkeypatch.setattr("fastres.inference.executor._HELD", (0, 0))
    compare(net, frozen, images(2, 12))
    assert len(executor._plans) == 1
    frozen.forget()
    assert not executor._plans


def test_no_activation_outlives_its_last_reader():
    alive, most = weakref.WeakSet(), []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.shape[:1] == (5,):
                alive.add(made)
                most.append(len(alive))
            return made

    net = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh()) for _ in range(9)]).eval()
    frozen = freeze(net, images(), tune=False, verify=False)
    executor, inputs, constants = frozen.prepared(images(5))
    with Seen():
        executor.run(inputs, constants), executor.run(inputs, constants)
    assert len(most) >= 30 and max(most) <= 5  # what a call reads, what it makes, what is inside one


def write(model, name="conv1.weight"):
    model.weights.get_buffer(name).mul_(2)


def load(model, assign=False):
    model.load_state_dict({name: t * 0.5 for name, t in model.state_dict().items()}, assign=assign)


CHANGES = {
    "a weight in place": write,
    "a bias in place": lambda m: write(m, "conv1.bias"),
    "the classifier in place": lambda m: write(m, "fc.weight"),
    "a weight's data": lambda m: setattr(m.weights.conv1.weight, "data", m.weights.conv1.weight * 2),
    "another tensor": lambda m: setattr(m.weights.fc, "weight", torch.zeros_like(m.weights.fc.weight)),
    "load_state_dict": load,
    "load_state_dict, assign": lambda m: load(m, True),
    "cast": lambda m: m.double(),
    "layout": lambda m: (m.use_channels_last(False), write(m)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_38_39_changes_of_the_weights_are_followed(change):
    net, frozen = frozen_pair()
    x, small = images(2, 16), images(2, 12)
    before = frozen(x), frozen(x), frozen(small)
    with torch.no_grad():
        CHANGES[change](frozen)
    fresh = copy.deepcopy(frozen)  # has no plan
    for _ in range(3):
        torch.testing.assert_close(frozen(x), fresh(x))
        assert (frozen(x) - before[0]).abs().max() > 1e-3 or change in ("cast", "layout")
        if change != "another tensor":  # which another size reads no more than a refresh would
            torch.testing.assert_close(frozen(small), fresh(small))


def test_57_functional_call_and_vmap():
    net, frozen = frozen_pair()
    x = images(2, 16)
    frozen(x)
    zeros = {name: torch.zeros_like(t) for name, t in frozen.state_dict().items()}
    assert not torch.func.functional_call(frozen, zeros, (x,)).any()
    compare(net, frozen, x)
    many = torch.randn(3, 2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(frozen)(many), torch.func.vmap(net)(many), rtol=1e-4, atol=1e-4)


# ---- modes and hooks -------------------------------------------------------------------------------------------------


def test_21_autocast_changes_nothing_and_is_in_no_plan():
    net, frozen = frozen_pair()
    x, inside = images(2, 16), copy.deepcopy(frozen)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert torch.equal(inside(x), frozen(x)) and frozen(x).dtype is torch.float32
    for model in (inside, frozen):
        compare(net, model, x)


def test_modes_see_stock_operators():
    net, frozen = frozen_pair()
    x = images(2, 16)
    with FlopCounterMode(display=False) as counter:
        y = frozen(x)
    with FlopCounterMode(display=False) as wanted:
        net(x)
    assert counter.get_total_flops() == wanted.get_total_flops()
    torch.testing.assert_close(frozen(x), y, rtol=1e-4, atol=1e-4)


def test_40_hooks_on_the_frozen_model_fire():
    _, frozen = frozen_pair()
    x, fired = images(2, 16), []
    y = frozen(x)
    handles = [
        frozen.register_forward_hook(lambda module, args, out: out + 1),
        frozen.register_forward_pre_hook(lambda module, args: fired.append(1)),
        nn.modules.module.register_module_forward_hook(lambda *args: fired.append(2)),
    ]
    try:
        for _ in range(2):
            torch.testing.assert_close(frozen(x), y + 1)
    finally:
        for handle in handles:
            handle.remove()
    assert fired == [1, 2, 1, 2] and torch.equal(frozen(x), y)


# ---- parts of a batch ------------------------------------------------------------------------------------------------


def test_parts_of_a_batch_give_the_whole():
    net, frozen = frozen_pair((8, 16))
    x = images(11, 16)
    whole = frozen(x)
    frozen.plan.images_at_a_time = 4
    torch.testing.assert_close(frozen(x), whole, rtol=1e-4, atol=1e-4)
    for batch in (4, 5, 0):
        compare(net, frozen, images(batch, 16))
    net = Net(lambda net, x, y: {"a": [net.first(x)], "b": y})
    two = freeze(net, (images(), images()), tune=False, verify=False)
    two.plan.images_at_a_time = 1  # not used: of several inputs nobody knows which is the batch
    compare(net, two, images(3), images(3))


class Scaled(nn.Module):
    """A source that calls conv_act itself, with a scale."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return conv_act(x, self.weight, scale=self.scale, padding=1)


class OfTheBatch(nn.Module):
    """A source that normalizes by the batch in eval mode too, and keeps running statistics of its own."""

    def __init__(self, tracks):
        super().__init__()
        self.bn = nn.BatchNorm2d(3, track_running_stats=tracks)

    def forward(self, x):
        statistics = (None, None) if self.bn.running_mean is None else (self.bn.running_mean.clone(), torch.ones(3))
        return bn_act(x, *statistics, self.bn.weight, self.bn.bias, training=True)


@pytest.mark.parametrize("net", [Scaled(), OfTheBatch(False), OfTheBatch(True)], ids=["scale", "untracked", "tracked"])
def test_sources_that_call_our_operators_keep_what_no_fusion_takes(net):
    frozen, x = freeze(net.eval(), images(2, 9)), images(5, 9)
    assert frozen.report.capture == "graph"
    want = net(x)
    torch.testing.assert_close(frozen(x), want)
    torch.testing.assert_close(torch.export.export(frozen, (x,)).module()(x), want)
