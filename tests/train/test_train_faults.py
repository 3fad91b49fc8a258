"""The fault table's rows for swapped blocks in training: modes, devices, threads, evaluation between, repeats.

Rows that other files hold for swapped blocks: 19 in test_train_derivatives.py; 20 to 23 in test_train_ways.py; 24 in
test_train_changes.py; 26 in test_train_checkpoint.py; 25 and 46 in test_train_distributed.py; 25, 26, 38, 40, 41 and 42
in test_swap_live.py and test_swap_training.py; 15 to 17 in test_nn.py; 36 and 37 in test_swap_persist.py; 27, 28 and 30
in test_gpu_models.py. Rows 11 and 12, of the operator's numerics, are in test_bn_act.py and test_native.py.
"""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastres
from swap_cases import assert_same, assert_same_steps, images, scramble, step
from train_cases import (
    TOLERANCES,
    assert_bitwise,
    batch_norms,
    block_input,
    block_twins,
    every,
    in_threads,
    only_gradients,
    run,
    state,
    tiny_twins,
    twins,
)


@every("option")
def test_row13_a_channel_that_died_in_training_evaluates_as_well_as_eager(options):
    """Its running variance is 0 after training, so that 1/sqrt(eps) is folded into the convolution in eval mode."""
    unit = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, momentum=1.0), nn.ReLU())
    nn.init.dirac_(unit[0].weight)  # what the norm sees is x
    net, stock = twins(lambda: unit, torch.float32, options)
    x = torch.randn(8, 4, 6, 6)
    x[:, 2] = 0.7
    for model in (net, stock):
        model(x)
        model.eval()
    assert net[1].running_var[2] == 0
    verdict = fastres.verify(stock, net, x + 1e-3 * torch.randn_like(x), training=False, backward=False)
    assert verdict, str(verdict)


@every("option", "precision")
def test_row14_every_norm_keeps_its_own_eps(options, dtype):
    """Also one that is changed after the swap."""
    net, stock = tiny_twins(dtype, options)
    for model in (net, stock):
        for bn, eps in zip(batch_norms(model), itertools.cycle((1e-3, 1e-5, 0.3, 1e-8)), strict=False):
            bn.eps = eps
    assert_same_steps(net, stock, images(dtype=dtype), tolerance=TOLERANCES[dtype])


@every("option", "precision", "block")
@pytest.mark.parametrize("first", [True, False])
def test_row18_backward_uses_the_mode_and_the_statistics_of_its_forward(options, dtype, name, first):
    """Forward in one mode, then the other mode and a step on another batch that moves everything, then backward.

    The stock block goes backward at once: after an evaluation it would use whatever its buffers hold by then.
    """
    block, stock = block_twins(name, dtype, options)
    x, other = block_input(dtype), block_input(dtype) * 5 + 2

    def move(model):
        model.train(not first)(other)
        model.train()(other)

    ours, wanted = run(block.train(first), x, between=partial(move, block)), run(stock.train(first), x)
    move(stock)
    assert_same(only_gradients(ours), only_gradients(wanted), TOLERANCES[dtype])
    assert_same(state(block), state(stock), TOLERANCES[dtype])


# ---- devices, threads, evaluation between, repeats -------------------------------------------------------------------


@every("option")
def test_row29_mixed_devices_are_refused_and_move_nothing(options):
    block, _ = block_twins("basic", torch.float32, options)
    block.bn2.weight = nn.Parameter(block.bn2.weight.to("meta"))
    before = {name: t for name, t in state(block).items() if name.startswith("bn2.") and t.device.type == "cpu"}
    with pytest.raises(ValueError, match="weight: got device meta, expected x's device cpu"):
        block(block_input())
    assert_bitwise({name: t for name, t in state(block).items() if name in before}, before)


@every("option", "block")
def test_row31_eight_threads(options, name):
    """Each thread trains its own copy on its own shape: forwards, backwards and statistics are those of one thread."""
    block, _ = block_twins(name, torch.float32, options)
    jobs = [(copy.deepcopy(block), block_input(n=2 + i % 2, size=6 + i % 2)) for i in range(8)]
    found = in_threads(8, lambda i: [step(copy.deepcopy(jobs[i][0]), jobs[i][1]) for _ in range(3)])
    for (net, x), results in zip(jobs, found, strict=True):
        wanted = step(copy.deepcopy(net), x)
        for result in results:
            assert_bitwise(result, wanted)


@every("option")
def test_row31_one_module_called_from_eight_threads(options):
    """A shared module in eval mode, with gradients and without."""
    block, stock = block_twins("bottleneck", torch.float32, options)
    block.eval(), stock.eval()
    inputs = [block_input(n=1 + i % 3) for i in range(8)]

    def work(i, model=block):
        leaf = inputs[i].clone().requires_grad_()
        y = model(leaf)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf)
        with torch.no_grad():
            return {"y": y.detach(), "dx": dx, "folded": model(inputs[i])}

    for i, found in enumerate(in_threads(8, work)):
        assert_same(found, work(i, stock), 3e-5)


@every("option")
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


@every("option", "block")
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
        results = run(block, x, cast=cast)
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
