"""Autograd of an operator, as `torch.library.register_autograd` but with less per call: half the time with gradients.

The library's version flattens every call's arguments as a pytree, three times. Our operators take tensors and scalars
only, so one autograd.Function per operator does. Its place in the dispatcher is the same: the Autograd key, above the
backends and the fakes, so torch.compile, opcheck and functorch see no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_below_autograd = torch._C._AutoDispatchBelowAutograd
_after_autograd = torch._C._after_autograd_keyset
_any_requires_grad = torch._C._any_requires_grad
_KERNEL_KEYS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def register_autograd(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Any, ...]],
) -> None:
    """Makes `fastres::name` differentiable.

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
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return apply(*args, *defaults[len(args) :], keyset)
        with _below_autograd():
            return run(keyset, args)

    apply: Callable[..., Any] = OperatorFunction.apply
    OperatorFunction.__name__ = OperatorFunction.__qualname__ = name
    library.impl(name, autograd, "Autograd", with_keyset=True)
