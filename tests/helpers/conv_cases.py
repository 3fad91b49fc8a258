"""conv_act's calls and what stock PyTorch makes of them."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

from fastres._dispatch import OPERATORS, refusals
from fastres.ops._tensors import stats_dtype
from fastres.ops.conv_act import _kind
from referee import layout

EAGER = {"relu": F.relu, "none": lambda z: z, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}
GEOMETRY = [  # kernel, stride, padding, dilation
    (1, 1, 0, 1), (1, 2, 0, 1), (2, 1, 1, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 3, 0, 1), (3, 1, 2, 2), (5, 2, 3, 1),
    (4, 3, 2, 2), (6, 1, 3, 1), (7, 2, 3, 1), ((1, 3), (2, 1), (0, 1), (1, 2)),
]  # fmt: skip


def skip_if_refused(how, *args, **kwargs):
    reasons = refusals(OPERATORS["conv_act"].backends[how], args[0], _kind(*args, **kwargs))
    if reasons:
        pytest.skip("; ".join(reasons))


def eager(x, weight, bias=None, residual=None, scale=None, act="relu", **how):
    """With a scale the formula, in fp64 for fp64 tensors, in the statistics' dtype for others."""
    z = F.conv2d(x, weight, bias if scale is None else None, **how)
    if scale is not None:
        z = z.to(stats_dtype(x)) * scale[:, None, None]
        z = z if bias is None else z + bias[:, None, None]
    return EAGER[act](z if residual is None else z + residual).to(x.dtype)


def problem(c, k, size, geometry, dtype=torch.float32, kind="channels_last", groups=1, residual=True, integer=False):
    """(x, weight, bias, residual), and the keyword arguments of the call."""
    kernel, stride, padding, dilation = geometry
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel

    def draw(*shape):
        t = torch.randint(-2, 3, shape).float() if integer else torch.randn(shape)
        return t.to(dtype)

    x, weight = layout(draw(2, c, *size), kind), draw(k, c // groups, *kernel)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    like = F.conv2d(x.float(), weight.float(), None, **how)
    r = draw(*like.shape).contiguous(memory_format=torch.channels_last) if residual else None
    return x, weight, draw(k), r, how


def convolutions(name):
    """(x's size, the layer) of every convolution of a network of torchvision at 224 x 224."""
    found = {}
    with torch.device("meta"):
        net = getattr(torchvision.models, name)(weights=None).eval()
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.register_forward_pre_hook(lambda m, inputs: found.setdefault((tuple(inputs[0].shape[2:]), m)))
    with torch.no_grad():
        net(torch.empty(2, 3, 224, 224, device="meta"))
    return list(found)


def assert_outputs_and_gradients_agree(got, want, ours, theirs):
    """Compare two outputs, and the gradients of what they are made of, which exist in both or in neither."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if want.requires_grad:
        dy = torch.randn_like(want)
        got.backward(dy)
        want.backward(dy)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
