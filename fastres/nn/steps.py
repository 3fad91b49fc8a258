"""The steps that fused modules are made of: BN, then the residual, then ReLU, in one operator call.

    norm_act       BN [+ residual] [+ ReLU] given as modules: fused when both modules are stock and bare
    bn_step        the same once the modules are known to be stock and bare

Nothing is cached: every call reads the modules' own tensors and flags, so a replaced Parameter, `load_state_dict(...,
assign=True)`, `.to()` and a child switched to eval alone are followed. The operator call is one leaf under torch.fx: it
takes tensors and scalars only, and nothing here branches on a value that a tracer replaces by a proxy.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from fastres.nn.memory import may_recompute
from fastres.nn.norms import is_frozen_norm, norm_arguments, runs_stock, stock_step
from fastres.ops.add_relu import add_relu
from fastres.ops.bn_act import normalize

M = TypeVar("M", bound=nn.Module)


def is_bare(module: nn.Module) -> bool:
    """Say whether calling `module` runs its class's forward and nothing else: no hooks, no forward of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def has_global_hooks() -> bool:
    """Say whether a hook on every module's forward is set: `register_module_forward_hook`."""
    hooks = nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def is_plain(module: Any, cls: type[M]) -> TypeGuard[M]:
    """Say whether `module` is exactly a `cls` (a parametrized one is not) and bare: a fused step may stand for it."""
    return type(module) is cls and is_bare(module)


def is_norm(module: Any) -> bool:
    """Say whether `module` is a bare BatchNorm2d or FrozenBatchNorm2d, without an activation: a fused step's norm."""
    if type(module) is not nn.BatchNorm2d and (not is_frozen_norm(module) or module._modules):
        return False
    return is_bare(module)


def fused_bn_act(x: Tensor, residual: Tensor | None, act: str, backend: str, **batch_norm: Any) -> Tensor:
    """The operator call. A residual that the operator refuses but eager's `out += residual` takes is added apart.

    Args:
        x: [N, C, H, W].
        residual: broadcastable to x's shape, any dtype that eager adds to x's.
        act: "relu" or "none".
        backend: as for `fastres.functional.bn_act`.
        batch_norm: what `batch_norm_arguments` returns, and `recompute`.

    Returns:
        y: [N, C, H, W], x's dtype.
    """
    if residual is None or (residual.dtype == x.dtype and residual.shape == x.shape):
        return normalize(x, residual=residual, act=act, backend=backend, **batch_norm)
    y = normalize(x, residual=None, act="none", backend=backend, **batch_norm)
    y = (y + residual.expand_as(y)).to(y.dtype)
    return torch.relu(y) if act == "relu" else y


def fused_add_relu(x: Tensor, residual: Tensor, backend: str) -> Tensor:
    """relu(x + residual); shapes or dtypes that only eager's addition takes run there."""
    if residual.dtype == x.dtype and residual.shape == x.shape:
        return add_relu(x, residual, backend=backend)
    return torch.relu(x + residual)


torch.fx.wrap("fused_bn_act")


def bn_step(
    x: Tensor,  # [N, C, H, W]
    bn: nn.Module,
    residual: Tensor | None = None,  # [N, C, H, W]
    act: str = "relu",
    backend: str = "auto",
    memory: str = "default",
) -> Tensor:
    """act(bn(x) [+ residual]) as one operator call, by `bn`'s own flags. `bn` must be a plain norm (see `is_norm`).

    Args:
        memory: "min" computes y again in backward instead of keeping it; see fastres/nn/memory.py.

    Returns:
        y: [N, C, H, W].
    """
    if runs_stock(bn, x):
        return stock_step(x, bn, residual, act)
    arguments = norm_arguments(bn)
    if memory == "min" and may_recompute():
        weight = arguments["weight"]
        # frozen, it keeps y and not x: as little, and nothing to compute
        arguments["recompute"] = arguments["training"] or (weight is not None and weight.requires_grad)
    return fused_bn_act(x, residual, act, backend, **arguments)


def norm_act(
    x: Tensor,  # [N, C, H, W]
    norm: nn.Module,
    act: nn.Module | None = None,
    residual: Tensor | None = None,  # [N, C, H, W]
    backend: str = "auto",
    memory: str = "default",
) -> Tensor:
    """act(norm(x) [+ residual]), fused when `norm` is a plain norm (see `is_norm`) and `act` a plain ReLU or None.

    `memory="min"` computes the result again in backward instead of keeping it for that.

    Returns:
        y: [N, C, H, W].

    Example:
        >>> import torch
        >>> from fastres.nn import norm_act
        >>> x = torch.randn(2, 3, 4, 4)
        >>> norm_act(x, torch.nn.BatchNorm2d(3), torch.nn.ReLU(), residual=x).shape
        torch.Size([2, 3, 4, 4])
    """
    if is_norm(norm) and (act is None or is_plain(act, nn.ReLU)):
        return bn_step(x, norm, residual, "none" if act is None else "relu", backend, memory)
    x = norm(x)
    if residual is not None:
        x = x + residual
    return x if act is None else act(x)
