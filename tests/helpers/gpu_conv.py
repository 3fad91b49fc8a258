"""What the tests of conv_act's CUDA kernels share: the kernels of this build, one launch, tensors between guards.

In a dry run (FASTRES_TEST_DEVICE=cpu) a stand-in computes on the CPU: that the tests run and compare what
they should is then proven, and nothing about a kernel.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastres.ops  # noqa: F401  (declares the operators that fastres._C_cuda implements)
from fastres import _extension
from fastres.ops import _conv_tiles
from fastres.ops._conv_backends import output_size
from gpu_device import DEVICE, DRY

NAN = float("nan")
BACKEND = "cpu" if DRY else "cuda"
ELEMENTS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ACTS = {"relu": torch.relu, "none": lambda z: z, "relu6": lambda z: F.hardtanh(z, 0.0, 6.0)}
LAST = torch.channels_last
EDGE = 64  # elements before and behind a tensor that must stay NaN: whole vectors in every dtype


def _kernels():
    if DRY:
        sizes = {"pixels": 64, "channels": 64, "depth": 64, "cluster": 1, "threads": 128, "shared_bytes": 0}
        what = {"architecture": 80, "splits_depth": False} | sizes
        named = itertools.product(("stand_in", "other"), ELEMENTS)  # conv_act takes the first
        return [_conv_tiles.Kernel(i, name, element, **what) for i, (name, element) in enumerate(named)]
    return list(_conv_tiles.kernels()) or [None]


KERNELS = _kernels()


def need(kernel):
    """Skips a kernel that this GPU does not run, with a reason that `make gpu` takes from the hardware alone."""
    if kernel is None:
        pytest.skip(_extension.why_not_cuda() or "CUTLASS is not installed: fastres._C_cuda has no convolutions")
    if not DRY and not kernel.runs_on(torch.cuda.get_device_capability()):
        pytest.skip(f"needs compute capability {kernel.architecture / 10}")


def kernels_for(dtype):
    """The kernels of this dtype that run here; skips where there is none."""
    found = [k for k in KERNELS if k is not None and ELEMENTS[k.element] is dtype]
    if not found:
        need(None)
    return [k for k in found if DRY or k.runs_on(torch.cuda.get_device_capability())]


def chosen(kernels, x, weight, how, residual):
    """The one of them that conv_act takes."""
    if DRY:
        return kernels[0]
    problem = _conv_tiles.Problem(torch.cuda.get_device_capability(), x.dtype, shape_of(x, weight, how), residual)
    return _conv_tiles.choose(problem, torch.cuda.get_device_properties(DEVICE).multi_processor_count)


# ---- calls -----------------------------------------------------------------------------------------------------------


def pairs(stride=1, padding=0, dilation=1):
    """A convolution's geometry, two numbers each."""
    given = {"stride": stride, "padding": padding, "dilation": dilation}
    return {name: (v, v) if isinstance(v, int) else v for name, v in given.items()}


def shape_of(x, weight, how):
    """N, H, W, C, K, R, S, P, Q, stride, padding, dilation: as _conv_tiles has it."""
    (n, c, h, w), (k, _, r, s) = x.shape, weight.shape
    return n, h, w, c, k, r, s, *output_size((h, w), (r, s), **how), *how["stride"], *how["padding"], *how["dilation"]


def refusal(kernel, x, weight, how):
    return "" if DRY else _extension.why_not_conv(kernel.index, shape_of(x, weight, how))


def launch(kernel, x, weight, bias, residual, how, act):
    """y of one launch."""
    if DRY:
        return ACTS[act](exact(x, weight, bias, residual, how)).to(x.dtype).contiguous(memory_format=LAST)
    where = *how["stride"], *how["padding"], *how["dilation"]
    return torch.ops.fastres._conv_act_native(x, weight, bias, residual, *where, act, kernel.index)


def exact(x, weight, bias, residual, how):
    """z in fp64, without a convolution: exact where the values are integers."""
    columns = F.unfold(x.double(), weight.shape[2:], how["dilation"], how["padding"], how["stride"])
    size = output_size(x.shape[2:], weight.shape[2:], **how)
    z = (weight.double().flatten(1) @ columns).view(x.shape[0], weight.shape[0], *size)
    z = z if bias is None else z + bias.double().view(1, -1, 1, 1)
    return z if residual is None else z + residual.double()


# ---- tensors ---------------------------------------------------------------------------------------------------------


def between(values, dtype):
    """The values in the middle of a buffer of NaN, images channels_last: what is read past them shows."""
    count = values.numel()
    whole = torch.full((count + 2 * EDGE,), NAN, dtype=dtype, device=DEVICE)
    strides = torch.empty(values.shape, device="meta", memory_format=LAST if values.dim() == 4 else None).stride()
    return whole[EDGE : EDGE + count].as_strided(values.shape, strides).copy_(values)


def integers(shape, dtype, most=2):
    return between(torch.randint(-most, most + 1, shape, device=DEVICE), dtype)


def random(shape, dtype, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype).contiguous(memory_format=LAST)
