"""add_relu: the end of a residual block (He et al. 2016, section 3.2: the second nonlinearity after the addition).

    formula    z = x + r                        r: residual, the shortcut
               y = max(z, 0)                    NaN passes, as torch.relu
    gradient   dx = dr = 0 where y <= 0, else dy

One pass over memory instead of two: reads x and r, writes y; backward reads dy and y, and writes one tensor that
serves both inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres._dispatch import AUTO, REFERENCE, Backend, Operator, choose, register
from fastres.ops._autograd import is_plain_eager, leave_to_the_general_way, register_autograd
from fastres.ops._tensors import (
    check_activation,
    empty_elementwise,
    why_not_cpu,
    why_not_cuda,
    why_not_reference,
    why_not_triton,
)

_LIB = torch.library.Library("fastres", "FRAGMENT")
_LIB.define('add_relu(Tensor x, Tensor residual, str backend="auto") -> Tensor')
_LIB.define('add_relu_backward(Tensor dy, Tensor y, str backend="auto") -> Tensor')
_LIB.define("_add_relu_native(Tensor x, Tensor residual, Tensor(a!) y) -> ()")
_LIB.define("_add_relu_backward_native(Tensor dy, Tensor y, Tensor(a!) dx) -> ()")
_LIB.define("_add_relu_direct_native(Tensor x, Tensor residual) -> Tensor?")
_LIB.define("_add_relu_backward_direct_native(Tensor dy, Tensor y) -> Tensor?")


# ---- reference -------------------------------------------------------------------------------------------------------


def _reference_forward(x: Tensor, residual: Tensor, y: Tensor) -> None:
    torch.add(x, residual, out=y)
    torch.relu_(y)


def _reference_backward(dy: Tensor, y: Tensor, dx: Tensor) -> None:
    torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dx)


# ---- operator: checks, kernel, fake, autograd ------------------------------------------------------------------------


def _check(x: Tensor, residual: Tensor) -> None:
    check_activation("add_relu", "x", x)
    check_activation("add_relu", "residual", residual, like=x)


def _forward(x: Tensor, residual: Tensor, backend: str = AUTO) -> Tensor:
    _check(x, residual)
    chosen = choose(OPERATOR, backend, x)
    y = empty_elementwise(x, residual)
    if x.numel():
        chosen.forward(_ordered(x, y), _ordered(residual, y), y)
    return y


def _backward(dy: Tensor, y: Tensor, backend: str = AUTO) -> Tensor:
    chosen = choose(OPERATOR, backend, y)
    dx = torch.empty_like(y)
    if y.numel():
        chosen.backward(_ordered(dy, dx), _ordered(y, dx), dx)
    return dx


def _ordered(t: Tensor, like: Tensor) -> Tensor:
    """`t`, copied only if it is not dense in `like`'s memory order already."""
    if t.stride() == like.stride():
        return t
    if like.is_contiguous():
        return t.contiguous()
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return t.contiguous(memory_format=torch.channels_last)
    return torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device=t.device).copy_(t)


def _fake_forward(x: Tensor, residual: Tensor, backend: str = AUTO) -> Tensor:
    _check(x, residual)
    return empty_elementwise(x, residual)


def _fake_backward(dy: Tensor, y: Tensor, backend: str = AUTO) -> Tensor:
    return torch.empty_like(y)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.backend = inputs[2]


def _autograd_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    return *_gradients(ctx.needs_input_grad, dy, y, ctx.backend), None


def _gradients(needs: tuple[bool, ...], dy: Tensor, y: Tensor, backend: str) -> tuple[Tensor | None, Tensor | None]:
    if torch.is_grad_enabled():  # create_graph=True: linear in dy, so one mask serves every order
        dx = torch.where(y.detach() <= 0, 0, dy)
    else:
        dx = torch.ops.fastres.add_relu_backward.default(dy, y, backend)
    return dx if needs[0] else None, dx if needs[1] else None


class _Direct(torch.autograd.Function):
    """The short way (see ops/_bn_autograd.py): kernels that allocate; None from one that leaves the call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, backend: Backend) -> Tensor | None:
        assert backend.direct is not None
        y: Tensor | None = backend.direct(x, residual)
        ctx.backend = backend
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y,), needs = ctx.saved_tensors, ctx.needs_input_grad
        if not torch.is_grad_enabled() and is_plain_eager(dy, y):
            dx = ctx.backend.direct_backward(dy, y)
            if dx is not None:
                return dx if needs[0] else None, dx if needs[1] else None, None
        return *_gradients(needs, dy, y, ctx.backend.name), None


_apply_direct: Callable[..., Tensor | None] = _Direct.apply


for _key in ("CPU", "CUDA"):
    _LIB.impl("add_relu", _forward, _key)
    _LIB.impl("add_relu_backward", _backward, _key)
for _name in ("_add_relu_direct_native", "_add_relu_backward_direct_native"):
    leave_to_the_general_way(_LIB, _name)
torch.library.register_fake("fastres::add_relu", _fake_forward, lib=_LIB)
torch.library.register_fake("fastres::add_relu_backward", _fake_backward, lib=_LIB)
register_autograd(_LIB, "add_relu", _forward, _setup_context, _autograd_backward)


# ---- backends --------------------------------------------------------------------------------------------------------


def _native_forward(x: Tensor, residual: Tensor, y: Tensor) -> None:
    torch.ops.fastres._add_relu_native.default(x, residual, y)


def _native_backward(dy: Tensor, y: Tensor, dx: Tensor) -> None:
    torch.ops.fastres._add_relu_backward_native.default(dy, y, dx)


def _triton_forward(x: Tensor, residual: Tensor, y: Tensor) -> None:
    from fastres.kernels.add_relu import add_relu_forward

    add_relu_forward(x, residual, y)


def _triton_backward(dy: Tensor, y: Tensor, dx: Tensor) -> None:
    from fastres.kernels.add_relu import add_relu_backward

    add_relu_backward(dy, y, dx)


_OP = torch.ops.fastres.add_relu.default
# On a GPU the order is not measured yet: C++ first, for its short way and because nothing is compiled at run time.
OPERATOR = register(Operator("add_relu", order={"cpu": ("cpu",), "cuda": ("cuda", "triton")}))
OPERATOR.add(Backend(REFERENCE, why_not_reference, _reference_forward, _reference_backward))
for _backend, _why_not in (("cpu", why_not_cpu), ("cuda", why_not_cuda)):
    OPERATOR.add(
        Backend(
            _backend,
            _why_not,
            _native_forward,
            _native_backward,
            torch.ops.fastres._add_relu_direct_native.default,
            torch.ops.fastres._add_relu_backward_direct_native.default,
        )
    )
OPERATOR.add(Backend("triton", why_not_triton, _triton_forward, _triton_backward))


# ---- public function -------------------------------------------------------------------------------------------------


def add_relu(x: Tensor, residual: Tensor, *, backend: str = AUTO) -> Tensor:
    """y = relu(x + residual), in one pass.

    Gradient: dx = dresidual = dy where y > 0 (or y is NaN), 0 elsewhere; any order of differentiation.

    Args:
        x: any shape, float32, float16, bfloat16 or float64; any strides.
        residual: x's shape, dtype and device; may be x itself.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        y, x's shape and dtype, with the strides that eager gives `x + residual`.

    Raises:
        ValueError: shapes or devices differ, unknown backend.
        TypeError: not a tensor, dtypes differ or are not floating.
        BackendError: the named backend refuses; the message says why.

    Source: He et al. 2016, section 3.2, equation (1).

    Example:
        >>> import torch
        >>> from fastres.functional import add_relu
        >>> add_relu(torch.tensor([-2.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor([0., 2.])
    """
    if not (isinstance(x, Tensor) and isinstance(residual, Tensor)):
        _check(x, residual)
    if is_plain_eager(x, residual):
        chosen = choose(OPERATOR, backend, x)
        if chosen.direct is not None:
            grad = torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad)
            straight: Tensor | None = _apply_direct(x, residual, chosen) if grad else chosen.direct(x, residual)
            if straight is not None:
                return straight
    y: Tensor = _OP(x, residual, backend)
    return y


def _call(x: Tensor, residual: Tensor, backend: str = AUTO) -> Tensor:
    """The operator's call in a frozen network."""
    return add_relu(x, residual, backend=backend)


OPERATOR.call = _call
OPERATOR.stock = lambda x, residual, backend=AUTO: torch.relu(x + residual)
