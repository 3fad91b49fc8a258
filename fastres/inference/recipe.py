"""How a frozen network is made of its source's tensors: from a graph, or, where there is none, from its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastres.inference.build import build
from fastres.inference.capture import Captured
from fastres.inference.modules import rewrite
from fastres.inference.report import FreezeRow
from fastres.inference.signature import Signature
from fastres.inference.watch import Capture
from fastres.verify.runs import private


def source_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, also those with two names, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


class GraphRecipe:
    """A captured call and the signature it came in by."""

    def __init__(self, captured: Captured, signature: Signature) -> None:
        self.captured, self.signature = captured, signature

    def make(
        self, model: nn.Module, dtype: torch.dtype, shared: nn.Module | None = None, device: Any = None
    ) -> tuple[nn.Module, list[FreezeRow]]:
        """The network of ``model``'s tensors now, and what became of each layer; see `build`."""
        tensors: Mapping[str, Tensor] = source_tensors(model) | self.captured.constants
        if device is not None:
            tensors = {name: t.to(device) for name, t in tensors.items()}
        return build(self.captured, tensors, dtype, shared)


class ModuleRecipe:
    """Which BN reads which convolution, found by watching one call."""

    def __init__(self, found: Capture) -> None:
        self.found = found

    def make(
        self, model: nn.Module, dtype: torch.dtype, shared: nn.Module | None = None, device: Any = None
    ) -> tuple[nn.Module, list[FreezeRow]]:
        """A rewritten copy of ``model``, and what became of each layer; see `rewrite`."""
        module = private("model", model).eval()
        if device is not None:
            module = module.to(device)
        return module, rewrite(module, self.found, dtype)


Recipe = GraphRecipe | ModuleRecipe
