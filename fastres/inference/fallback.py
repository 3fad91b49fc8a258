"""A network without a graph: a copy of it whose largest parts that have one are frozen; the rest is swapped.

A detector is one: backbone, pyramid and heads have graphs, what is between them does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastres.graph.export import CaptureError, own_memory, sharing_copy
from fastres.graph.rows import FreezeRow
from fastres.inference.checks import run_once
from fastres.swap.adapters import stock_class
from fastres.swap.fused import Options, convert
from fastres.swap.match import find_blocks

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SMALLEST = 3  # modules in a part: what is smaller gains nothing by a graph of its own
_BN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def frozen_parts(
    source: nn.Module, inputs: Any, freeze_part: Callable[[str, nn.Module, tuple[Any, ...]], nn.Module]
) -> dict[str, nn.Module]:
    """The largest submodules that have a graph, frozen, by name.

    Args:
        source: a copy of one's own: it runs once.
        inputs: an example of its call.
        freeze_part: freezes the submodule of a name for these positional arguments; raises CaptureError for one that
            has no graph.
    """
    calls: dict[str, list[tuple[Any, ...]]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            known = not kwargs and all(isinstance(leaf, Tensor | int | float | str) for leaf in tree_leaves(args))
            calls.setdefault(name, []).append(tree_map(_cloned, args) if known else ())

        return hook

    parts = [(n, m) for n, m in source.named_modules() if n and any(isinstance(part, _CONVS) for part in m.modules())]
    hooks = [m.register_forward_pre_hook(record(n), with_kwargs=True) for n, m in parts]
    try:
        run_once(source, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, nn.Module] = {}
    for name, module in parts:  # parents come before their children
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if inside or not all(calls.get(name, ((),))) or len(list(module.modules())) < _SMALLEST:
            continue
        with contextlib.suppress(CaptureError):
            found[name] = freeze_part(name, module, max(calls[name], key=_pixels))
    return found


def _cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _pixels(args: tuple[Any, ...]) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, Tensor))


def swapped_copy(
    source: nn.Module, dtype: torch.dtype, device: torch.device, parts: Mapping[str, nn.Module] | None = None
) -> tuple[nn.Module, list[FreezeRow]]:
    """A copy of `source` in memory of its own, its blocks swapped, in `dtype`, and a row for every block.

    BN layers keep float32 tensors in half precision, as every BN computes in float32.

    Args:
        parts: frozen submodules, which take the places of their sources.
    """
    copy = sharing_copy(source).eval()
    rows: list[FreezeRow] = []
    for name, part in (parts or {}).items():
        parent, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(parent), leaf, part)
        own: Any = part
        rows.append(FreezeRow(name, "part", "frozen graph", "", f"{own.report.folded} BN folded"))
        rows += [replace(row, name=f"{name}.{row.name}") for row in own.report.rows]
    own_memory(copy)
    copy.to(device)
    for match in find_blocks(copy):
        if any(match.name == name or match.name.startswith(f"{name}.") for name in parts or ()):
            continue
        if match.refusal is None:
            convert(match.block, Options())
        refusal = match.refusal or ("", "one pass behind each convolution")
        became = "block" if match.refusal else "fused block"
        rows.append(FreezeRow(match.name or "(model)", "block", became, *refusal))
    copy.requires_grad_(False)
    halves = dtype in (torch.float16, torch.bfloat16)
    inside = {id(m) for part in (parts or {}).values() for m in part.modules()}
    for module in copy.modules():
        if id(module) in inside:
            continue  # in its dtype already
        target = torch.float32 if halves and stock_class(type(module)) in _BN else dtype
        for tensors in (module._parameters, module._buffers):
            for t in tensors.values():
                if t is not None and t.is_floating_point():
                    t.data = t.data.to(target)
    return copy, rows
