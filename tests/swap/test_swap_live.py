"""A swapped model in use: hooks, parametrizations, replaced children, shared modules, odd batches and types."""

import copy
import platform
import subprocess
import sys
import timeit

import pytest
import torch
from torch import nn

from fastres.swap import swap
from swap_cases import TINY_CALLS, assert_same, assert_same_steps, fused_calls, images, pair, step, tiny, torchvision

vision = torchvision.models.resnet


def swapped_pair():
    net, stock = pair()
    swap(net)
    return net, stock


# ---- changes after the swap: the block runs its stock forward, or follows --------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize(
    ("name", "lost"),
    [("layer1.0.bn1", 2), ("layer2.1.relu", 3), ("layer2.1.downsample.1", 1), ("stem.1", 1), ("stem.2", 0)],
)
def test_row40_hook_on_child_still_fires(kind, name, lost):
    net, stock = swapped_pair()
    for model in (net, stock):
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # autograd refuses backward hooks beside in-place operations
    seen = {"net": 0, "stock": 0}
    for label, model in (("net", net), ("stock", stock)):

        def hook(*args, label=label):
            seen[label] += 1

        getattr(model.get_submodule(name), f"register_{kind}_hook")(hook)
    assert_same_steps(net, stock, images())
    assert seen["net"] == seen["stock"] > 0
    assert fused_calls(net, images()) == TINY_CALLS - lost  # a BN whose ReLU is hooked runs fused alone


def test_row40_a_removed_hook_lets_the_block_run_fused_again():
    net, _ = swapped_pair()
    handle = net.layer1[0].bn1.register_forward_hook(lambda *a: None)
    assert fused_calls(net, images()) == TINY_CALLS - 2
    handle.remove()
    assert fused_calls(net, images()) == TINY_CALLS


def test_row40_hooks_on_blocks_and_convolutions_fire_and_stay_fused():
    net, stock = swapped_pair()
    seen = []
    for model in (net, stock):
        for name in ("layer1.0", "layer2.1", "layer2.1.conv3", "stem"):
            model.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
    x = images()
    assert fused_calls(net, x) == TINY_CALLS
    stock(x)
    for ours, theirs in zip(seen[:4], seen[4:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_row40_gradcam_style_capture():
    """Activations of a block and their gradients through a forward hook with a tensor hook."""
    net, stock = swapped_pair()
    found = []
    for model in (net, stock):

        def keep(module, args, y):
            found.append(y.detach().clone())
            y.register_hook(lambda g: found.append(g.clone()))

        model.layer2[1].register_forward_hook(keep)
        model.eval()
    x = images()
    net(x)[0, 1].backward()
    stock(x)[0, 1].backward()
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[3])


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_row38_parametrize_after_the_swap():
    net, stock = swapped_pair()
    for model in (net, stock):
        nn.utils.parametrize.register_parametrization(model.layer1[0].bn2, "weight", Doubled())
        nn.utils.parametrize.register_parametrization(model.layer1[1].conv1, "weight", Doubled())
    assert_same_steps(net, stock, images())
    assert fused_calls(net, images()) == TINY_CALLS - 2  # the block with the BN; a parametrized convolution is called
    nn.utils.parametrize.remove_parametrizations(net.layer1[0].bn2, "weight")
    assert fused_calls(net, images()) == TINY_CALLS


def test_row38_parameters_replaced_or_moved_are_followed():
    net, stock = swapped_pair()
    fresh = {name: torch.rand_like(t) + 0.5 for name, t in net.layer2[0].bn1.named_parameters()}
    for model in (net, stock):
        for name, value in fresh.items():
            setattr(model.layer2[0].bn1, name, nn.Parameter(value.clone()))
        model.stem[0] = copy.deepcopy(stock.stem[0])
        model.layer1[0].bn2 = nn.BatchNorm2d(8, eps=1e-2).double()
    assert_same_steps(net, stock, images())
    assert fused_calls(net, images()) == TINY_CALLS


def test_row38_load_state_dict_assign():
    net, stock = swapped_pair()
    other = {name: torch.rand_like(t.double()).to(t.dtype) + 0.5 for name, t in stock.state_dict().items()}
    for model in (net, stock):
        model.load_state_dict(copy.deepcopy(other), assign=True)
    assert_same_steps(net, stock, images())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row38_to_dtype(dtype):
    net, stock = swapped_pair()
    for model in (net, stock):
        model.to(dtype).eval()
    x = images().to(dtype)
    assert fused_calls(net, x) == TINY_CALLS
    torch.testing.assert_close(net(x), stock(x), rtol=2e-5 if dtype is torch.float32 else 5e-2, atol=1e-2)
    assert net(x).dtype == dtype


def test_row42_sync_batchnorm_converted_after_the_swap():
    net, stock = swapped_pair()
    net, stock = (nn.SyncBatchNorm.convert_sync_batchnorm(model) for model in (net, stock))
    assert_same_steps(net, stock, images())
    assert fused_calls(net, images()) == 0


def test_a_patched_forward_on_a_child_runs():
    net, stock = swapped_pair()
    for model in (net, stock):
        bn = model.layer1[0].bn1
        bn.forward = lambda x, bn=bn: nn.BatchNorm2d.forward(bn, x) + 1
    assert_same_steps(net, stock, images())
    assert fused_calls(net, images()) == TINY_CALLS - 2


@pytest.mark.parametrize("names", [["layer1.0.bn1"], ["layer2.1.bn3", "layer2.1.downsample.1"], ["stem.1"]])
def test_row18_a_child_switched_to_eval_alone(names):
    net, stock = swapped_pair()
    for model in (net.train(), stock.train()):
        for name in names:
            bn = model.get_submodule(name)
            bn.train = lambda mode=True: None  # as frozen-BN recipes do, so that .train() leaves it
            bn.training = False
    before = net.get_submodule(names[0]).running_mean.clone()
    assert_same_steps(net, stock, images(), modes=(True,))
    assert torch.equal(net.get_submodule(names[0]).running_mean, before)
    assert fused_calls(net, images()) == TINY_CALLS


def test_row20_frozen_parameters_get_no_gradient():
    net, stock = swapped_pair()
    for model in (net, stock):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    assert_same_steps(net, stock, images())
    assert net.layer1[0].bn1.weight.grad is None


@pytest.mark.parametrize("slot", ["se", "drop_path"])
def test_row42_extra_layer_added_after_the_swap(slot):
    timm = pytest.importorskip("timm")
    block, stock = pair(lambda: timm.models.resnet.Bottleneck(16, 4).double())
    swap(block, strict=True)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    assert fused_calls(copy.deepcopy(block), x) == 3
    for model in (block, stock):
        setattr(model, slot, nn.Softplus())
    assert fused_calls(copy.deepcopy(block), x) == 0
    assert_same_steps(block, stock, x)


# ---- shared modules, repeated calls ----------------------------------------------------------------------------------


class Shared(nn.Module):
    """Two blocks that share a BN and a convolution, and a block that is called twice under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b = vision.BasicBlock(4, 4), vision.BasicBlock(4, 4)
        self.b.bn1, self.b.conv2 = self.a.bn1, self.a.conv2
        self.again = self.a

    def forward(self, x):
        return self.again(self.b(self.a(x)))


def test_row41_shared_modules():
    net, stock = pair(lambda: Shared().double())
    report = swap(net)
    assert [(row.name, row.status) for row in report.rows] == [("a", "swapped"), ("b", "swapped")]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert fused_calls(copy.deepcopy(net), x) == 6
    assert_same_steps(net, stock, x)
    assert int(net.a.bn1.num_batches_tracked) == 3
    report.revert()
    assert type(net.again) is vision.BasicBlock


def test_row41_filters_see_every_name_of_a_shared_block():
    net = Shared()
    assert [row.name for row in swap(net, include="again").rows if row.status == "swapped"] == ["a"]


def test_row25_two_forwards_before_two_backwards():
    net, stock = swapped_pair()
    x, other = images(), images(3)
    results = []
    for model in (net.train(), stock.train()):
        first, second = model(x), model(other)
        first.square().sum().backward()
        second.square().sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters()} | model.state_dict())
    assert_same(*results)


def test_row24_input_is_the_residual_and_stays_untouched():
    block, stock = pair(lambda: vision.BasicBlock(4, 4).double())
    swap(block)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    for module in (block, stock):
        module(x).sum().backward()
    assert torch.equal(x, before)
    view = before.view(2, 4, 36).view(2, 4, 6, 6)
    assert_same_steps(block, stock, view)


def test_row24_writing_to_the_output_or_the_input_is_noticed():
    block = vision.BasicBlock(4, 4).double()
    swap(block)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    y = block(x)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    x = x.clone().requires_grad_()
    inner = x * 1
    y = block(inner)
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- odd batches, layouts, types -------------------------------------------------------------------------------------


def test_row3_empty_batch():
    for train in (True, False):
        net, stock = swapped_pair()
        net.pool = stock.pool = nn.Identity()
        net.flat = stock.flat = nn.Identity()
        net.fc = stock.fc = nn.Identity()
        state = copy.deepcopy(net.state_dict())
        y = net.train(train)(images(0))
        y.sum().backward()
        assert y.shape == stock.train(train)(images(0)).shape
        statistics = {n: t for n, t in net.state_dict().items() if "running" in n}
        assert_same(statistics, {n: state[n] for n in statistics}, 0)


def test_row4_one_value_per_channel_moves_nothing():
    net, _ = swapped_pair()
    net.train()
    state = copy.deepcopy(net.layer2[1].bn3.state_dict())
    with pytest.raises(ValueError, match="[Ee]xpected more than 1 value|one value"):
        net.layer2[1](torch.randn(1, 16, 2, 2, dtype=torch.float64))
    assert_same(net.layer2[1].bn3.state_dict(), state, 0)
    net.eval()(images(1, 4))


def test_channels_last_in_channels_last_out():
    net, stock = swapped_pair()
    for model in (net, stock):
        model.to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    y, wanted = (model.layer1(model.stem(x)) for model in (net, stock))
    assert y.is_contiguous(memory_format=torch.channels_last) and y.stride() == wanted.stride()
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("train", [False, True])
def test_row20_residual_of_another_dtype(train):
    """Under autocast the convolutions give bfloat16 while the block's input, the residual, is float32."""
    block, stock = pair(lambda: vision.BasicBlock(4, 4))
    swap(block)
    x = torch.randn(4, 4, 8, 8)
    results = []
    for model in (block.train(train), stock.train(train)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(leaf)
        y.float().square().mean().backward()
        results.append({"y": y.detach(), "dx": leaf.grad} | {n: p.grad for n, p in model.named_parameters()})
    assert results[0]["y"].dtype == torch.bfloat16
    assert_same(*results, tolerance=2e-2)  # bfloat16: 8 bits; measured 6e-3


def test_row21_autocast_network():
    net, stock = pair(lambda: tiny(torch.float32))
    swap(net)
    x = images(dtype=torch.float32)
    outputs = []
    for model in (net.eval(), stock.eval()):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(x))
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(*outputs, rtol=5e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_calls(net, x) == TINY_CALLS


def test_broadcast_residual_is_added_as_eager_does():
    block, stock = pair(lambda: vision.BasicBlock(4, 4, downsample=nn.AdaptiveAvgPool2d(1)).double())
    swap(block)
    assert_same_steps(block, stock, torch.randn(2, 4, 6, 6, dtype=torch.float64))


def test_meta_tensors_and_functional_call():
    net = tiny(torch.float32)
    swap(net)
    values = {name: t.detach() + 0.5 for name, t in net.named_parameters()}
    x = images(dtype=torch.float32)
    y = torch.func.functional_call(net.eval(), values, (x,))
    net.load_state_dict(values, strict=False)
    torch.testing.assert_close(y, net(x))
    assert net.to("meta").train()(x.to("meta")).shape == (4, 5)


def test_the_check_takes_microseconds():
    block = vision.Bottleneck(16, 4)
    swap(block)
    adapter = block.fastres_adapter
    seconds = min(timeit.repeat(lambda: adapter.ready(block), number=500, repeat=7)) / 500
    assert seconds < 20e-6, f"{seconds * 1e6:.1f} us"  # measured: 3 us on a loaded core


def test_step_helper_sees_a_wrong_block():
    """The comparison these tests rest on rejects a block whose residual is dropped."""
    net, stock = pair()
    net.layer1[0].forward = lambda x: torch.relu(net.layer1[0].bn1(net.layer1[0].conv1(x)))
    with pytest.raises(AssertionError):
        assert_same(step(net, images()), step(stock, images()))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_of_activations_is_kept_after_a_swap():
    """A tensor of 16 MB costs its page faults once, not at every call; in a process where nothing was freed."""
    code = """
import resource, torch, fastres
fastres.swap(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(4 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
later = sorted(faults() for _ in range(9))  # the heap may move once or twice
assert later[4] < 100, (first, later)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
