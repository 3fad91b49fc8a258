"""The steps that begin with a convolution.

    conv_norm_act   act(norm(conv(x)) [+ residual]) given as modules
    conv_bn_act     the same once the BN and the ReLU are known to be stock and bare
    run_sequence    a chain of modules, each BN fused with the convolution before it and the ReLU behind it

    formula    y = act(bn(conv(x)) [+ residual])

Two calls: the convolution, then `bn_act`. In eval mode without gradients the second writes over the output of the
first, which nobody else has seen. A 3x3 convolution that Winograd's kernels run faster (fastres/ops/_conv_native.py)
goes through `conv_act`, in eval mode with the BN's scale and shift in its own pass. Nothing is kept between calls: the
transformed weight, scale and shift are computed in each, so that every write to a weight or a statistic, through
``.data`` too, is followed.
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
from fastres.ops.conv_act import conv_act, winograd_is_faster


def conv_bn_act(
    x: Tensor,  # [N, C, H, W]
    conv: Any,
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
    fresh = not torch.compiler.is_compiling() and is_plain(conv, nn.Conv2d) and not has_global_hooks()
    own = fresh and _goes_by_winograd(conv, x, backend)
    if own and (residual is None or (residual.dtype is x.dtype and residual.shape == _output_shape(conv, x))):
        fixed = _fixed_norm(bn, x, residual, conv.weight, conv.bias)
        if fixed is not None and len(fixed["running_mean"]) == conv.out_channels:
            scale, shift = _scale_and_shift(**fixed, added=conv.bias)
            return _convolve(conv, x, shift, residual, scale, act)
    z = call_reading(conv, x, memory, _convolve_alone if own else None)
    fixed = _fixed_norm(bn, z, residual) if fresh else None
    if fixed is not None:
        y = bn_act_over(z, residual=residual, act=act, backend=backend, **fixed)
        if y is not None:
            return y
    return bn_step(z, bn, residual, act, backend, memory)


def _fixed_norm(bn: nn.Module, *tensors: Any) -> dict[str, Any] | None:
    """The norm's statistics, weight, bias and eps, in eval mode where nothing wants a gradient; else None."""
    if (bn.training and isinstance(bn, nn.BatchNorm2d)) or runs_stock(bn, tensors[0]):
        return None
    settings = norm_arguments(bn)
    fixed = {name: settings[name] for name in ("running_mean", "running_var", "weight", "bias", "eps")}
    everything = *tensors, *(t for name, t in fixed.items() if name != "eps")
    if settings["training"] or not is_plain_eager(*everything):
        return None
    return None if torch.is_grad_enabled() and any_requires_grad(*everything) else fixed


def _goes_by_winograd(conv: Any, x: Any, backend: str) -> bool:
    """Tell whether conv_act runs a plain convolution faster than PyTorch's, as its cost model says."""
    if conv.kernel_size != (3, 3) or conv.stride != (1, 1) or backend != AUTO or conv.padding_mode != "zeros":
        return False
    if type(x) is not Tensor or x.device.type != "cpu" or x.ndim != 4 or isinstance(conv.padding, str):
        return False
    weight = conv.weight
    if x.dtype is not weight.dtype or x.shape[1] != weight.shape[1] * conv.groups or torch.is_autocast_enabled("cpu"):
        return False
    if conv.bias is not None and conv.bias.dtype is not x.dtype:
        return False
    return is_plain_eager(x, weight, conv.bias) and winograd_is_faster(
        x, weight, conv.padding, conv.dilation, conv.groups
    )


def _output_shape(conv: Any, x: Tensor) -> tuple[int, ...]:
    """The shape of a 3x3 convolution of stride 1."""
    (n, _, h, w), (along_h, along_w) = x.shape, conv.padding
    return n, conv.out_channels, h + 2 * along_h - 2, w + 2 * along_w - 2


def _convolve(
    conv: Any,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    return conv_act(x, conv.weight, bias, residual, scale, 1, conv.padding, act=act)


def _convolve_alone(conv: Any, x: Tensor) -> Tensor:
    return _convolve(conv, x, conv.bias)


def _scale_and_shift(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    added: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A BN's scale and shift, [K] in float32, for y = scale * c + shift, with `added` on c; computed in float64."""
    scale, shift = (running_var.double() + eps).rsqrt_(), -running_mean.double()
    scale = scale if weight is None else scale.mul_(weight)
    shift = shift.mul_(scale) if added is None else shift.add_(added).mul_(scale)
    return scale.float(), (shift if bias is None else shift.add_(bias)).float()


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
