"""Autograd of an operator, as `torch.library.register_autograd` but with less per call: half the time with gradients.

The library's version flattens every call's arguments as a pytree, three times. Our operators take tensors and scalars
only, so one autograd.Function per operator does. Its place in the dispatcher is the same: the Autograd key, above the
backends and the fakes, so torch.compile, opcheck and functorch see no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_below_autograd = torch._C._AutoDispatchBelowAutograd
_after_autograd = torch._C._after_autograd_keyset
any_requires_grad = torch._C._any_requires_grad
_KERNEL_KEYS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def is_plain_eager(first: object, *others: object) -> bool:
    """Say whether a call would reach the kernel as it is: no tensor subclass, mode, transform or tracer in between.

    `first` is the tensor that carries the call: x, or in backward dy, which torch.autograd.grad(is_grads_batched=True)
    wraps by a transform that no mode shows. The dispatcher and its Python kernels cost more than a small activation's
    arithmetic. Where nothing would change the call, an operator may take the fast path: the kernel, inside an
    autograd.Function if need be.
    """
    return (
        not torch.compiler.is_compiling()
        and type(first) is torch.Tensor
        and _PLAIN.issuperset(map(type, others))
        and not _dispatch_modes()
        and not _function_modes()
        and not _transforms()
        and _tracing() is None
        and not _is_batched(first)
        and forward_ad._current_level < 0
    )


def is_transformed() -> bool:
    """Say whether a functorch transform or a level of forward-mode differentiation is active.

    There an operator's public function runs PyTorch's operators, which have the rules that ours lack: batching,
    tangents, gradients of gradients inside a transform. Asked on the dispatcher path alone: the fast path has refused
    such a call before (`is_plain_eager`).
    """
    return _transforms() or forward_ad._current_level >= 0


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Forward mode has no formula here: without this, a tangent would be lost without a word."""
    for t in args:
        if isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"fastres::{name}: got a tensor with a tangent, expected none: the functions of fastres.functional run "
                "PyTorch's operators there, the operator itself has no forward-mode formula"
            )


def refuse_elsewhere(library: torch.library.Library, name: str) -> None:
    """Makes a native operator answer None for every output on a device that it is not compiled for."""
    returns = len(getattr(torch.ops.fastres, name).default._schema.returns)
    nothing = None if returns == 1 else (None,) * returns
    library.impl(name, lambda *args: nothing, "CompositeExplicitAutograd")


def register_autograd(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Any, ...]],
) -> None:
    """Make `fastres::name` differentiable.

    Args:
        library: the fragment that defined the operator.
        name: the operator's name, without its namespace.
        kernel: what is registered for CPU and CUDA, called without another round through the dispatcher when nothing
            (a mode, a fake or a functional tensor) stands between it and autograd.
        setup_context: saves what backward needs, as for torch.library.register_autograd.
        backward: gradients, one per input of the operator.
    """
    op = getattr(torch.ops.fastres, name).default
    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def run(keyset: Any, args: Any) -> Any:
        if keyset.highestPriorityTypeId() in _KERNEL_KEYS:
            return kernel(*args)
        return op.redispatch(keyset, *args)

    class OperatorFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args_and_keyset: Any) -> Any:
            *args, keyset = args_and_keyset
            with _below_autograd():
                output = run(keyset, args)
            setup_context(ctx, tuple(args), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *backward(ctx, *grads), None

    def autograd(keyset: Any, *args: Any) -> Any:
        keyset = keyset & _after_autograd
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return apply(*args, *defaults[len(args) :], keyset)
        with _below_autograd():
            return run(keyset, args)

    apply: Callable[..., Any] = OperatorFunction.apply
    OperatorFunction.__name__ = OperatorFunction.__qualname__ = name
    library.impl(name, autograd, "Autograd", with_keyset=True)
