"""The fault table's rows for swapped blocks in training: numerics, the BatchNorm contract, threads, repeats.

Rows that other files hold for swapped blocks: 19 in test_train_derivatives.py; 20 to 23 and 26 in test_train_ways.py;
24 in test_train_changes.py; 25 and 46 in test_train_distributed.py; 25, 26, 38, 40, 41 and 42 in test_swap_live.py and
test_swap_training.py; 36 and 37 in test_swap_persist.py; 27, 28 and 30 in test_gpu_models.py.
"""

import copy
import itertools
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastres
from fastres.swap import swap
from swap_cases import assert_same, assert_same_steps, fused_calls, images, scramble, step
from train_cases import (
    TOLERANCES,
    assert_bitwise,
    batch_norms,
    block_input,
    block_twins,
    every_block,
    every_option,
    every_precision,
    gradients,
    state,
    tiny_twins,
    twins,
    vision,
)

EPS32 = torch.finfo(torch.float32).eps


def exact_unit(channels=4, **settings):
    """A 1x1 convolution that returns its input bit for bit, BN, ReLU: what BN sees is what the test feeds."""
    conv = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.dirac_(conv.weight)
    return nn.Sequential(conv, nn.BatchNorm2d(channels, **settings), nn.ReLU())


def unit_twins(options, **settings):
    net = nn.Sequential(exact_unit(**settings))
    stock = copy.deepcopy(net)
    swap(net, strict=True, **options)
    return net, stock


# ---- numerics --------------------------------------------------------------------------------------------------------


@every_option
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (1e6, 0.1), (-3e3, 1e-2)])
def test_row11_mean_far_above_the_deviation(options, mean, std):
    """The variance's error against float64 is at most 4x eager's; a one-pass sum of squares is all error here."""
    net, stock = unit_twins(options, momentum=1.0)
    x = torch.randn(8, 4, 9, 9) * std + mean
    exact = x.double().var((0, 2, 3))
    net(x).sum().backward()
    stock(x)
    error, eager = (
        ((model[0][1].running_var.double() - exact) / exact).abs().max() for model in (net.train(), stock.train())
    )
    assert error <= 4 * eager + 4 * EPS32, f"{error:.1e}, eager {eager:.1e}"


@every_option
def test_row11_a_constant_channel_is_exactly_its_bias(options):
    net, _ = unit_twins(options)
    bias = torch.tensor([0.25, -0.5, 1.5, 3.0])
    with torch.no_grad():
        net[0][1].bias.copy_(bias)
    x = torch.tensor([1e4, 0.1, -7.3, 1 / 3]).view(1, 4, 1, 1).expand(3, 4, 5, 5)
    assert torch.equal(net(x), bias.clamp(min=0).view(1, 4, 1, 1).expand_as(x))


@every_option
@pytest.mark.parametrize("size", [1e18, 1e25, 3e38])
def test_row12_overflow_leaves_the_finite_and_the_infinite_where_eager_has_them(options, size):
    """In float32 the square of a deviation of 1e25 is infinite, in eager too; no other channel may see it."""
    net, stock = unit_twins(options)
    x = torch.randn(4, 4, 5, 5)
    x[:, 1] *= size
    found = []
    for model in (net, stock):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        found.append({"y": y.detach()} | gradients(model[0][1], x=leaf) | state(model))
    for name, wanted in found[1].items():
        got = found[0][name]
        assert torch.equal(got.isfinite(), wanted.isfinite()), name
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


@every_option
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row12_half_activations_whose_sum_overflows(options, dtype):
    """Values near 60000 under autocast: sums and squares in float16 would be infinite, float32 ones are not."""
    net, stock = unit_twins(options, momentum=1.0)
    x = (torch.randn(4, 4, 8, 8) * 500 + 60_000).clamp(max=65_000)
    with torch.autocast("cpu", dtype):
        y = net(x)
        y.float().square().mean().backward()
        seen = stock[0][0](x)
    assert y.dtype is seen.dtype is dtype
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())
    torch.testing.assert_close(net[0][1].running_mean, seen.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(net[0][1].running_var, seen.double().var((0, 2, 3)).float(), rtol=1e-5, atol=0)


@every_option
def test_row13_a_channel_that_died_in_training_evaluates_as_well_as_eager(options):
    """Its running variance is 0 after training, so that 1/sqrt(eps) is folded into the convolution in eval mode."""
    net, stock = unit_twins(options, momentum=1.0)
    x = torch.randn(8, 4, 6, 6)
    x[:, 2] = 0.7
    for model in (net, stock):
        model.train()(x)
        model.eval()
    assert net[0][1].running_var[2] == 0
    verdict = fastres.verify(stock, net, x + 1e-3 * torch.randn_like(x), training=False, backward=False)
    assert verdict, str(verdict)


# ---- the BatchNorm contract ------------------------------------------------------------------------------------------


@every_option
@every_precision
def test_row14_every_norm_keeps_its_own_eps(options, dtype):
    """Also one that is changed after the swap."""
    net, stock = tiny_twins(dtype, options)
    for model in (net, stock):
        for bn, eps in zip(batch_norms(model), itertools.cycle((1e-3, 1e-5, 0.3, 1e-8)), strict=False):
            bn.eps = eps
    assert_same_steps(net, stock, images(dtype=dtype), tolerance=TOLERANCES[dtype])


@every_option
@every_precision
@pytest.mark.parametrize("momentum", [None, 0.0, 1.0, 0.25])
def test_row15_momentum_over_five_steps(options, dtype, momentum):
    net, stock = tiny_twins(dtype, options)
    for model in (net, stock):
        for bn in batch_norms(model):
            bn.momentum = momentum
    for _ in range(5):
        assert_same_steps(net, stock, images(dtype=dtype), modes=(True,), tolerance=TOLERANCES[dtype])
    assert {int(bn.num_batches_tracked) for bn in batch_norms(net)} == {5}


@every_option
@every_precision
@pytest.mark.parametrize(("train", "tracked", "buffers"), list(itertools.product([False, True], repeat=3)))
def test_row16_flags_and_buffers(options, dtype, train, tracked, buffers):
    """`track_running_stats` flipped after construction, with and without buffers, in both modes."""
    net, stock = twins(
        lambda: vision.Bottleneck(8, 2, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=buffers)),
        dtype,
        options,
    )
    for model in (net, stock):
        for bn in batch_norms(model):
            bn.track_running_stats = tracked
    assert fused_calls(copy.deepcopy(net).train(train), block_input(dtype)) == 3
    for _ in range(2):
        assert_same_steps(net, stock, block_input(dtype), modes=(train,), tolerance=TOLERANCES[dtype])


@every_option
@pytest.mark.parametrize("change", [{"num_batches_tracked": None}, {"track_running_stats": False}], ids=str)
def test_row16_momentum_none_without_a_counter_to_move(options, change):
    net, stock = tiny_twins(torch.float32, options)
    for model in (net, stock):
        for bn in batch_norms(model):
            bn.momentum = None
            for name, value in change.items():
                setattr(bn, name, value)
    assert_same_steps(net, stock, images(dtype=torch.float32), tolerance=TOLERANCES[torch.float32])


@every_option
def test_row17_running_variance_is_unbiased_and_the_output_is_not(options):
    net, _ = unit_twins(options, momentum=1.0)
    x = torch.tensor([1.0, 4.0]).view(2, 1, 1, 1).expand(2, 4, 1, 1)
    y = net(x)
    assert net[0][1].running_var.tolist() == [4.5] * 4  # squares over n - 1; over n: 2.25
    assert net[0][1].running_mean.tolist() == [2.5] * 4
    torch.testing.assert_close(y[1], torch.full((4, 1, 1), 1.5 / (2.25 + 1e-5) ** 0.5))


@every_option
@every_precision
@every_block
@pytest.mark.parametrize("first", [True, False])
def test_row18_backward_uses_the_mode_and_the_statistics_of_its_forward(options, dtype, name, first):
    """Forward in one mode, then the other mode and a step on another batch that moves everything, then backward.

    The stock block goes backward at once: after an evaluation it would use whatever its buffers hold by then.
    """
    block, stock = block_twins(name, dtype, options)
    x, other, found = block_input(dtype), block_input(dtype) * 5 + 2, []
    for model in (block, stock):
        leaf = x.clone().requires_grad_()
        loss = model.train(first)(leaf).square().sum()
        if model is stock:
            loss.backward()
        model.train(not first)(other)
        model.train()(other)
        if model is block:
            loss.backward()
        found.append(gradients(model, x=leaf) | state(model))
    assert_same(*found, tolerance=TOLERANCES[dtype])


# ---- devices, threads, evaluation between, repeats -------------------------------------------------------------------


@every_option
def test_row29_mixed_devices_are_refused_and_move_nothing(options):
    block, stock = block_twins("basic", torch.float32, options)
    before = state(block)
    for model in (block, stock):
        with pytest.raises((RuntimeError, ValueError), match="meta|device"):
            model(block_input().to("meta"))
    assert_bitwise(state(block), before)
    block.bn2.weight = nn.Parameter(block.bn2.weight.to("meta"))
    before = {name: t for name, t in state(block).items() if name.startswith("bn2.") and t.device.type == "cpu"}
    with pytest.raises(ValueError, match="weight: got device meta, expected x's device cpu"):
        block(block_input())
    assert_bitwise({name: t for name, t in state(block).items() if name in before}, before)


@every_option
@every_block
def test_row31_eight_threads(options, name):
    """Each thread trains its own copy on its own shape: forwards, backwards and statistics are those of one thread."""
    block, _ = block_twins(name, torch.float32, options)
    jobs = [(copy.deepcopy(block), block_input(n=2 + i % 2, size=6 + i % 2)) for i in range(8)]
    wanted = [step(copy.deepcopy(net), x) for net, x in jobs]
    start, found = threading.Barrier(8), {}

    def work(i):
        start.wait()
        for _ in range(3):
            found.setdefault(i, []).append(step(copy.deepcopy(jobs[i][0]), jobs[i][1]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert len(found.get(i, [])) == 3, f"thread {i} raised"
        for run in found[i]:
            assert_bitwise(run, wanted[i])


@every_option
def test_row31_one_module_called_from_eight_threads(options):
    """A shared module in eval mode, with gradients and without."""
    block, stock = block_twins("bottleneck", torch.float32, options)
    block.eval(), stock.eval()
    inputs, found = [block_input(n=1 + i % 3) for i in range(8)], {}

    def work(i):
        leaf = inputs[i].clone().requires_grad_()
        y = block(leaf)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf)
        with torch.no_grad():
            found[i] = {"y": y.detach(), "dx": dx, "folded": block(inputs[i])}

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        leaf = x.clone().requires_grad_()
        y = stock(leaf)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf)
        assert_same(found[i], {"y": y.detach(), "dx": dx, "folded": y.detach()}, 3e-5)


@every_option
def test_row39_evaluation_between_training_steps_follows(options):
    """The fold of an evaluation is never used for the weights of a later one."""
    net, stock = tiny_twins(torch.float32, options)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (net, stock)]
    x, held_out = images(6, dtype=torch.float32), images(3, dtype=torch.float32)
    outputs = []
    for _ in range(4):
        for model, optimizer in zip((net, stock), optimizers, strict=True):
            optimizer.zero_grad()
            model.train()(x).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                outputs.append(model.eval()(held_out))
        assert_same({"y": outputs[-2]}, {"y": outputs[-1]}, 1e-3)  # four steps of float32; measured: 2e-6
    assert (outputs[0] - outputs[-2]).abs().max() > 1e-2
    kept = copy.deepcopy(stock.state_dict())
    with torch.no_grad():
        for model in (net, stock):
            for p in model.parameters():
                p.mul_(1.5)
        assert_same({"y": net(held_out)}, {"y": stock(held_out)}, 1e-3)
        for model in (net, stock):
            model.load_state_dict(kept)
        assert_same({"y": net(held_out)}, {"y": outputs[-1]}, 1e-3)


@every_option
def test_row44_a_network_with_initial_statistics_is_judged_after_calibration(options):
    """Random weights and running statistics of 0 and 1: verify gives both the statistics of the input first."""
    torch.manual_seed(3)
    stock = vision.ResNet(vision.Bottleneck, [1, 1, 1, 1], num_classes=4)
    net = copy.deepcopy(stock)
    swap(net, strict=True, **options)
    verdict = fastres.verify(stock, net, torch.randn(2, 3, 32, 32), training=False, backward=False)
    assert verdict, str(verdict)
    assert any("initial statistics" in note for note in verdict.notes)
    net.layer1[0].bn3.eps = 0.1
    assert not fastres.verify(stock, net, torch.randn(2, 3, 32, 32), training=False, backward=False)


@every_option
@every_block
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_row45_twenty_steps_are_bitwise_equal(options, name, cast, channels_last):
    block, _ = block_twins(name, torch.float32, options)
    x = block_input(n=5, size=9)
    if channels_last:
        block, x = block.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    before, first = state(block), None
    for _ in range(20):
        block.load_state_dict(before)
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
            y = block(leaf)
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results = {"y": y.detach()} | gradients(block, x=leaf) | state(block)
        first = first or results
        assert_bitwise(results, first)


def test_the_comparisons_see_a_wrong_block():
    """A residual dropped and statistics moved twice are both seen by the step comparison that these tests rest on."""
    block, stock = block_twins("basic")
    x = block_input()
    wrong = copy.deepcopy(block)
    wrong.bn1.momentum = 0.19
    with pytest.raises(AssertionError, match="running_mean"):
        assert_same_steps(wrong, copy.deepcopy(stock), x, tolerance=TOLERANCES[torch.float32])
    wrong = scramble(copy.deepcopy(block))
    with pytest.raises(AssertionError):
        assert_same_steps(wrong, copy.deepcopy(stock), x, tolerance=TOLERANCES[torch.float32])
    with pytest.raises(AssertionError):
        assert_same({"y": F.relu(stock.bn2(x))}, {"y": F.relu(stock.bn2(x) + x)}, 1e-5)
