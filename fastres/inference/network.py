"""One captured call of a frozen model, ready to run; the trees of weights that hold its constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastres.graph.export import Captured
from fastres.graph.rewrite import Rewritten, rewrite
from fastres.inference.executor import Executor


def source_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, also those with two names, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def fold(
    captured: Captured,
    source: nn.Module,
    dtype: torch.dtype,
    shared: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
) -> Rewritten:
    """The network of a captured call on `source`'s tensors as they are now."""
    tensors: Mapping[str, Tensor] = source_tensors(source) | captured.constants
    if device is not None:
        tensors = {name: t.to(device) for name, t in tensors.items()}
    return rewrite(captured, tensors, dtype, shared)


class Network:
    """A captured call and the executor of its graph.

    Attributes:
        constants: its own, in the graph's order; None for the network whose constants are the model's `weights`.
    """

    def __init__(self, captured: Captured, executor: Executor, constants: tuple[Tensor, ...] | None = None) -> None:
        self.captured, self.executor, self.constants = captured, executor, constants


class Holder(nn.Module):
    """A part of a tree of tensors with dotted names; runs nothing."""


def hold(tensors: Mapping[str, Tensor]) -> Holder:
    """A tree that has these tensors as buffers under their dotted names."""
    root = Holder()
    for name, t in tensors.items():
        parent: nn.Module = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, Holder())
            parent = parent._modules[part]  # type: ignore[assignment]
        parent.register_buffer(leaf, t)
    return root.eval()


def held(root: nn.Module, names: Any) -> tuple[Tensor, ...]:
    """The tensors of a tree by their dotted names."""
    buffers = dict(root.named_buffers(remove_duplicate=False))
    return tuple(buffers[name] for name in names)


def in_layout(tensors: tuple[Tensor, ...], channels_last: bool) -> tuple[Tensor, ...]:
    """4-dimensional tensors in channels_last, or as they are."""
    if not channels_last:
        return tensors
    return tuple(t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors)
