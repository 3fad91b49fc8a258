"""What the tests of training share: blocks of every family with a swapped twin, the options of swap, snapshots."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fastres.swap import swap
from swap_cases import fused_calls, hugging_face_resnet, projection, scramble, tiny, torchvision

vision = torchvision.models.resnet

# Every way in which a swapped model may train: what holds for one must hold for all.
OPTIONS = [{}, {"memory": "min"}]

# float64 goes through the reference and shows the wiring; float32 through the kernels that users run. Relative to each
# tensor's largest value; measured in float32 over the blocks below: at most 4e-6.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-5}


def timm_block():
    timm = pytest.importorskip("timm")
    return timm.models.resnet.Bottleneck(8, 4, downsample=projection(8, 16, 1))


def hugging_face_block():
    return hugging_face_resnet().ResNetBasicLayer(8, 16, 2)


# Each takes [N, 8, H, W].
BLOCKS = {
    "basic": lambda: vision.BasicBlock(8, 8),
    "basic-projection": lambda: vision.BasicBlock(8, 16, 2, projection(8, 16, 2)),
    "bottleneck": lambda: vision.Bottleneck(8, 4, 2, projection(8, 16, 2)),
    "bottleneck-groups": lambda: vision.Bottleneck(8, 2, groups=2, base_width=128),
    "conv-norm-act": lambda: torchvision.ops.Conv2dNormActivation(8, 6, 3, 2),
    "timm": timm_block,
    "hugging face": hugging_face_block,
}


def batch_norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def twins(build, dtype=torch.float32, options=None):
    """(a swapped block in training mode, the stock one it was copied from), every BN of the first a fused call."""
    torch.manual_seed(1)
    stock = scramble(build()).to(dtype).train()
    block = copy.deepcopy(stock)
    swap(block, strict=True, **(options or {}))
    return block, stock


def block_twins(name, dtype=torch.float32, options=None):
    block, stock = twins(BLOCKS[name], dtype, options)
    assert fused_calls(copy.deepcopy(block), block_input(dtype)) == len(batch_norms(block))
    return block, stock


def tiny_twins(dtype=torch.float32, options=None):
    return twins(lambda: tiny(dtype), dtype, options)


def block_input(dtype=torch.float32, n=3, size=6, channels=8):
    return torch.randn(n, channels, size, size, dtype=dtype)


def gradients(net, **leaves):
    """Clones of the parameters' gradients by name, and of the leaves' as "d<name>"."""
    found = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    found |= {f"grad {name}": p.grad for name, p in net.named_parameters()}
    return {name: g.clone() for name, g in found.items() if g is not None}


def state(net):
    """Clones of every parameter and buffer."""
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def assert_bitwise(got, wanted):
    """The same keys, dtypes, shapes and bits; NaN beside NaN is the same."""
    assert list(got) == list(wanted)
    for name, t in wanted.items():
        assert got[name].dtype == t.dtype and got[name].shape == t.shape, name
        same = (got[name] == t) | ((got[name] != got[name]) & (t != t))
        assert same.all(), f"{name}: {int((~same).sum())} of {t.numel()} elements differ"


def outcome(function):
    """What `function` returns, or the exception it raises."""
    try:
        return function()
    except Exception as error:
        return error


def weighted(y):
    """A loss that tells every element of y apart."""
    return (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()


def run(block, x, loss=weighted, cast=None, around=nullcontext, needs_x=True, between=lambda: None):
    """Output, gradients and state of one forward, under autocast to `cast`, then `between`, then one backward."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_x)
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None), around():
        y = block(leaf)
    between()
    loss(y.float() if cast else y).backward()
    found = {"y": y.detach()} | gradients(block, x=leaf) | state(block)
    return {name.replace("_orig_mod.", ""): t for name, t in found.items()}  # of a compiled block


def only_gradients(found):
    return {name: t for name, t in found.items() if name.startswith(("dx", "grad "))}


def in_threads(count, work):
    """What work(0), ..., work(count - 1) return, called at once."""
    start, found = threading.Barrier(count), {}

    def call(i):
        start.wait()
        found[i] = work(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count, "a thread raised"
    return [found[i] for i in range(count)]


# What training may leave out of any network.
FREEZES = {
    "norms in eval": lambda net: [bn.eval() for bn in batch_norms(net)],
    "norms in eval, no gradients": lambda net: [bn.eval().requires_grad_(False) for bn in batch_norms(net)],
    "every second norm in eval": lambda net: [bn.eval() for bn in batch_norms(net)[::2]],
    "norm weights": lambda net: [bn.weight.requires_grad_(False) for bn in batch_norms(net)],
    "norm biases": lambda net: [bn.bias.requires_grad_(False) for bn in batch_norms(net)],
    "norms without gradients": lambda net: [bn.requires_grad_(False) for bn in batch_norms(net)],
    "convolutions": lambda net: [m.requires_grad_(False) for m in net.modules() if isinstance(m, nn.Conv2d)],
}


def stage():
    """Four blocks: residuals that are block outputs themselves."""
    return nn.Sequential(*(BLOCKS[name]() for name in ("basic", "bottleneck-groups", "basic", "bottleneck")))


BUILDS = {**BLOCKS, "stage": stage}
AXES = {
    "option": pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default"),
    "precision": pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32"]),
    "block": pytest.mark.parametrize("name", BLOCKS),
    "build": pytest.mark.parametrize("name", BUILDS),
}


def every(*axes):
    """Run a test for every option of swap, precision, block: for each combination of those that are named."""

    def parametrized(test):
        for axis in reversed(axes):
            test = AXES[axis](test)
        return test

    return parametrized
