"""The steps that begin with a convolution.

    conv_norm_act   act(norm(conv(x)) [+ residual]) given as modules
    conv_bn_act     the same once the BN and the ReLU are known to be stock and bare
    run_sequence    a chain of modules, each BN fused with the convolution before it and the ReLU behind it

    formula    y = act(bn(conv(x)) [+ residual])

Two calls: the convolution as it is, then `bn_act`. In eval mode without gradients the second writes over the output of
the first, which nobody else has seen. Nothing is kept between calls: the BN's scale and shift are computed in each, so
that every write to a weight or a statistic, through ``.data`` too, is followed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastres._dispatch import AUTO
from fastres.nn.memory import call_reading
from fastres.nn.norms import norm_arguments, runs_stock
from fastres.nn.steps import bn_step, has_global_hooks, is_norm, is_plain, norm_act
from fastres.ops._autograd import any_requires_grad, is_plain_eager
from fastres.ops.bn_act import bn_act_over


def conv_bn_act(
    x: Tensor,  # [N, C, H, W]
    conv: nn.Module,
    bn: nn.Module,
    residual: Tensor | None = None,  # [N, K, P, Q]
    act: str = "relu",
    backend: str = AUTO,
    memory: str = "default",
) -> Tensor:
    """act(bn(conv(x)) [+ residual]). `bn` must be a plain norm (see `is_norm`); any `conv` will do.

    `memory="min"` keeps neither the result nor, where it can be computed again, x; see fastres/nn/memory.py.

    Returns:
        y: [N, K, P, Q].
    """
    z = call_reading(conv, x, memory)
    fresh = not torch.compiler.is_compiling() and is_plain(conv, nn.Conv2d) and not has_global_hooks()
    if fresh and not (bn.training and isinstance(bn, nn.BatchNorm2d)) and not runs_stock(bn, z):
        settings = norm_arguments(bn)
        mean, var, weight, bias = (settings[name] for name in ("running_mean", "running_var", "weight", "bias"))
        tensors = z, residual, mean, var, weight, bias
        if is_plain_eager(*tensors) and not settings["training"]:
            if not (torch.is_grad_enabled() and any_requires_grad(*tensors)):
                y = bn_act_over(z, mean, var, weight, bias, residual, act=act, eps=settings["eps"], backend=backend)
                if y is not None:
                    return y
    return bn_step(z, bn, residual, act, backend, memory)


def conv_norm_act(
    x: Tensor,  # [N, C, H, W]
    conv: nn.Module,
    norm: nn.Module,
    act: nn.Module | None = None,
    residual: Tensor | None = None,  # [N, K, P, Q]
    backend: str = AUTO,
    memory: str = "default",
) -> Tensor:
    """act(norm(conv(x)) [+ residual]), fused as far as the modules are stock and bare; see `norm_act`.

    Returns:
        y: [N, K, P, Q].

    Example:
        >>> import torch
        >>> from fastres.nn import conv_norm_act
        >>> conv, bn = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
        >>> conv_norm_act(torch.randn(2, 3, 4, 4), conv, bn, torch.nn.ReLU()).shape
        torch.Size([2, 4, 4, 4])
    """
    if is_norm(norm) and (act is None or is_plain(act, nn.ReLU)):
        return conv_bn_act(x, conv, norm, residual, "none" if act is None else "relu", backend, memory)
    return norm_act(call_reading(conv, x, memory), norm, act, residual, backend, memory)


def run_sequence(modules: Iterable[nn.Module], x: Any, backend: str = "auto", memory: str = "default") -> Any:
    """`nn.Sequential`'s forward, each plain norm fused with its plain neighbors: Conv2d before, ReLU behind."""
    chain = tuple(modules)
    last = len(chain) - 1
    index = 0
    while index <= last:
        module = chain[index]
        conv = module if index < last and type(module) is nn.Conv2d else None
        norm = module if conv is None else chain[index + 1]
        if not is_norm(norm):
            x = call_reading(module, x, memory)
            index += 1
            continue
        index += 1 if conv is None else 2
        relu = index <= last and is_plain(chain[index], nn.ReLU)
        act = "relu" if relu else "none"
        if conv is None:
            x = bn_step(x, norm, None, act, backend, memory)
        else:
            x = conv_bn_act(x, conv, norm, None, act, backend, memory)
        index += relu
    return x
