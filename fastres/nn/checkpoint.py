"""Activation checkpointing that moves BN statistics once.

`torch.utils.checkpoint` runs a checkpointed function again in backward, and every BN inside averages the same batch
into its running statistics twice (pytorch#96136). `bn_once` makes the second run leave them alone, for a call of
checkpoint; `moving_once` for a block, whoever checkpoints it: a forward inside a backward is such a second run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def _statistics_apart(norms: list[_BatchNorm]) -> Iterator[None]:
    """Training-mode BNs move copies of their statistics; what is saved for backward stays as in the first run."""
    kept = [(norm._buffers, dict(norm._buffers)) for norm in norms if norm.training]
    for buffers, originals in kept:
        buffers.update({name: None if t is None else t.clone() for name, t in originals.items()})
    try:
        yield
    finally:
        for buffers, originals in kept:
            buffers.update(originals)


def moving_once(block: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`run(block, ...)`; inside a backward pass, where checkpointing runs it again, the statistics stay."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return run(block, *args, **kwargs)
    with _statistics_apart([m for m in block.modules() if isinstance(m, _BatchNorm)]):
        return run(block, *args, **kwargs)


def bn_once(module: nn.Module) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """A `context_fn` for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`: statistics move once per step.

    Args:
        module: what is checkpointed; every BN inside it is covered, stock or fused.

    Raises:
        TypeError: `module` is not a Module.

    Example:
        >>> import torch, fastres
        >>> from torch.utils.checkpoint import checkpoint
        >>> block, x = fastres.nn.BasicBlock(4, 4), torch.randn(2, 4, 8, 8, requires_grad=True)
        >>> checkpoint(block, x, use_reentrant=False, context_fn=fastres.nn.bn_once(block)).sum().backward()
        >>> int(block.bn1.num_batches_tracked)
        1
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}, expected an nn.Module")
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    return lambda: (nullcontext(), _statistics_apart(norms))
