"""A network without a graph: a copy of it, swapped for eval mode; known blocks run fused, the rest as it is."""

from __future__ import annotations

import torch
from torch import nn

from fastres.graph.export import own_memory, sharing_copy
from fastres.graph.rows import FreezeRow
from fastres.swap.adapters import stock_class
from fastres.swap.fused import Options, convert
from fastres.swap.match import find_blocks

_BN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def swapped_copy(source: nn.Module, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, list[FreezeRow]]:
    """A copy of `source` in memory of its own, its blocks swapped, in `dtype`, and a row for every block.

    BN layers keep float32 tensors in half precision, as every BN computes in float32.
    """
    copy = sharing_copy(source).eval()
    own_memory(copy)
    copy.to(device)
    rows = []
    for match in find_blocks(copy):
        if match.refusal is None:
            convert(match.block, Options())
        refusal = match.refusal or ("", "one pass behind each convolution")
        became = "block" if match.refusal else "fused block"
        rows.append(FreezeRow(match.name or "(model)", "block", became, *refusal))
    copy.requires_grad_(False)
    halves = dtype in (torch.float16, torch.bfloat16)
    for module in copy.modules():
        target = torch.float32 if halves and stock_class(type(module)) in _BN else dtype
        for tensors in (module._parameters, module._buffers):
            for t in tensors.values():
                if t is not None and t.is_floating_point():
                    t.data = t.data.to(target)
    return copy, rows
