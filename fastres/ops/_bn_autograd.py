"""Autograd of bn_act: what is saved, the gradients, and the fast path. Names and formulas are those of ops/bn_act.py.

The dispatcher path is the operator, its Python kernel, a backend on dense tensors, and the running statistics after it.
The fast path is one call of the native operator, which moves them too; it is taken where nothing stands between the
call and the kernel (`is_plain_eager`) and the kernel knows the layout, which it says by what it returns.

Saved for backward, by what the gradients are made of:

    x               for dweight, and in training for dx
    sign of y       for everything behind a ReLU: from x again where x is kept, there was no residual and the kernel can
                    (the cpu backend); else from y, which the next convolution keeps anyway
    mean, var, weight, bias      [C]

so a BN in eval mode whose parameters are frozen keeps y alone. A call with `recompute` keeps x, never y: y is made
again from x and the residual by the same kernel, bit for bit, when backward needs it (`output_of`), be it for its sign
or for a convolution that read it (fastres/nn/memory.py). A residual that is such an output itself is not kept either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastres._dispatch import Backend
from fastres.ops import _ownership
from fastres.ops._autograd import any_requires_grad, is_plain_eager, is_transformed
from fastres.ops._bn_backends import NATIVE, NATIVE_BACKWARD, composite_backward
from fastres.ops._tensors import is_channels_last, memory_format

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # dx, dweight, dbias, dresidual

REUSE_FROM = 1 << 16  # elements of a gradient worth asking for its owners: a fresh buffer's page faults cost more


class Call(NamedTuple):
    """Arguments of a call besides the tensors that may need a gradient."""

    running_mean: Tensor | None  # [C]
    running_var: Tensor | None  # [C]
    num_batches_tracked: Tensor | None  # int64 scalar
    training: bool
    momentum: float | None
    eps: float
    act: str
    backend: Backend
    recompute: bool = False


class Saved(NamedTuple):
    """Tensors that a node keeps; each may be None."""

    x: Tensor | None  # [N, C, H, W]
    y: Tensor | None  # [N, C, H, W]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    mean: Tensor  # [C]
    var: Tensor  # [C]
    residual: Tensor | None  # [N, C, H, W]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, residual, training, eps, act, ctx.backend = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    needs = ctx.needs_input_grad
    _save(ctx, Saved(x, y, weight, bias, mean, var, residual), needs[:3] + needs[5:6], training, eps, act)


def _save(
    ctx: Any,
    all_of_it: Saved,
    needs: tuple[bool, ...],
    training: bool,
    eps: float,
    act: str,
    signs_from_x: bool = False,
    recompute: bool = False,
) -> None:
    """Keeps what the needed gradients require; see above."""
    x, y, weight, bias, mean, var, residual = all_of_it
    needs_x, needs_weight, needs_bias, _ = needs
    ctx.needs, ctx.training, ctx.eps, ctx.act, ctx.recompute = needs, training, eps, act, recompute
    ctx.param_dtypes = None if weight is None else weight.dtype, None if bias is None else bias.dtype
    keeps_x = recompute or needs_weight or (training and needs_x)
    ctx.signs_from_x = act == "relu" and signs_from_x and keeps_x and residual is None
    keeps_y = act == "relu" and not ctx.signs_from_x and not recompute
    if not keeps_x and not keeps_y and (needs_x or needs_bias):  # dx takes its layout from x
        assert x is not None
        ctx.format = memory_format(is_channels_last(x))
    ctx.again = ctx.residual_node = None
    if recompute and residual is not None and is_recomputed(residual):
        ctx.residual_node = residual.grad_fn
    ctx.save_for_backward(
        x if keeps_x else None,
        y if keeps_y else None,
        weight if needs_x or ctx.signs_from_x or recompute else None,
        bias if ctx.signs_from_x or recompute else None,
        mean,
        var,
        residual if recompute and ctx.residual_node is None else None,
    )


def _gradients(ctx: Any, dy: Tensor, saved: Saved) -> Grads:
    """(dx, dweight, dbias, dresidual) by the dispatcher path, None where not needed; create_graph=True works."""
    x, y, weight, _, mean, var, _ = saved
    if y is None and ctx.act == "relu":
        y = output_of(ctx, saved)
    needs_residual = ctx.needs[3]
    if not any(ctx.needs[:3]):  # the residual alone: nothing of the normalization is needed
        return None, None, None, dy if y is None else torch.where(y.detach() <= 0, 0, dy)
    needs = [*ctx.needs[:3], needs_residual and ctx.act == "relu"]
    if x is None:  # only its layout is asked for
        x = dy.contiguous(memory_format=ctx.format) if y is None else y.detach()
    if torch.is_grad_enabled() or is_transformed():
        grads = composite_backward(dy, x, y, weight, mean, var, ctx.training, ctx.eps)
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
    dx, dweight, dbias, dresidual = _gradients(ctx, dy, Saved(*ctx.saved_tensors))
    return dx, dweight, dbias, None, None, dresidual, None, None, None, None


def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    x: Tensor,
) -> None:
    """Moves the running statistics towards those of the batch x; momentum None: their cumulative average."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is None and running_var is None:
        return
    n = x.shape[0] * x.shape[2] * x.shape[3]
    unbiased = n / (n - 1)
    if momentum is None:  # the counter stays on its device: no synchronization
        assert num_batches_tracked is not None
        factor = 1.0 / num_batches_tracked.to(mean.dtype)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), factor.to(running_mean.dtype))
        if running_var is not None:
            running_var.lerp_((var * unbiased).to(running_var.dtype), factor.to(running_var.dtype))
        return
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    if running_var is not None:
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * unbiased)


# ---- the fast path ---------------------------------------------------------------------------------------------------


def fast_path(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor | None:
    """y, the running statistics moved; None, having done nothing, where the kernel leaves it to the dispatcher path."""
    if torch.is_grad_enabled() and any_requires_grad(x, weight, bias, residual):
        if x.is_cpu and x.numel() >= REUSE_FROM:
            _ownership.learn()
        y: Tensor | None = _apply(x, weight, bias, residual, call)
        if y is not None and call.recompute:
            node: Any = y.grad_fn
            node.version = y._version
        return y
    return _run(x, weight, bias, residual, call)[0]


def _run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> tuple[Tensor | None, Tensor, Tensor]:
    running_mean, running_var, count, training, momentum, eps, act, backend, recompute = call
    if backend.native and momentum is not None:
        y, mean, var = NATIVE(
            x, weight, bias, residual, running_mean, running_var, count, training, momentum, eps, act == "relu", False
        )
        if y is not None:
            if training:
                increment_version([t for t in (running_mean, running_var, count) if t is not None])
            return y, mean, var
    if not recompute:
        return None, x, x
    operator = torch.ops.fastres.bn_act.default
    y, mean, var = operator(x, weight, bias, running_mean, running_var, residual, training, eps, act, backend.name)
    if training and x.numel():
        update_running(running_mean, running_var, count, mean, var, momentum, x)
    return y, mean, var


class _FastPath(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
    ) -> Tensor | None:
        y, mean, var = _run(x, weight, bias, residual, call)
        if y is None:
            return None
        backend = ctx.kernel = call.backend
        ctx.backend = backend.name
        saved = Saved(x, y, weight, bias, mean, var, residual)
        needs = ctx.needs_input_grad[:4]
        _save(ctx, saved, needs, call.training, call.eps, call.act, backend.signs_from_x, call.recompute)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs, relu = ctx.needs, ctx.act == "relu"
        saved = x, y, weight, bias, mean, var, _ = Saved(*ctx.saved_tensors)
        try:
            if torch.is_grad_enabled() or not ctx.kernel.native or not any(needs[:3]):
                return *_gradients(ctx, dy, saved), None
            if y is None and relu and not ctx.signs_from_x:
                y = output_of(ctx, saved)
            if x is None:  # not read: only its layout is asked for
                x = dy.contiguous(memory_format=ctx.format) if y is None else y
            if is_plain_eager(dy, x, y, weight, bias):
                large = dy.is_cpu and dy.numel() >= REUSE_FROM
                reuse = large and (relu or not needs[3]) and _ownership.is_unshared(dy)
                bits = needs[0] | needs[1] << 1 | needs[2] << 2 | (needs[3] and relu) << 3
                dx, dweight, dbias, dresidual = NATIVE_BACKWARD(
                    dy, x, y, weight, bias, mean, var, ctx.training, ctx.eps, relu, bits, reuse
                )
                if dx is not None or dweight is not None or dbias is not None:
                    return dx, dweight, dbias, dy if needs[3] and not relu else dresidual, None
            return *_gradients(ctx, dy, saved), None
        finally:
            ctx.again = None


_apply: Callable[..., Any] = _FastPath.apply
_Node: Any = _FastPath._backward_cls


# ---- outputs computed again ------------------------------------------------------------------------------------------


def is_recomputed(t: Tensor) -> bool:
    """Say whether `t` is, as it was made, the output of a call with `recompute`: it can be computed again."""
    node: Any = t.grad_fn
    return isinstance(node, _Node) and node.recompute and node.version == t._version


def output_of(node: Any, saved: Saved | None = None) -> Tensor:
    """y of a node that did not keep it, detached. Kept until the node's own backward has read its sign, if it will.

    Args:
        saved: the node's tensors where its backward has taken them already: checkpointing hands them out once.

    Raises:
        RuntimeError: PyTorch's own, where the node's tensors are gone or were changed in place since.
    """
    chain, link = [], node
    while link is not None:
        y: Tensor | None = link.again  # read once: another thread may drop it
        if y is not None:
            break
        chain.append(link)
        link = link.residual_node
    with torch.no_grad():
        for link in reversed(chain):
            its = saved if link is node and saved is not None else Saved(*link.saved_tensors)
            x, _, weight, bias, mean, var, residual = its
            assert x is not None
            call = Call(mean, var, None, False, 0.0, link.eps, link.act, link.kernel, recompute=True)
            y = _run(x, weight, bias, residual if link.residual_node is None else y, call)[0]
            if link.act == "relu" and not link.signs_from_x:
                link.again = y
    assert y is not None
    return y
