"""A gradient that nobody else holds may be written over in backward; whoever does hold it must find it unchanged.

The kernels ask for the owners of large gradients alone. Here every size counts as large, so that the small blocks of
these tests take that way.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastres.ops import _bn_autograd, _ownership
from train_cases import (
    FREEZES,
    assert_bitwise,
    block_input,
    block_twins,
    every,
    gradients,
    in_threads,
    run,
    stage,
    twins,
    weighted,
)

NEVER = 1 << 62


@pytest.fixture(autouse=True)
def from_size(monkeypatch):
    """`from_size(n)`: gradients of n elements and more may be written over; to begin with, every one."""
    _ownership.learn()
    if _ownership._unshared is None:
        pytest.skip("the owners of a gradient cannot be told here: nothing is written over")

    def change(size):
        monkeypatch.setattr(_bn_autograd, "REUSE_FROM", size)

    change(1)
    return change


@pytest.fixture
def assert_independent(from_size):
    """Asserts that a function's results are the same bits whether gradients are written over or not."""

    def check(results):
        found = []
        for size in (1, NEVER):
            from_size(size)
            torch.manual_seed(3)
            found.append(results())
        assert_bitwise(*found)

    return check


def again(block, x, times=3):
    """The gradients of the last of several backwards through one graph."""
    leaf = x.clone().requires_grad_()
    loss = weighted(block(leaf))
    for i in range(times):
        block.zero_grad()
        leaf.grad = None
        loss.backward(retain_graph=i < times - 1)
    return gradients(block, x=leaf)


@pytest.fixture
def learns_again(monkeypatch):
    for name, value in (("_unshared", None), ("_learnt", False), ("_attempts", 3)):
        monkeypatch.setattr(_ownership, name, value)


@pytest.mark.parametrize("watched", [True, False])
def test_counts_are_learnt_where_nobody_watches(learns_again, watched):
    """A profiler that records shapes holds each node's inputs while it runs: one owner more, and no baseline."""
    with torch.profiler.profile(record_shapes=True, acc_events=True) if watched else nullcontext():
        _ownership.learn()
    assert (_ownership._unshared is None) is watched
    _ownership.learn()
    assert _ownership._unshared[1:] == (2, 1)


def test_gradients_are_written_over_here(learns_again):
    """The way under test is taken: with addresses, since nothing else shows it. Learning has a few attempts."""
    block, _ = twins(lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    seen = {}

    def before(grads):
        seen["dy"] = grads[0].data_ptr()

    def after(grad):
        seen["dx"] = grad.data_ptr()

    block[0].register_forward_hook(lambda module, args, y: y.register_hook(after) and None)
    for _ in range(_ownership._attempts):
        y = block(block_input())
        y.grad_fn.register_prehook(before)
        (y * 2.0).sum().backward()
        if seen["dx"] == seen["dy"]:
            break
    assert seen["dx"] == seen["dy"], (_ownership._unshared, _ownership._attempts)


@every("option", "block")
@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_do_not_depend_on_it(assert_independent, options, name, cast, channels_last):
    def results(train):
        block, _ = block_twins(name, torch.float32, options)
        x = block_input(n=4, size=7)
        if channels_last:
            block, x = block.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        return run(block.train(train), x, cast=cast)

    for train in (True, False):
        assert_independent(partial(results, train))


@every("option")
@pytest.mark.parametrize("kind", FREEZES)
def test_results_do_not_depend_on_it_with_frozen_parts(assert_independent, options, kind):
    def results():
        block, _ = twins(stage, torch.float32, options)
        FREEZES[kind](block)
        return again(block, block_input())

    assert_independent(results)


# ---- those who hold the gradient -------------------------------------------------------------------------------------


class Sends(torch.autograd.Function):
    """Passes on a gradient of its own: a tensor that it keeps for the next time.

    (An array that it lends by `torch.from_numpy` alone is nobody's to PyTorch: its engine adds into that, too.)
    """

    @staticmethod
    def forward(ctx, y, kept, how="itself"):
        ctx.kept, ctx.how, ctx.shape = kept.flatten() if how == "as a view" else kept, how, y.shape
        if how == "saved":
            ctx.save_for_backward(kept)
        return y.sum()

    @staticmethod
    def backward(ctx, _):
        kept = ctx.saved_tensors[0] if ctx.how == "saved" else ctx.kept
        return kept.view(ctx.shape) if ctx.how == "as a view" else kept, None, None


HOLDERS = {
    "the tensor": lambda g: g,
    "a detached one": lambda g: g.detach(),
    "a view": lambda g: g.flatten(),
    "a slice": lambda g: g[1:],
    "a numpy array": lambda g: g.numpy(),
    "the storage": lambda g: g.untyped_storage(),
    "a capsule": lambda g: torch.utils.dlpack.to_dlpack(g),
    "a parameter": lambda g: nn.Parameter(g),
    "a tuple in a dict": lambda g: {"g": (g,)},
}


def values(kept):
    """What a holder finds, as one flat tensor."""
    if isinstance(kept, dict):
        kept = kept["g"][0]
    if isinstance(kept, torch.UntypedStorage):
        return torch.frombuffer(bytearray(bytes(kept)), dtype=torch.float32)
    if type(kept).__name__ == "PyCapsule":
        kept = torch.utils.dlpack.from_dlpack(kept)
    return torch.as_tensor(kept).detach().flatten().clone()


@every("option", "block")
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_hook_that_keeps_the_gradient_finds_it_unchanged(options, name, holder):
    """On the block's output and on the output of every convolution inside."""
    block, _ = block_twins(name, torch.float32, options)
    kept, wanted = [], []

    def hook(g):
        kept.append(HOLDERS[holder](g))
        wanted.append(values(HOLDERS[holder](g)) if holder != "a capsule" else g.flatten().clone())

    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, y: y.register_hook(hook) and None)
    y = block(block_input())
    y.register_hook(hook)
    weighted(y).backward()
    assert len(kept) > 1
    for found, t in zip(kept, wanted, strict=True):
        assert torch.equal(values(found), t)


@every("option", "block")
@pytest.mark.parametrize("how", ["itself", "saved", "as a view"])
def test_a_function_that_sends_a_tensor_of_its_own_gets_it_back_unchanged(options, name, how):
    block, _ = block_twins(name, torch.float32, options)
    y = block(block_input())
    kept = torch.randn_like(y)
    before = kept.clone()
    loss = Sends.apply(y, kept, how)
    first = None
    for i in range(3):
        block.zero_grad()
        loss.backward(retain_graph=i < 2)
        first = first or gradients(block)
        assert torch.equal(kept, before)
        assert_bitwise(gradients(block), first)


@every("option", "block")
def test_gradients_given_and_asked_for_stay(options, name):
    """backward(dy), grad_outputs, retain_grad, an intermediate among the inputs of autograd.grad, a node's pre-hook."""
    block, stock = block_twins(name, torch.float32, options)
    x = block_input()
    y = block(x)
    dy = torch.randn_like(y)
    before = dy.clone()
    y.backward(dy)
    assert torch.equal(dy, before)
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(block(leaf), leaf, dy)
    assert torch.equal(dy, before)
    y = block(leaf)
    y.retain_grad()
    (y * before).sum().backward()
    assert torch.equal(y.grad, before)
    y = block(leaf)
    found = torch.autograd.grad((y * before).sum(), (y, leaf, *block.parameters()))
    assert torch.equal(found[0], before)
    y, kept = block(leaf), []
    y.grad_fn.register_prehook(lambda grads: kept.append(grads[0]))
    torch.autograd.graph.register_multi_grad_hook((y,), lambda grads: kept.append(grads[0]))
    (y * before).sum().backward()
    assert len(kept) == 2 and all(torch.equal(g, before) for g in kept)


@every("option", "block")
def test_gradients_that_go_two_ways(assert_independent, options, name):
    """One gradient for two branches, a leaf beside the block, a view, an expanded one, a sum of both halves."""

    def losses(y, leaf, other):
        z = y + leaf
        yield (z * other).sum()
        yield (torch.cat([y, y], 1) ** 2).sum() + y.sum()
        yield y.mean()
        yield (y.flatten(1) + y.flatten(1).detach()).square().sum()
        yield (y.chunk(2, 0)[0] * 2).sum() + y.permute(0, 2, 3, 1).square().sum()
        yield (torch.relu(y) - y).sum() + torch.maximum(y, leaf).sum()

    def results():
        block, _ = block_twins(name, torch.float32, options)
        x = block_input().requires_grad_()
        shape = block(x).shape
        leaf, other = torch.randn(shape, requires_grad=True), torch.randn(shape)
        each = {}
        for i in range(6):
            block.zero_grad()
            x.grad = leaf.grad = None
            list(losses(block(x), leaf, other))[i].backward()
            each |= {f"{i} {n}": g for n, g in gradients(block, x=x, leaf=leaf).items()}
        return each

    assert_independent(results)


@every("option")
def test_module_hooks_anomaly_mode_and_checkpoint(assert_independent, options):
    def results():
        block, _ = twins(stage, torch.float32, options)
        x, kept = block_input().requires_grad_(), []
        for module in block:
            module.register_full_backward_hook(lambda m, gx, gy: kept.extend([*gx, *gy]))
        with torch.autograd.set_detect_anomaly(True):
            y = checkpoint(block[1], block[0](x), use_reentrant=True)
            weighted(checkpoint(block[3], block[2](y), use_reentrant=False)).backward()
        return {f"kept {i}": g.clone() for i, g in enumerate(kept)} | gradients(block, x=x)

    assert_independent(results)


@every("option")
def test_gradient_penalty(assert_independent, options):
    def results():
        block, _ = twins(stage, torch.float32, options)
        x = block_input().requires_grad_()
        y = block(x)
        (dx,) = torch.autograd.grad(weighted(y), x, create_graph=True)
        (dx.square().sum() + y.square().mean()).backward()
        return {"dx": dx.detach()} | gradients(block, x=x)

    assert_independent(results)


@every("option")
def test_backward_in_other_threads(from_size, options):
    """Four threads, each its own graph and its own kept gradient; the counts are the same there."""
    torch.manual_seed(3)
    jobs = [(twins(stage, torch.float32, options)[0], block_input()) for _ in range(4)]

    def work(i, times=5):
        block, x = jobs[i]
        y = block(x)
        kept = torch.randn(y.shape, generator=torch.Generator().manual_seed(i))
        before = kept.clone()
        for _ in range(times):
            block.zero_grad()
            Sends.apply(y, kept).backward(retain_graph=True)
        assert torch.equal(kept, before)
        return gradients(block)

    found = in_threads(4, work)
    from_size(NEVER)
    for i, gradient in enumerate(found):
        assert_bitwise(gradient, work(i, times=1))
