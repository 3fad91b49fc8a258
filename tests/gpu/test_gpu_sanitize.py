"""One small launch of every kernel for a GPU, forward and backward: for compute-sanitizer, which makes them slow.

Sizes leave a tail on every axis. Inputs and what is expected are made on the CPU, so that the kernels that run are ours
and the copies'.
"""

import pytest
import torch
from torch.nn import functional as F

from fastres import _dispatch
from fastres.functional import add_relu, bn_act, conv_act
from gpu_conv import exact, launch, pairs
from gpu_device import DEVICE, DRY, needs_device

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize, needs_device]
DTYPES = (torch.float32, torch.float16)
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
MEMORY = {1: torch.contiguous_format, 4: torch.channels_last}  # by dimensions


def backends(operator):
    """A mark: the test runs on each of the operator's backends that launch kernels of ours on a GPU."""
    return pytest.mark.parametrize(
        "gpu_backend", sorted({"triton", "cuda"} & set(_dispatch.OPERATORS[operator].backends))
    )


def usable(operator, backend, x):
    """Skips where the backend cannot run here; `make gpu` takes that for a failure on a GPU."""
    op, probe = _dispatch.OPERATORS[operator], torch.empty(1, 1, 1, 1, dtype=x.dtype, device=DEVICE)
    reasons = _dispatch.ordinary_refusals(op, op.backends[backend], probe)
    if reasons:
        pytest.skip(f"{'dry run: ' if DRY else ''}{'; '.join(reasons)}")


def random(shape, dtype, layout="nhwc"):
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def near(ours, wanted, dtype):
    """`wanted` is fp64."""
    tolerance = 2e-5 if dtype is torch.float32 else 4e-3
    error = (ours.cpu().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
    assert error <= tolerance, f"{error:.1e} of the largest value"


def moved(*tensors):
    return [t.to(DEVICE).requires_grad_() for t in tensors]


@backends("add_relu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_relu(gpu_backend, dtype):
    x, residual, dy = (random((3, 7, 5, 5), dtype) for _ in range(3))
    usable("add_relu", gpu_backend, x)
    a, b = moved(x, residual)
    y = add_relu(a, b, backend=gpu_backend)
    dx, dresidual = torch.autograd.grad(y, (a, b), dy.to(DEVICE))
    assert torch.equal(y.detach().cpu(), (x.float() + residual.float()).relu().to(dtype))
    wanted = torch.where(y.detach().cpu() <= 0, 0.0, dy).to(dtype)
    assert torch.equal(dx.cpu(), wanted) and torch.equal(dresidual.cpu(), wanted)


@backends("bn_act")
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bn_act(gpu_backend, dtype, layout, training):
    x, residual, dy = (random((3, 18, 5, 7), dtype, layout) for _ in range(3))
    usable("bn_act", gpu_backend, x)
    weight, bias, mean, var = torch.rand(18) + 0.5, torch.randn(18), torch.randn(18), torch.rand(18) + 0.5
    leaves = moved(x, weight, bias, residual)
    running = [t.to(DEVICE) for t in (mean, var)]
    y = bn_act(leaves[0], *running, *leaves[1:], training=training, backend=gpu_backend)
    grads = torch.autograd.grad(y, leaves, dy.to(DEVICE))

    exact = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
    z = F.batch_norm(exact[0], mean.double(), var.double(), *exact[1:3], training) + exact[3]
    mask = y.detach().cpu() > 0  # the output's own: one at the threshold may fall on either side
    near(y.detach(), z.detach().relu(), dtype)
    for ours, wanted in zip(grads, torch.autograd.grad(z, exact, dy.double() * mask), strict=True):
        near(ours, wanted, dtype)


@pytest.mark.parametrize("size, stride, groups", ((1, 1, 1), (3, 2, 1), (3, 1, 2)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_act_in_triton(dtype, size, stride, groups, monkeypatch):
    x = random((2, 32, 7, 9), dtype)
    weight = random((40, 32 // groups, size, size), dtype) / (32 * size**2) ** 0.5
    usable("conv_act", "triton", x)
    how = {"stride": stride, "padding": size // 2, "groups": groups}
    z = F.conv2d(x.double(), weight.double(), **how)
    bias, residual = torch.randn(40).to(dtype), random(z.shape, dtype)
    given = [t.to(DEVICE) for t in (x, weight, bias, residual)]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.no_grad():
        y = conv_act(*given, **how, backend="triton")
    near(y, (z + bias.double().view(1, -1, 1, 1) + residual.double()).relu(), dtype)


def test_conv_act_in_cuda(kernel):
    """Integers, which are exact; a bias and a residual once, and once neither."""
    dtype, how = getattr(torch, kernel.element), pairs(2, 1)
    x, weight, bias, residual = (
        torch.randint(-2, 3, shape).to(dtype) for shape in ((2, 40, 13, 15), (72, 40, 3, 3), (72,), (2, 72, 7, 8))
    )
    for tensors in ((x, weight, bias, residual), (x, weight, None, None)):
        given = [t if t is None else t.to(DEVICE, memory_format=MEMORY[t.dim()]) for t in tensors]
        wanted = exact(*tensors, how).relu().to(dtype)
        y = launch(kernel, *given, how, "relu")
        assert torch.equal(y.cpu(), wanted)
