"""Swapped blocks: what may change between a forward and its backward, and what autograd must notice."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fastres.swap import swap
from swap_cases import assert_same, fused_calls, images, step
from train_cases import (
    TOLERANCES,
    batch_norms,
    block_input,
    block_twins,
    every,
    only_gradients,
    outcome,
    run,
    tiny_twins,
)

IN_PLACE = "modified by an inplace operation"


@every("option", "precision", "block")
def test_backward_after_revert(options, dtype, name):
    """The graph of a forward outlives the swap: its gradients stay right, and later steps are stock ones."""
    _, stock = block_twins(name, dtype, options)
    block, x = copy.deepcopy(stock), block_input(dtype)
    report = swap(block, **options)
    ours = run(block, x, between=report.revert)
    assert fused_calls(copy.deepcopy(block), x) == 0
    assert_same(ours, run(stock, x), TOLERANCES[dtype])
    assert_same(step(block, x), step(stock, x), TOLERANCES[dtype])


@every("option", "precision", "block")
@pytest.mark.parametrize("frozen", [None, "x", "norms"])
def test_row24_a_parameter_changed_before_backward_is_noticed(options, dtype, name, frozen):
    """By autograd's version error wherever the stock block gives one; elsewhere an error too, or the right gradients:
    where no gradient needs a tensor it is not kept, and may change.

    (Eager saves a convolution's weight and a BN's weight; a BN's bias is read by no stock backward.)
    """
    _, stock = block_twins(name, dtype, options)
    x = block_input(dtype)
    for parameter, _ in stock.named_parameters():
        found = []
        for model in block_twins(name, dtype, options):
            for bn in batch_norms(model) if frozen == "norms" else ():
                bn.requires_grad_(False)

            @torch.no_grad()
            def change(model=model, parameter=parameter):
                model.get_parameter(parameter).mul_(-2.0)

            found.append(outcome(partial(run, model, x, needs_x=frozen != "x", between=change)))
        ours, theirs = found
        assert not isinstance(theirs, Exception) or IN_PLACE in str(theirs)
        if isinstance(ours, Exception):
            assert isinstance(ours, RuntimeError) and IN_PLACE in str(ours), f"{parameter}: {ours!r:.200}"
        else:
            assert not isinstance(theirs, Exception), f"{parameter}: eager notices {theirs!r:.200}"
            assert_same(ours, theirs, TOLERANCES[dtype])


@every("option", "precision", "block")
def test_row24_x_or_a_convolutions_output_changed_before_backward_is_noticed(options, dtype, name):
    for where in ("x", "convolution", "y"):
        block, _ = block_twins(name, dtype, options)
        inner = []
        conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
        conv.register_forward_hook(lambda module, args, y, inner=inner: inner.append(y))
        x = block_input(dtype).requires_grad_() * 1
        y = block(x)
        with torch.no_grad():
            {"x": x, "convolution": inner[0], "y": y}[where].add_(1.0)
        if where == "y":  # kept for its sign alone, or not at all: an error, or the gradients of the unchanged y
            assert not isinstance(error := outcome(lambda y=y: y.sum().backward()), Exception) or IN_PLACE in str(error)
            continue
        with pytest.raises(RuntimeError, match=IN_PLACE):
            y.sum().backward()


@every("option")
def test_an_optimizer_step_between_forward_and_backward_is_noticed(options):
    net, stock = tiny_twins(torch.float32, options)
    for model in (net, stock):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first, second = model(images(dtype=torch.float32)), model(images(dtype=torch.float32))
        first.sum().backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=IN_PLACE):
            second.sum().backward()


@every("option", "block")
def test_statistics_changed_before_backward_do_not_matter(options, name):
    """In both modes the forward's own statistics are used: buffers loaded or reset in between are another matter."""
    for train in (True, False):
        block, stock = block_twins(name, torch.float32, options)
        x = block_input()

        def change(block=block):
            for bn in batch_norms(block):
                bn.running_mean = bn.running_mean + 7
                bn.running_var.fill_(3.0)

        ours, wanted = run(block.train(train), x, between=change), run(stock.train(train), x)
        assert_same(only_gradients(ours), only_gradients(wanted), TOLERANCES[torch.float32])


@every("option", "block")
def test_a_gradient_of_another_shape_is_refused(options, name):
    block, _ = block_twins(name, torch.float32, options)
    for bad in (lambda y: y[:, :1], lambda y: y.flatten(), lambda y: y[None]):
        y = block(block_input())
        with pytest.raises(RuntimeError, match="Mismatch in shape"):
            y.backward(bad(torch.ones_like(y)))
