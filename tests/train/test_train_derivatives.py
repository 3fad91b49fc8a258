"""Swapped blocks: derivatives of the second and third order, gradient penalties, a graph that is gone through again."""

import copy

import pytest
import torch
from torch import nn

from swap_cases import assert_same
from train_cases import TOLERANCES, assert_bitwise, block_input, block_twins, every, gradients, state, twins, vision


@every("option")
@pytest.mark.parametrize("train", [True, False])
def test_row19_gradcheck_to_second_order(options, train):
    block, _ = twins(lambda: vision.BasicBlock(2, 2), torch.float64, options)
    parameters = dict(block.train(train).named_parameters())

    def f(x, *values):
        return torch.func.functional_call(copy.deepcopy(block), dict(zip(parameters, values, strict=True)), (x,))

    leaves = [torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)]
    leaves += [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@every("option", "precision", "block")
def test_row19_gradient_penalty(options, dtype, name):
    """create_graph=True: the gradient of |dx|^2 with respect to every parameter, and dx itself."""
    block, stock = block_twins(name, dtype, options)
    x, found = block_input(dtype), []
    for model in (block, stock):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        (dx,) = torch.autograd.grad(y.square().mean(), leaf, create_graph=True)
        (dx.square().sum() + y.mean()).backward()
        assert dx.grad_fn is not None
        found.append({"first dx": dx.detach()} | gradients(model, x=leaf) | state(model))
    assert_same(*found, tolerance=10 * TOLERANCES[dtype])


class Formula(nn.Module):
    """A BasicBlock's training forward in elementary operations: right to any order, which eager's batch_norm is not."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def norm(self, x, bn):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        x_hat = (x - mean) * torch.rsqrt(var + bn.eps)
        return bn.weight.view(1, -1, 1, 1) * x_hat + bn.bias.view(1, -1, 1, 1)

    def forward(self, x):
        block = self.block
        y = torch.relu(self.norm(block.conv1(x), block.bn1))
        return torch.relu(self.norm(block.conv2(y), block.bn2) + x)


@every("option", "precision")
def test_row19_third_order_is_right(options, dtype):
    block, stock = twins(lambda: vision.BasicBlock(3, 3), dtype, options)
    x, found = torch.randn(2, 3, 4, 4, dtype=dtype), []
    for model in (block, Formula(stock)):
        leaf = x.clone().requires_grad_()
        out = model(leaf).square().mean()
        for _ in range(3):
            (g,) = torch.autograd.grad(out, leaf, create_graph=True)
            out = g.square().sum()
        found.append({"third": g.detach()})
    assert_same(*found, tolerance=1e-9 if dtype is torch.float64 else 1e-3)  # measured: 2e-15, 4e-6


@every("option", "block")
def test_retained_graph_gives_the_same_gradients_again(options, name):
    block, _ = block_twins(name, torch.float32, options)
    leaf = block_input().requires_grad_()
    moved = None
    y = block(leaf)
    runs = []
    for _ in range(3):
        block.zero_grad()
        leaf.grad = None
        y.square().sum().backward(retain_graph=True)
        runs.append(gradients(block, x=leaf))
        moved = moved or state(block)
    assert_bitwise(runs[1], runs[0])
    assert_bitwise(runs[2], runs[0])
    assert_bitwise(state(block), moved)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
