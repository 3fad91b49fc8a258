"""A native operator's call and what fp64 makes of it: shared by the CPU kernels, the CUDA kernels and their emulation.

Inputs, emulated outputs and what is written over lie in the middle of buffers of NaN whose edges must stay NaN: a write
out of bounds is a failure. Every tensor of these can start one element after an aligned address.
"""

from __future__ import annotations

import pytest
import torch

import emulation
import fastres.ops  # noqa: F401  (declares the operators that the modules implement)
from emulation import dense, edges_untouched
from fastres import _extension
from referee import backward64, forward64, per_channel, statistics64  # noqa: F401  (per_channel: for whoever imports it)


class Lane:
    """Where a test runs: the operators by their names in torch.ops.fastres, and the device of their tensors."""

    def __init__(self, name):
        self.name = name
        self.device = "cuda" if name == "cuda" else "cpu"
        self.exact_sums = name == "cpu"  # in fp64; on a GPU in fp32
        self.ops = emulation.kernels() if name == "emulated" else torch.ops.fastres
        reason = {"cpu": _extension.why_not_cpu, "cuda": _extension.why_not_cuda}.get(name, lambda: None)()
        if reason:
            pytest.skip(reason)


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LANES = [pytest.param("cpu"), pytest.param("emulated"), pytest.param("cuda", marks=GPU)]


def randn(shape, dtype, channels_last=False, offset=0, scale=1.0, shift=0.0, device="cpu"):
    return dense(shape, dtype, channels_last, offset, device).copy_(torch.randn(shape) * scale + shift)


class Case:
    """Inputs of one call, and what fp64 makes of them."""

    def __init__(
        self, lane, shape, dtype, channels_last, *, training=True, act="relu", residual=True, affine=True, offset=0
    ):
        c = shape[1]
        self.ops, self.device, self.exact_sums = lane.ops, lane.device, lane.exact_sums
        self.shape, self.dtype, self.channels_last, self.offset = shape, dtype, channels_last, offset
        self.training, self.act, self.eps = training, act, 1e-3
        self.x = randn(shape, dtype, channels_last, offset, scale=2.0, shift=0.5, device=self.device)
        self.residual = randn(shape, dtype, channels_last, offset, device=self.device) if residual else None
        self.dy = randn(shape, dtype, channels_last, offset, device=self.device)
        self.weight, self.bias = torch.randn(2, c, device=self.device) if affine else (None, None)
        self.mean, self.var = torch.randn(c, device=self.device), torch.rand(c, device=self.device) + 0.5

    def run(self, x, overwrite=False):
        tensors = x, self.weight, self.bias, self.residual, *(() if self.training else (self.mean, self.var))
        tensors += (None,) * (7 - len(tensors))
        return self.ops._bn_act_native(*tensors, self.training, 0.0, self.eps, self.act == "relu", overwrite)

    def forward(self):
        y, mean, var = self.run(self.x)
        if not self.training and self.residual is not self.x:  # the same bits over the input
            x = dense(self.shape, self.dtype, self.channels_last, self.offset, self.device).copy_(self.x)
            over = self.run(x, overwrite=True)
            assert over[0].data_ptr() == x.data_ptr() and over[1:] == (None, None) and edges_untouched(x)
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        return y, mean, var

    def backward(self, y, mean, var, needs=(True, True, True, True)):
        relu, bits = self.act == "relu", sum(need << bit for bit, need in enumerate(needs))
        grads = self.ops._bn_act_backward_native(
            self.dy, self.x, y if relu else None, self.weight, self.bias, mean, var, self.training, self.eps, relu,
            bits, False,
        )  # fmt: skip
        assert [g is not None for g in grads] == list(needs)
        return grads

    def forward64(self):
        mean, var = statistics64(self.x) if self.training else (self.mean.double(), self.var.double())
        y, _ = forward64(self.x, self.weight, self.bias, self.residual, mean, var, self.eps, self.act)
        return y, mean, var

    def backward64(self, y, mean, var):
        found = backward64(self.dy, self.x, y, self.weight, mean, var, self.training, self.eps, self.act)
        return [gradient for gradient, _ in found.values()]


def assert_close(got, want, ulps32, scale=1.0):
    """Within half a unit in the last place of the dtype, and fp32's noise at the scale of what was added up."""
    half_ulp = 0.0 if got.dtype == torch.float32 else 0.502 * torch.finfo(got.dtype).eps
    atol = ulps32 * 2**-24 * max(scale, want.abs().max().item()) + (1e-7 if got.dtype == torch.float16 else 0.0)
    torch.testing.assert_close(got.double(), want.double(), rtol=half_ulp, atol=atol)


def check(case):
    y, mean, var = case.forward()
    want_y, want_mean, want_var = case.forward64()
    assert_close(mean, want_mean, 4 if case.exact_sums else 8, case.x.abs().max().item())  # measured: 4.04 in fp32
    torch.testing.assert_close(var.double(), want_var, rtol=2e-6, atol=1e-7)  # measured: 1e-6
    assert_close(y, want_y, 24)
    n = y.numel() // y.shape[1]
    got, wanted = case.backward(y, mean, var), case.backward64(y, mean, var)
    for g, w, scale in zip(got, wanted, (1, n**0.5, n**0.5, 1), strict=True):
        assert_close(g, w, 64, scale)
    return y, mean, var, *got


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
