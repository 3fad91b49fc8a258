"""swap(memory="min"): the default's results bit for bit, in every way of training.

What holds for it as for the default is tested in the other test_train_*.py, over train_cases.OPTIONS. Bitwise is asked
of the cpu backend in float32 and below it; float64 goes through the reference, and is the same to its rounding.
"""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fastres.swap import swap, unswap
from referee import LAYOUTS, layout
from swap_cases import assert_same, fused_calls, images, tiny
from train_cases import (
    BLOCKS,
    BUILDS,
    FREEZES,
    assert_bitwise,
    batch_norms,
    block_input,
    every,
    gradients,
    run,
    stage,
    state,
    twins,
    weighted,
)

MIN = {"memory": "min"}
CASTS = [None, torch.bfloat16, torch.float16]


def lean_and_default(build, dtype=torch.float32):
    """(a block swapped with memory="min", the same swapped with the default)."""
    lean, stock = twins(build, dtype, MIN)
    swap(stock, strict=True)
    return lean, stock


# ---- the same results ------------------------------------------------------------------------------------------------


@every("build")
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("train", [True, False])
def test_results_are_the_defaults_bit_for_bit(name, cast, train):
    for kind in LAYOUTS:
        lean, default = lean_and_default(BUILDS[name])
        x = layout(block_input(n=4, size=7), kind)
        assert_bitwise(run(lean.train(train), x, cast=cast), run(default.train(train), x, cast=cast))


@every("build")
@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
def test_momentum_and_untracked_statistics(name, momentum):
    lean, default = lean_and_default(BUILDS[name])
    for model in (lean, default):
        for bn in batch_norms(model)[::2]:
            bn.momentum = momentum
        batch_norms(model)[-1].track_running_stats = False
    for _ in range(2):
        x = block_input()
        assert_bitwise(run(lean, x), run(default, x))


def test_float64_runs_through_the_reference():
    lean, default = lean_and_default(stage, torch.float64)
    x = block_input(torch.float64)
    assert_same(run(lean, x, lambda y: y.square().sum()), run(default, x, lambda y: y.square().sum()), 1e-12)


@every("build")
@pytest.mark.parametrize(
    ("kind", "needs_x"), [*itertools.product(FREEZES, (True, False)), ("all parameters", True)], ids=str
)
def test_frozen_parts(name, kind, needs_x):
    found, x = [], block_input()
    for model in lean_and_default(BUILDS[name]):
        FREEZES.get(kind, lambda net: net.requires_grad_(False))(model)
        found.append(run(model, x, needs_x=needs_x))
    assert_bitwise(*found)


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["basic", "bottleneck", "timm", "hugging face", "stage"])
def test_what_the_convolutions_inside_read_is_not_kept(name):
    """By the storages that are alive after the forward: this is the point of it, and shows that it is no no-op."""
    kept = []
    for model in lean_and_default(BUILDS[name]):
        read = []
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            conv.register_forward_pre_hook(
                lambda m, args, read=read: read.append(StorageWeakRef(args[0].untyped_storage()))
            )
        x = block_input()
        y = model(x)
        kept.append([not reference.expired() for reference in read if reference.cdata != x.untyped_storage()._cdata])
        y.sum().backward()
    assert all(kept[1]) and len(kept[1]) > 0
    assert not any(kept[0])


def test_a_network_without_gradients_is_left_alone():
    lean, default = lean_and_default(tiny)
    x = images(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(lean(x), default(x)) and torch.equal(lean.eval()(x), default.eval()(x))


# ---- ways to train ---------------------------------------------------------------------------------------------------


def second_derivatives(model, x):
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().mean(), x, create_graph=True)
    return torch.cat([dx.square().flatten(), y.flatten()])


def under(hooks):
    def forward(model, x):
        with hooks():
            return model(x)

    return forward


def some_blocks_under_checkpoint(model, x, reentrant):
    """A block that keeps nothing of its output in front of one that is run again, and behind it."""
    y = checkpoint(model[1], model[0](x), use_reentrant=reentrant)
    return model[3](checkpoint(model[2], y, use_reentrant=reentrant))


def compiled(model, x, cast):
    """Ignored there; equal to the default compiled the same way."""
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        return torch.compile(model, fullgraph=True, backend="aot_eager")(x).float()


def outputs_read_elsewhere(model, x):
    """A detached view, a sum, a concatenation, a pool of somebody else's: each keeps what it needs by itself."""
    inner = model[0](x)
    y = model[1](inner)
    z = torch.cat([y, inner, y.detach() * inner], 1).square().sum() + nn.functional.max_pool2d(y, 2).sum()
    return torch.stack([z, model[3](model[2](y)).square().sum()])


# Hooks on saved tensors are somebody else's memory: they see what the default saves.
WAYS = {
    "second derivatives": second_derivatives,
    "checkpoint": partial(checkpoint, use_reentrant=False),
    "checkpoint, reentrant": partial(checkpoint, use_reentrant=True),
    "saved on the CPU": under(save_on_cpu),
    "copied when saved": under(partial(saved_tensors_hooks, lambda t: t.clone(), lambda t: t)),
}
WAYS_OF_A_STAGE = {
    "some blocks under checkpoint": partial(some_blocks_under_checkpoint, reentrant=False),
    "some blocks under checkpoint, reentrant": partial(some_blocks_under_checkpoint, reentrant=True),
    "compiled": partial(compiled, cast=None),
    "compiled under autocast": partial(compiled, cast=torch.bfloat16),
    "outputs read elsewhere": outputs_read_elsewhere,
}
EVERY_WAY = [*itertools.product(BUILDS, WAYS), *itertools.product(["stage"], WAYS_OF_A_STAGE)]


@pytest.mark.parametrize(("name", "way"), EVERY_WAY)
def test_every_way_to_train_gives_the_defaults_bits(name, way, fresh_compiler):
    x, found = block_input(), []
    for model in lean_and_default(BUILDS[name]):
        leaf = x.clone().requires_grad_()
        y = (WAYS | WAYS_OF_A_STAGE)[way](model, leaf)
        weighted(y).backward()
        found.append({"y": y.detach()} | gradients(model, x=leaf) | state(model))
    assert_bitwise(*found)


def test_backward_under_other_hooks_than_the_forward():
    lean, default = lean_and_default(stage)
    found, x = [], block_input()
    for model in (lean, default):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        with save_on_cpu():
            y.square().sum().backward()
        found.append(gradients(model, x=leaf))
    assert_bitwise(*found)


def test_copies_pickles_and_revert():
    lean, default = lean_and_default(tiny)
    for twin in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert {b.fastres_memory for b in twin.modules() if hasattr(b, "fastres_memory")} == {"min"}
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in lean.parameters()}
    x = images(dtype=torch.float32)
    wanted = run(copy.deepcopy(default), x)
    assert_bitwise(run(copy.deepcopy(lean), x), wanted)
    assert_bitwise(run(pickle.loads(pickle.dumps(lean)), x), wanted)
    assert list(lean.state_dict()) == list(tiny().state_dict())
    unswap(lean)
    assert not any("fastres" in name for m in lean.modules() for name in vars(m))
    assert fused_calls(lean, x) == 0


def test_copied_while_a_graph_is_alive():
    lean, _ = lean_and_default(stage)
    x = block_input().requires_grad_()
    y = lean(x)
    twin = copy.deepcopy(lean)
    pickle.dumps(lean)
    assert_bitwise(run(twin, x), run(copy.deepcopy(lean), x))
    y.sum().backward()


# ---- parts of graphs -------------------------------------------------------------------------------------------------


def test_gradients_of_some_inputs_alone():
    lean, default = lean_and_default(stage)
    names = [name for name, _ in default.named_parameters()]
    x, found = block_input(), []
    for model in (lean, default):
        y = model(x)
        each = {}
        for name in names:
            (each[name],) = torch.autograd.grad(y.square().sum(), model.get_parameter(name), retain_graph=True)
        found.append(each)
    assert_bitwise(*found)


def test_two_heads_on_one_trunk():
    """Backward through both at once, or one by one with the graph retained; freed, the trunk's output is gone."""
    found, x = [], block_input()
    for options in (MIN, {}):
        trunk, left, right = (twins(BLOCKS["basic"], torch.float32, options)[0] for _ in range(3))
        y = trunk(x)
        losses = left(y).square().sum(), right(y * 1).sum(), right(y).square().mean()
        losses[0].backward(retain_graph=True)
        losses[1].backward(retain_graph=True)
        losses[2].backward()
        found.append(gradients(nn.ModuleList([trunk, left, right])))
    assert_bitwise(*found)
    trunk, left, right = (twins(BLOCKS["basic"], torch.float32, MIN)[0] for _ in range(3))
    y = trunk(x)
    losses = left(y).sum(), right(y).sum()
    losses[0].backward()
    with pytest.raises(RuntimeError, match="second time"):  # what the default keeps for this call, min has not kept
        losses[1].backward(inputs=list(right.parameters()))
