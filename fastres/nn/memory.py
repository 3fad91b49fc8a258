"""memory="min": what a module reads is not kept for backward where its values can be computed there again.

`bn_act(..., recompute=True)` makes outputs whose values can be had again from the BN's input (ops/_bn_autograd.py).
The modules that read such an output, a convolution or a pool, save it for their own backward by themselves; a hook on
saved tensors (torch.autograd.graph.saved_tensors_hooks) puts the node that made it in its place. Kept of a block are
then the convolutions' outputs alone: half of the activations.

Nothing is replaced under hooks of somebody else (activation checkpointing, save_on_cpu), whose memory it would be, nor
of an output that was changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastres.ops._bn_autograd import is_recomputed, output_of

MEMORY = ("default", "min")

_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks
_hooks_forbidden: Any = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message


def may_recompute() -> bool:
    """Say whether saved tensors are PyTorch's own business here: no hooks on them, and none forbidden."""
    return not torch.compiler.is_compiling() and _hooks_forbidden() is None and _top_hooks(True) is None


class _Again:
    """Stands for a saved tensor: the output of this node."""

    __slots__ = ("node",)

    def __init__(self, node: Any) -> None:
        self.node = node


def _call(module: nn.Module, x: Any) -> Any:
    return module(x)  # not nn.Module.__call__: torch.fx replaces it while it traces


def call_reading(
    module: nn.Module, x: Any, memory: str = "min", run: Callable[[nn.Module, Any], Any] | None = None
) -> Any:
    """`module(x)`; where x is an output that can be computed again, backward does that instead of keeping x.

    Args:
        module: a convolution, a pool: a module without children that reads x and saves it.
        x: [N, C, H, W].
        memory: "default" changes nothing.
        run: computes module(x) in its stead.
    """
    run = _call if run is None else run
    if memory == "default" or not may_recompute() or type(x) is not Tensor or module._modules or not is_recomputed(x):
        return run(module, x)
    node, storage, layout = x.grad_fn, x.data_ptr(), (x._version, x.dtype, x.shape, x.stride())

    def pack(t: Tensor) -> _Again | tuple[Tensor, int]:
        # of another version: written to by the module itself, or by a hook on it
        is_x = t.data_ptr() == storage and (t._version, t.dtype, t.shape, t.stride()) == layout
        return _Again(node) if is_x else (t, t._version)

    def unpack(kept: _Again | tuple[Tensor, int]) -> Tensor:
        if isinstance(kept, _Again):
            return output_of(kept.node)
        t, version = kept
        if t._version != version:  # PyTorch checks the tensors that go through no hooks
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{list(t.shape)} is at version {t._version}; expected version {version} instead"
            )
        return t

    with saved_tensors_hooks(pack, unpack):
        return run(module, x)
