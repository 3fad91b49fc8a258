"""swap: the blocks of an existing model run by the fused operators, in place, undoable, with a report.

    adapters.py   what is known of a block class; register_block
    library.py    the classes known by name: torchvision, timm, Hugging Face, plain sequences
    fused.py      the fused subclasses, made on demand
    match.py      which modules are blocks, and why one is left alone
    measure.py    verify=: each block against float64 on its real inputs
    report.py     SwapReport

`fastres.swap` is the function; this package's names are imported with `from fastres.swap import ...`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastres._dispatch import check_environment, check_name
from fastres.nn.memory import MEMORY
from fastres.swap.adapters import BlockAdapter, register_block
from fastres.swap.fused import Options, convert, restore
from fastres.swap.match import Filter, find_blocks
from fastres.swap.report import SwapReport, SwapRow

__all__ = ["BlockAdapter", "SwapReport", "SwapRow", "register_block", "swap", "swapped", "unswap"]

logger = logging.getLogger("fastres")

FUSION = ("block",)
CHECKPOINT_BN = ("torch", "once")


def swap(
    model: nn.Module,
    *,
    include: Filter = None,
    exclude: Filter = None,
    backend: str = "auto",
    verify: Any = None,
    dry_run: bool = False,
    strict: bool = False,
    fusion: str = "block",
    memory: str = "default",
    checkpoint_bn: str = "torch",
) -> SwapReport:
    """Makes the blocks of `model` run the fused operators, in place.

    Every known block (torchvision and timm BasicBlock and Bottleneck, their stems, Hugging Face ResNet layers, timm's
    ConvNormAct and BatchNormAct2d, sequences of convolution, BN and ReLU, classes given to `register_block`; a BN may
    be a FrozenBatchNorm2d of torchvision, timm or Hugging Face) keeps its children, their names and its
    state_dict; its class becomes a fused subclass, which also runs its stock forward whenever a child was hooked,
    parametrized or replaced since. What is not swapped has a row with the reason. Global module hooks see the block
    alone: the BN and ReLU modules inside it are not called. Nothing made of weights is kept: every write to one is
    followed, through `.data` too. Swap before `fully_shard` and before `torch.compile`.

    Args:
        model: any module; for training, for eager inference, or to be compiled afterwards.
        include, exclude: which blocks, by fully-qualified name: a glob, a list of globs, or callable(name, module). A
            glob that matches a module stands for everything inside it.
        backend: "auto", or a backend's name for every block; see `fastres.explain`.
        verify: an example input (a tensor, a tuple of arguments or a dict of keyword arguments). Each block is then
            measured against float64 on the inputs it meets inside the model: in eval and training mode, forward and
            backward, and without gradients; one that fails is left stock with the status "rolled_back". All on copies:
            the model, its statistics, its gradients and the random state stay as they are.
        dry_run: change nothing and report what would happen.
        strict: raise instead of warning when nothing can be swapped.
        fusion: how far it goes. "block", all there is so far: each BN with its residual and ReLU, the convolutions
            PyTorch's own.
        memory: "min" trains in less memory: what the convolutions and the pool of a block read, and block outputs, are
            not kept for backward but computed there again from the convolutions' outputs, one pass over each. The
            gradients are the same, and the statistics move once. Ignored inside activation checkpointing and
            torch.compile, which choose for themselves. "default" keeps what PyTorch's own convolutions save.
        checkpoint_bn: "once" moves the running statistics once per step also under `torch.utils.checkpoint`, reentrant
            or not, by leaving them alone in every forward that runs inside a backward; "torch", as PyTorch does, moves
            them in both runs of a checkpointed block. See also `fastres.nn.bn_once`.

    Returns:
        The report: rows, `revert()`, `to_dict()`; print it for a table.

    Raises:
        TypeError: `model` is not a Module, a filter is of another type.
        ValueError: unknown backend (that of FASTRES_BACKEND or FASTRES_DISABLE too), fusion, memory or checkpoint_bn;
            nothing to swap with `strict=True`; `verify` does not run through the model.

    Example:
        >>> import torch, fastres
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> print(fastres.swap(net))
        Sequential: 1 of 1 blocks swapped
        block    pattern   status
        (model)  sequence  swapped
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    check_name(backend)
    check_environment()
    for argument, got, known in (
        ("fusion", fusion, FUSION),
        ("memory", memory, MEMORY),
        ("checkpoint_bn", checkpoint_bn, CHECKPOINT_BN),
    ):
        if got not in known:
            raise ValueError(f"{argument}: got {got!r}, expected one of {known}")
    options = Options(backend, memory, checkpoint_bn)
    matches = find_blocks(model, include, exclude)
    chosen = [match for match in matches if match.refusal is None]
    ratios: dict[str, float] = {}
    failures: dict[str, str] = {}
    if verify is not None and chosen:
        from fastres.swap.measure import measure

        ratios, failures = measure(model, chosen, verify, options)
    rows = []
    for match in matches:
        refusal, ratio = match.refusal, ratios.get(match.name) if match.refusal is None else None
        if refusal is not None:
            rows.append(SwapRow(match.name, match.pattern, "skipped", refusal.code, refusal.message))
        elif match.name in failures:
            rows.append(
                SwapRow(match.name, match.pattern, "rolled_back", "NUMERICS", failures[match.name], error_ratio=ratio)
            )
        else:
            rows.append(SwapRow(match.name, match.pattern, "swapped", error_ratio=ratio))
    report = SwapReport(type(model).__name__, rows, options, dry_run)
    if strict:
        report.raise_if_none()
    if not dry_run:
        for match in chosen:
            if match.name not in failures:
                report.remember(match.name, match.block, convert(match.block, options))
        _keep_pages()
    _log(report)
    return report


def _keep_pages() -> None:
    """Make glibc keep freed activations for the next ones, instead of giving their pages back to be faulted in again.

    It does so up to the size of the largest block that was freed, 32 MiB at most; no page of this one is touched.
    ResNet-18 in eval mode, bf16, batch 8, one thread: 80 ms before it, 70 ms after.
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8, device="cpu")


def _log(report: SwapReport) -> None:
    for row in report.rows:
        level = logging.WARNING if row.status == "rolled_back" else logging.INFO
        logger.log(level, "swap: %s %s %s %s", row.name or "(model)", row.status, row.reason or "", row.message)
    if not any(row.status == "swapped" or row.reason == "ALREADY" for row in report.rows):
        logger.warning("swap: nothing to swap in %s: %s", report.model, report.summary())


@contextmanager
def swapped(
    model: nn.Module,
    *,
    include: Filter = None,
    exclude: Filter = None,
    backend: str = "auto",
    verify: Any = None,
    dry_run: bool = False,
    strict: bool = False,
    fusion: str = "block",
    memory: str = "default",
    checkpoint_bn: str = "torch",
) -> Iterator[SwapReport]:
    """`swap` for the length of a `with` block: reverted on exit, by an exception too. Arguments and errors as `swap`.

    Example:
        >>> import torch, fastres
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> with fastres.swapped(net) as report:
        ...     y = net(torch.randn(2, 3, 8, 8))
        >>> type(net).__name__
        'Sequential'
    """
    report = swap(
        model,
        include=include,
        exclude=exclude,
        backend=backend,
        verify=verify,
        dry_run=dry_run,
        strict=strict,
        fusion=fusion,
        memory=memory,
        checkpoint_bn=checkpoint_bn,
    )
    try:
        yield report
    finally:
        report.revert()


def unswap(model: nn.Module) -> int:
    """Gives every swapped block of `model` its stock class back, without a report: for a copy or an unpickled model.

    Returns:
        How many blocks were changed.

    Raises:
        TypeError: `model` is not a Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    blocks = [block for block in model.modules() if "fastres_stock" in type(block).__dict__]
    for block in blocks:
        restore(block)
    return len(blocks)
