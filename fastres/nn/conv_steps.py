"""The steps that begin with a convolution: one conv_act with the BN folded in where nothing trains, else two calls.

    conv_norm_act   act(norm(conv(x)) [+ residual]) given as modules
    conv_bn_act     the same once the BN and the ReLU are known to be stock and bare
    run_sequence    a chain of modules, each BN fused with the convolution before it and the ReLU behind it

    formula    y = act(bn(conv(x)) [+ residual])
    eval mode  y = act(conv(x, w') + b' [+ residual])      w', b' of `fastres.nn.fold`

A fold is made at the first call that can use it and kept outside the modules, so that no copy, pickle or state_dict
holds it. It is used again only while the six tensors that it was made of are the same objects, at the same addresses,
with the same version counters. A write through ``.data`` moves no counter: so a fold is also dropped by every call that
trains and by ``train()`` and ``eval()`` of the block it belongs to, which come between such writes and the next
evaluation in every usual loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastres import _dispatch
from fastres._dispatch import AUTO, choose
from fastres.nn.fold import Folded, Refusal, fold
from fastres.nn.memory import call_reading
from fastres.nn.steps import bn_step, has_global_hooks, is_plain, norm_act
from fastres.ops._autograd import any_requires_grad, is_plain_eager
from fastres.ops._conv_backends import conv_then
from fastres.ops.conv_act import OPERATOR

# Where conv_act with its epilogue has been measured faster than a convolution and bn_act.
_MEASURED = "cpu"


class _Fold:
    """A fold, and what it was made of."""

    def __init__(self, x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, tensors: tuple[Tensor | None, ...]) -> None:
        self.conv = weakref.ref(conv)
        self.tensors = tuple(
            (None, 0, 0) if t is None else (weakref.ref(t), t.data_ptr(), _version(t)) for t in tensors
        )
        self.settings, self.eps, self.dtype = _dispatch.settings(), bn.eps, x.dtype
        self.folded: Folded | None = None  # refused
        if type(conv.weight) is not nn.Parameter:  # torch.func.functional_call: other tensors every time
            return
        if any(t is not None and (t.is_inference() or t.device != x.device) for t in tensors):
            return
        assert OPERATOR.kind is not None
        call = OPERATOR.kind(x, conv.weight, groups=conv.groups)
        if conv.weight.dtype is not x.dtype or choose(OPERATOR, AUTO, x, call).name != "cpu":
            return
        with torch.inference_mode(False), torch.no_grad():
            made = fold(conv, bn, x.dtype)
        self.folded = None if isinstance(made, Refusal) else made

    def holds(self, x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether nothing that the fold was made of has changed."""
        for t, (reference, address, version) in zip(tensors, self.tensors, strict=True):
            if t is None:
                if reference is not None:
                    return False
            elif reference is None or reference() is not t or t.data_ptr() != address or _version(t) != version:
                return False
        return (
            self.conv() is conv
            and self.eps == bn.eps
            and self.dtype is x.dtype
            and self.settings is _dispatch.settings()
        )


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


_folds: weakref.WeakKeyDictionary[nn.Module, _Fold] = weakref.WeakKeyDictionary()  # by BN


def forget(modules: Iterable[nn.Module]) -> None:
    """Drops the folds of the BN among `modules`."""
    if _folds:
        for module in modules:
            _folds.pop(module, None)


class ForgetsFolds(nn.Module):
    """A block that drops its children's folds when its mode is set."""

    def train(self, mode: bool = True) -> Any:
        forget(self.children())
        return super().train(mode)


def conv_bn_act(
    x: Tensor,  # [N, C, H, W]
    conv: nn.Module,
    bn: nn.BatchNorm2d,
    residual: Tensor | None = None,  # [N, K, P, Q]
    act: str = "relu",
    backend: str = AUTO,
    memory: str = "default",
) -> Tensor:
    """act(bn(conv(x)) [+ residual]). `bn` must be plain (see `is_plain`); any `conv` will do.

    `memory="min"` keeps neither the result nor, where it can be computed again, x; see fastres/nn/memory.py.

    Returns:
        y: [N, K, P, Q].
    """
    if not torch.compiler.is_compiling():
        if backend == AUTO and not bn.training and is_plain(conv, nn.Conv2d):
            found = folded(x, conv, bn, residual)
            if found is not None:
                return conv_then(x, *found, residual, conv.stride, conv.padding, conv.dilation, conv.groups, act)
        elif _folds:
            _folds.pop(bn, None)
    return bn_step(call_reading(conv, x, memory), bn, residual, act, backend, memory)


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

    In eval mode without gradients a plain BatchNorm2d is folded into a plain Conv2d, and all of it is one call.

    Returns:
        y: [N, K, P, Q].

    Example:
        >>> import torch
        >>> from fastres.nn import conv_norm_act
        >>> conv, bn = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
        >>> conv_norm_act(torch.randn(2, 3, 4, 4), conv, bn, torch.nn.ReLU()).shape
        torch.Size([2, 4, 4, 4])
    """
    if is_plain(norm, nn.BatchNorm2d) and (act is None or is_plain(act, nn.ReLU)):
        return conv_bn_act(x, conv, norm, residual, "none" if act is None else "relu", backend, memory)
    return norm_act(call_reading(conv, x, memory), norm, act, residual, backend, memory)


def folded(x: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d, residual: Any = None) -> Folded | None:
    """`conv`'s weight and bias with `bn` folded in, for a call on x; None where the two must run as they are.

    That is: x or the tensors want a gradient, are traced or wrapped; another device, type or padding than conv_act's
    fast one; statistics missing; a fold that would lose accuracy.
    """
    parameters, norm, buffers = conv._parameters, bn._parameters, bn._buffers
    try:
        tensors = (
            parameters["weight"],
            parameters["bias"],
            norm["weight"],
            norm["bias"],
            buffers["running_mean"],
            buffers["running_var"],
        )
    except KeyError:  # a replica of nn.DataParallel
        return None
    if tensors[4] is None or not is_plain_eager(x, residual, *tensors):
        return None
    if torch.is_grad_enabled() and any_requires_grad(x, residual, *tensors):
        _folds.pop(bn, None)
        return None
    if torch.is_autocast_enabled(_MEASURED) or has_global_hooks() or conv.padding_mode != "zeros":
        return None
    if x.ndim != 4 or x.shape[1] != conv.in_channels or x.device.type != _MEASURED:
        return None  # the stock modules say what is wrong
    found = _folds.get(bn)
    if found is None or not found.holds(x, conv, bn, tensors):
        found = _folds[bn] = _Fold(x, conv, bn, tensors)
    return found.folded


def run_sequence(modules: Iterable[nn.Module], x: Any, backend: str = "auto", memory: str = "default") -> Any:
    """`nn.Sequential`'s forward, each plain BatchNorm2d fused with its plain neighbours: Conv2d before, ReLU behind."""
    chain = tuple(modules)
    last = len(chain) - 1
    index = 0
    while index <= last:
        module = chain[index]
        conv = module if index < last and type(module) is nn.Conv2d else None
        norm = module if conv is None else chain[index + 1]
        if not is_plain(norm, nn.BatchNorm2d):
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
