"""Autograd of bn_act: what is saved, the gradients, and the short way. Names and formulas are those of ops/bn_act.py.

The general way goes through the dispatcher: the operator, its Python kernel, a backend that fills preallocated
outputs. The short way is one call of a kernel that allocates, computes and moves the running statistics; it is taken
where nothing stands between the call and the kernel (`goes_straight`) and the kernel knows the layout, which it says by
what it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastres._dispatch import Backend
from fastres.ops import _bn_reference
from fastres.ops._autograd import any_requires_grad, goes_straight

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # dx, dweight, dbias, dresidual


class Call(NamedTuple):
    """What a call is made of beside the tensors that may need a gradient."""

    running_mean: Tensor | None  # [C]
    running_var: Tensor | None  # [C]
    num_batches_tracked: Tensor | None  # int64 scalar
    training: bool
    momentum: float
    eps: float
    act: str
    backend: Backend


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, residual, training, eps, act, ctx.backend = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    needs = ctx.needs_input_grad
    save(ctx, x, y, weight, bias, mean, var, (needs[0], needs[1], needs[2], needs[5]), training, eps, act)


def save(
    ctx: Any,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    needs: tuple[bool, bool, bool, bool],
    training: bool,
    eps: float,
    act: str,
) -> None:
    """Keeps what the needed gradients require: x, y for its sign, weight, mean, var."""
    ctx.needs, ctx.training, ctx.eps, ctx.act = needs, training, eps, act
    ctx.param_dtypes = None if weight is None else weight.dtype, None if bias is None else bias.dtype
    needs_x, needs_weight, needs_bias, _ = needs
    ctx.save_for_backward(
        x if needs_x or needs_weight or needs_bias else None,
        y if act == "relu" else None,
        weight if needs_x else None,
        mean,
        var,
    )


def gradients(ctx: Any, dy: Tensor, saved: tuple[Any, ...]) -> Grads:
    """(dx, dweight, dbias, dresidual) the general way, None where not needed; differentiable with create_graph=True."""
    x, y, weight, mean, var = saved
    needs_residual = ctx.needs[3]
    needs = [*ctx.needs[:3], needs_residual and ctx.act == "relu"]
    if x is None:  # the residual alone: nothing of the normalisation is needed
        return None, None, None, dy if y is None else torch.where(y.detach() <= 0, 0, dy)
    if torch.is_grad_enabled():
        grads = _bn_reference.composite_backward(dy, x, y, weight, mean, var, ctx.training, ctx.eps)
    else:
        grads = torch.ops.fastres.bn_act_backward.default(
            dy, x, y, weight, mean, var, ctx.training, ctx.eps, ctx.act, needs, ctx.backend
        )
    dx, dweight, dbias, dresidual = (g if need else None for g, need in zip(grads, needs, strict=True))
    if needs_residual and dresidual is None:
        dresidual = dy  # act="none": the addition passes dy on
    if dweight is not None:
        dweight = dweight.to(ctx.param_dtypes[0])
    if dbias is not None:
        dbias = dbias.to(ctx.param_dtypes[1])
    return dx, dweight, dbias, dresidual


def backward(ctx: Any, dy: Tensor, _dmean: Any, _dvar: Any) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias, dresidual = gradients(ctx, dy, ctx.saved_tensors)
    return dx, dweight, dbias, None, None, dresidual, None, None, None, None


# ---- the short way ---------------------------------------------------------------------------------------------------


def call_direct(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor | None:
    """y, the running statistics moved; None, and nothing done, where the kernel leaves the call to the general way."""
    if torch.is_grad_enabled() and any_requires_grad(x, weight, bias, residual):
        y: Tensor | None = _apply(x, weight, bias, residual, call)
        return y
    return _run(x, weight, bias, residual, call)[0]


def _run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> tuple[Tensor | None, Tensor, Tensor]:
    running_mean, running_var, count, training, momentum, eps, act, backend = call
    assert backend.direct is not None
    y, mean, var = backend.direct(
        x, weight, bias, residual, running_mean, running_var, count, training, momentum, eps, act == "relu"
    )
    if training and y is not None:
        increment_version([t for t in (running_mean, running_var, count) if t is not None])
    return y, mean, var


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
    ) -> Tensor | None:
        y, mean, var = _run(x, weight, bias, residual, call)
        if y is None:
            return None
        ctx.backend = call.backend.name
        ctx.direct_backward = call.backend.direct_backward
        needs = ctx.needs_input_grad[:4]
        save(ctx, x, y, weight, bias, mean, var, needs, call.training, call.eps, call.act)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = x, y, weight, mean, var = ctx.saved_tensors
        if x is not None and not torch.is_grad_enabled() and goes_straight(dy, x, y, weight):
            needs, relu = ctx.needs, ctx.act == "relu"
            bits = needs[0] | needs[1] << 1 | needs[2] << 2 | (needs[3] and relu) << 3
            dx, dweight, dbias, dresidual = ctx.direct_backward(
                dy, x, y, weight, mean, var, ctx.training, ctx.eps, relu, bits
            )
            if dx is not None or dweight is not None or dbias is not None:
                return dx, dweight, dbias, dy if needs[3] and not relu else dresidual, None
        return *gradients(ctx, dy, saved), None


_apply: Callable[..., Any] = _Direct.apply
