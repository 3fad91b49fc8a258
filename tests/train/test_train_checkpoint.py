"""Swapped blocks under torch.utils.checkpoint: as PyTorch has it, and with swap(checkpoint_bn="once")."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from fastres.swap import swap
from swap_cases import assert_same, images
from train_cases import (
    BLOCKS,
    BUILDS,
    TOLERANCES,
    assert_bitwise,
    batch_norms,
    block_input,
    block_twins,
    every,
    gradients,
    only_gradients,
    run,
    stage,
    state,
    tiny_twins,
    twins,
)

# ---- as PyTorch has it -----------------------------------------------------------------------------------------------


def under_checkpoint(block, reentrant):
    class Checkpointed(nn.Module):
        """`block` under checkpoint, with the block's own names."""

        def forward(self, x):
            return checkpoint(block, x, use_reentrant=reentrant)

        named_parameters, state_dict = block.named_parameters, block.state_dict

    return Checkpointed()


@every("option", "precision", "block")
@pytest.mark.parametrize("reentrant", [True, False])
def test_row26_gradients_under_checkpoint_are_the_plain_ones_bit_for_bit(options, dtype, name, reentrant):
    """And statistics move in the recomputation again, as the stock block's do. float64 is bitwise where nothing of the
    plain run is computed again either."""
    block, stock = block_twins(name, dtype, options)
    x = block_input(dtype)
    plain = only_gradients(run(copy.deepcopy(block), x))
    whole = partial(set_checkpoint_early_stop, False)
    found, _ = (only_gradients(run(under_checkpoint(model, reentrant), x, around=whole)) for model in (block, stock))
    if dtype is torch.float64 and options:
        assert_same(found, plain, 1e-12)
    else:
        assert_bitwise(found, plain)
    assert_same(state(block), state(stock), TOLERANCES[dtype])
    assert {int(bn.num_batches_tracked) for bn in batch_norms(block)} == {2}


@every("option")
def test_row26_checkpoint_sequential_under_autocast(options):
    """The recomputation runs under the forward's autocast, so its gradients are the plain run's."""
    net, _ = tiny_twins(torch.float32, options)
    plain, x, found = copy.deepcopy(net), images(dtype=torch.float32), []
    for model in (net, plain):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            layers = model[:3]
            y = checkpoint_sequential(layers, 2, leaf, use_reentrant=False) if model is net else layers(leaf)
        y.float().square().mean().backward()
        found.append(gradients(model, x=leaf))
    assert_bitwise(*found)


# ---- checkpoint_bn="once" --------------------------------------------------------------------------------------------


ONCE = [{"checkpoint_bn": "once"}, {"checkpoint_bn": "once", "memory": "min"}]


@every("build")
@pytest.mark.parametrize("options", ONCE, ids=["default", "min"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_row26_once_equals_a_run_without_checkpoint(name, options, reentrant, cast):
    """Output, gradients and statistics, over two steps."""
    once, plain = twins(BUILDS[name], torch.float32, options)
    swap(plain, strict=True)
    for _ in range(2):
        x = block_input()
        assert_bitwise(run(under_checkpoint(once, reentrant), x, cast=cast), run(plain, x, cast=cast))
    assert {int(bn.num_batches_tracked) for bn in batch_norms(once)} == {2}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the inner one, in the outer's first run
@pytest.mark.parametrize("reentrant", [True, False])
def test_row26_nested_checkpoints_and_momentum_none(reentrant):
    once, plain = twins(stage, torch.float32, ONCE[0])
    for model in (once, plain):
        for bn in batch_norms(model):
            bn.momentum = None

    def inner(x):
        return checkpoint(once[2], checkpoint(once[1], x, use_reentrant=reentrant), use_reentrant=reentrant)

    x, found = block_input(), []
    for model in (once, plain):
        for _ in range(3):
            leaf = x.clone().requires_grad_()
            y = model[0](leaf)
            y = checkpoint(inner, y, use_reentrant=reentrant) if model is once else model[2](model[1](y))
            model[3](y).square().sum().backward()
        found.append(gradients(model, x=leaf) | state(model))
    assert_same(*found, tolerance=10 * TOLERANCES[torch.float32])
    assert {int(bn.num_batches_tracked) for bn in batch_norms(once)} == {3}


def test_row26_once_leaves_ordinary_steps_alone_and_torch_moves_twice():
    for value, moved in (("once", 1), ("torch", 2)):
        block, _ = twins(BLOCKS["bottleneck"], torch.float32, {"checkpoint_bn": value})
        run(block, block_input())
        assert {int(bn.num_batches_tracked) for bn in batch_norms(block)} == {1}
        block.zero_grad()
        run(under_checkpoint(block, True), block_input())
        assert {int(bn.num_batches_tracked) for bn in batch_norms(block)} == {1 + moved}


def test_row26_once_when_the_recomputation_raises():
    """The statistics that were put aside come back."""
    block, _ = twins(BLOCKS["basic"], torch.float32, ONCE[0])
    calls = []

    def fail(module, args):
        calls.append(args)
        if len(calls) == 2:
            raise LookupError("planted")

    block.conv2.register_forward_pre_hook(fail)
    buffers = dict(block.named_buffers())
    y = checkpoint(block, block_input().requires_grad_(), use_reentrant=True)
    moved = state(block)
    with pytest.raises(LookupError, match="planted"):
        y.sum().backward()
    assert_bitwise(state(block), moved)
    assert all(t is buffers[name] for name, t in block.named_buffers())
