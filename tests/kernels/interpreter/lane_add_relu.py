"""add_relu's kernels in Triton's interpreter. Run by test_triton_interpreter.py, in a process of its own."""

import pytest
import torch
from fastres.kernels.add_relu import add_relu_backward, add_relu_forward

from guarded import Arena, small_tiles

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float16)


def expected_forward(x, residual):
    z = (x.double() + residual.double()).to(x.dtype)  # fp32 sums of fp32 and fp16 are this, rounded once
    return torch.where(z < 0, 0.0, z)


def forward(x, residual, offset=0):
    arena = Arena()
    inputs = arena.input(x, offset=offset), arena.input(residual, offset=offset)
    y = arena.output(x.shape, x.dtype, offset=offset)
    add_relu_forward(*inputs, y)
    arena.check()
    return y


def backward(dy, y, offset=0):
    arena = Arena()
    dx = arena.output(dy.shape, dy.dtype, offset=offset)
    add_relu_backward(arena.input(dy, offset=offset), arena.input(y, offset=offset), dx)
    arena.check()
    return dx


@pytest.mark.parametrize("offset", (0, 1))
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_are_exact_with_every_tail(monkeypatch, dtype, offset):
    small_tiles(monkeypatch, tile=32)
    for numel in (1, 31, 32, 33, 96, 97, 127):
        x, residual, dy = (torch.randn(numel).to(dtype) for _ in range(3))
        y = forward(x, residual, offset)
        assert torch.equal(y, expected_forward(x, residual))
        assert torch.equal(backward(dy, y, offset), torch.where(y <= 0, 0.0, dy))


@pytest.mark.parametrize("dtype", DTYPES)
def test_shipped_tiles(dtype):
    x, residual, dy = (torch.randint(-8, 9, (2, 3, 37, 11)).to(dtype) for _ in range(3))
    y = forward(x, residual)
    assert torch.equal(y, expected_forward(x, residual))
    assert torch.equal(backward(dy, y), torch.where(y <= 0, 0.0, dy))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row10_nan_inf_and_signed_zero_at_every_lane(monkeypatch, dtype):
    small_tiles(monkeypatch, tile=32)
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 6e-8, -6e-8, 60000.0, -60000.0]).to(dtype)
    assert forward(torch.full((40,), INF, dtype=dtype), torch.full((40,), -INF, dtype=dtype)).isnan().all()
    for shift in range(len(special)):
        x = special.roll(shift).repeat(12)[:101]
        zero = torch.where(x.signbit(), torch.tensor(-0.0), torch.tensor(0.0)).to(dtype)
        y = forward(x, zero)
        want = torch.relu(x)
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(y.signbit() | y.isnan(), want.signbit() | want.isnan())
        dy = torch.randn(101).to(dtype)
        torch.testing.assert_close(backward(dy, y), torch.ops.aten.threshold_backward(dy, y, 0), rtol=0, atol=0)
        torch.testing.assert_close(backward(x, dy.abs() + 1), x, rtol=0, atol=0, equal_nan=True)  # NaN in dy passes
        assert not backward(x, torch.zeros_like(x)).isnan().any()  # and is masked where y is 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_row24_residual_is_x(monkeypatch, dtype):
    small_tiles(monkeypatch, tile=32)
    x, arena = torch.randn(100).to(dtype), Arena()
    placed, y = arena.input(x), arena.output(x.shape, dtype)
    add_relu_forward(placed, placed, y)
    arena.check()
    assert torch.equal(y, expected_forward(x, x))
