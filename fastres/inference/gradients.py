"""Gradients through a frozen network: of its input, where that was asked for; else an error that says how to ask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastres.inference.executor import is_traced


def wants_gradients(tensors: Iterable[Tensor]) -> bool:
    """Tell whether a call on these tensors is one that autograd follows."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not is_traced(*tensors)


class _Refuse(torch.autograd.Function):
    """The identity, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "a frozen network keeps nothing for a backward pass: freeze(..., differentiable=True) gives gradients of "
            "its input; to train its weights, train the model that it was made of"
        )


def without_gradient(_: str, t: Any) -> Any:
    """An output whose backward pass raises, and says how to get one."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        return t
    return _Refuse.apply(torch.empty(0, requires_grad=True), t)  # type: ignore[no-untyped-call]
