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

from fastres._dispatch import AUTO, REFERENCE, Backend, Operator, check_stock, choose, register
from fastres.ops._autograd import is_plain_eager, is_transformed, refuse_elsewhere, register_autograd
from fastres.ops._tensors import (
    check_activation,
    empty_elementwise,
    why_not_cpu,
    why_not_cuda,
    why_not_reference,
    why_not_triton,
    with_strides,
)

_LIB = torch.library.Library("fastres", "FRAGMENT")
_LIB.define('add_relu(Tensor x, Tensor residual, str backend="auto") -> Tensor')
_LIB.define('add_relu_backward(Tensor dy, Tensor y, str backend="auto") -> Tensor')
# None, having done nothing, unless both tensors have the same strides, dense in an order that eager keeps
_LIB.define("_add_relu_native(Tensor x, Tensor residual) -> Tensor?")
_LIB.define("_add_relu_backward_native(Tensor dy, Tensor y) -> Tensor?")


# ---- operator: checks, kernel, fake, autograd ------------------------------------------------------------------------


def _check(x: Tensor, residual: Tensor) -> None:
    check_activation("add_relu", "x", x)
    check_activation("add_relu", "residual", residual, like=x)


def _run(kernel: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """`kernel` on tensors of one memory order, that of the output: `like`, which is on the meta device."""
    strides = like.stride()
    if not a.numel():
        return torch.empty_strided(a.shape, strides, dtype=a.dtype, device=a.device)
    return with_strides(kernel(with_strides(a, strides), with_strides(b, strides)), strides)


def _forward(x: Tensor, residual: Tensor, backend: str = AUTO) -> Tensor:
    _check(x, residual)
    return _run(choose(OPERATOR, backend, x).forward, x, residual, empty_elementwise(x, residual, device="meta"))


def _backward(dy: Tensor, y: Tensor, backend: str = AUTO) -> Tensor:
    return _run(choose(OPERATOR, backend, y).backward, dy, y, torch.empty_like(y, device="meta"))


def _fake_forward(x: Tensor, residual: Tensor, backend: str = AUTO) -> Tensor:
    _check(x, residual)
    return empty_elementwise(x, residual)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.backend = inputs[2]


def _autograd_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (y,), needs = ctx.saved_tensors, ctx.needs_input_grad
    dx: Tensor | None = None
    if torch.is_grad_enabled() or is_transformed():  # create_graph=True: linear in dy, so one mask serves every order
        dx = torch.where(y.detach() <= 0, 0, dy)
    elif is_plain_eager(dy, y) and choose(OPERATOR, ctx.backend, y).native:
        dx = _NATIVE_BACKWARD(dy, y)
    if dx is None:
        dx = torch.ops.fastres.add_relu_backward.default(dy, y, ctx.backend)
    return dx if needs[0] else None, dx if needs[1] else None, None


class _FastPath(torch.autograd.Function):
    """The native operator without the dispatcher; returns None where that does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, backend: str) -> Tensor | None:
        y: Tensor | None = _NATIVE(x, residual)
        if y is not None:
            _setup_context(ctx, (x, residual, backend), y)
        return y

    backward = staticmethod(_autograd_backward)


_fast_path: Callable[..., Tensor | None] = _FastPath.apply

for _key in ("CPU", "CUDA"):
    _LIB.impl("add_relu", _forward, _key)
    _LIB.impl("add_relu_backward", _backward, _key)
torch.library.register_fake("fastres::add_relu", _fake_forward, lib=_LIB)
torch.library.register_fake("fastres::add_relu_backward", lambda dy, y, backend=AUTO: torch.empty_like(y), lib=_LIB)
register_autograd(_LIB, "add_relu", _forward, _setup_context, _autograd_backward)
for _name in ("_add_relu_native", "_add_relu_backward_native"):
    refuse_elsewhere(_LIB, _name)


# ---- backends: each returns y, or dx, in the memory order of its arguments -------------------------------------------


def _native(kernel: Callable[[Tensor, Tensor], Tensor | None]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(a: Tensor, b: Tensor) -> Tensor:
        out = kernel(a, b)
        if out is None:  # an order that only the strides of dimensions of size 1 tell
            out = kernel(a.contiguous(), b.contiguous())
        assert out is not None
        return out

    return run


def _triton(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def run(a: Tensor, b: Tensor) -> Tensor:
        from fastres.kernels import add_relu as kernels

        out = torch.empty_like(a)
        getattr(kernels, name)(a, b, out)
        return out

    return run


_OP = torch.ops.fastres.add_relu.default
_NATIVE = torch.ops.fastres._add_relu_native.default
_NATIVE_BACKWARD = torch.ops.fastres._add_relu_backward_native.default
# On a GPU the order is not measured yet: C++ first, for its fast path and because nothing is compiled at run time.
OPERATOR = register(Operator("add_relu", order={"cpu": ("cpu",), "cuda": ("cuda", "triton")}))
OPERATOR.add(
    Backend(
        REFERENCE,
        why_not_reference,
        lambda x, residual: torch.relu_(torch.add(x, residual)),
        lambda dy, y: torch.ops.aten.threshold_backward.default(dy, y, 0),
    )
)
for _backend, _why_not in (("cpu", why_not_cpu), ("cuda", why_not_cuda)):
    OPERATOR.add(Backend(_backend, _why_not, _native(_NATIVE), _native(_NATIVE_BACKWARD), native=True))
OPERATOR.add(Backend("triton", why_not_triton, _triton("add_relu_forward"), _triton("add_relu_backward")))


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
    if is_plain_eager(x, residual) and choose(OPERATOR, backend, x).native:
        grad = torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad)
        fast: Tensor | None = _fast_path(x, residual, backend) if grad else _NATIVE(x, residual)
        if fast is not None:
            return fast
    if not is_transformed():
        return _OP(x, residual, backend)  # type: ignore[no-any-return]
    _check(x, residual)
    check_stock(OPERATOR, backend)
    return torch.relu(x + residual)


OPERATOR.call = lambda x, residual, backend=AUTO: add_relu(x, residual, backend=backend)
OPERATOR.stock = lambda x, residual, backend=AUTO: torch.relu(x + residual)
OPERATOR.images = lambda *args: (0, 1)
