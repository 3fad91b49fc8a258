"""swap(memory="min") where somebody writes to what a norm made: it must not be computed again as it was."""

import pytest
import torch
from torch import nn

from swap_cases import assert_same
from train_cases import BLOCKS, TOLERANCES, block_input, gradients, run, twins, vision, weighted

MIN = {"memory": "min"}


def square():
    """A bottleneck whose convolutions' outputs have the shape of their inputs."""
    block = vision.Bottleneck(8, 2, downsample=nn.Identity())
    block.conv1, block.conv3 = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
    block.conv2, block.bn1, block.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    return block


@pytest.mark.parametrize("conv", ["conv2", "conv3"])
@pytest.mark.parametrize(
    ("hook", "pure", "kind"),
    [
        (lambda m, args: (args[0].mul_(2.0),), lambda m, args: (args[0] * 2.0,), "forward_pre"),
        (lambda m, args, y: y * args[0].mul_(2.0), lambda m, args, y: y * (args[0] * 2.0), "forward"),
    ],
)
def test_a_hook_that_writes_to_the_activation_is_noticed_or_followed(conv, hook, pure, kind):
    """What the convolution reads is then not the norm's output any more, and must not be computed again from it."""
    lean, stock = twins(square, torch.float32, MIN)
    getattr(stock.get_submodule(conv), f"register_{kind}_hook")(pure)
    getattr(lean.get_submodule(conv), f"register_{kind}_hook")(hook)
    x = block_input()
    wanted = run(stock, x)
    try:
        found = run(lean, x)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_same(found, wanted, TOLERANCES[torch.float32])


IN_PLACE = (nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.ReLU6, nn.Dropout)
OTHERS = nn.ELU(), nn.Tanh(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.Upsample(scale_factor=2)


@pytest.mark.parametrize("act", [*(act(inplace=True) for act in IN_PLACE), *OTHERS], ids=str)
def test_the_module_behind_a_norm_in_a_sequence(act):
    """In-place activations save what they wrote, where the norm's output lay."""
    first = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), act
    second = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    lean, stock = twins(lambda: nn.Sequential(*first, *second), torch.float32, MIN)
    x, found = block_input(), []
    for model in (lean, stock):
        torch.manual_seed(4)
        found.append(run(model, x))
    for results in found:  # behind a linear module, a bias in front of a convolution and a norm: 0, but for rounding
        if isinstance(act, nn.AvgPool2d | nn.Upsample | nn.MaxPool2d):
            assert results.pop("grad 1.bias").abs().max() < 1e-4
    assert_same(*found, tolerance=TOLERANCES[torch.float32])


def entry():
    """A convolution, BN and ReLU whose output, [N, 8, H, W], the norm's own backward does not keep."""
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


@pytest.mark.parametrize("second", ["basic", "bottleneck", "conv-norm-act"])
def test_an_output_scaled_without_autograd_is_noticed_or_read_as_it_is(second):
    """`y.mul_(2)` under no_grad leaves y's node in place, which would compute the unscaled y again."""
    lean, stock = twins(lambda: nn.Sequential(entry(), BLOCKS[second]()), torch.float32, MIN)
    x = block_input()
    wanted = stock[0](x)
    wanted = wanted + wanted.detach()
    weighted(stock[1](wanted)).backward()
    y = lean[0](x)
    with torch.no_grad():
        y.mul_(2.0)
    loss = weighted(lean[1](y))
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_same(gradients(lean), gradients(stock), TOLERANCES[torch.float32])
