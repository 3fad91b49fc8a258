"""How close two answers of a network are, and how close they can be."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastres.graph.export import dtype_of
from fastres.inference.checks import run_once
from fastres.verify.runs import map_tensors, private


def close(got: Tensor, want: Tensor, share: float = 0.05) -> bool:
    """Tell whether two outputs differ by a ``share`` of the largest at most, or at all if not floating."""
    if got.is_complex():
        got, want = torch.view_as_real(got), torch.view_as_real(want)
    if not got.is_floating_point():
        return bool(torch.equal(got, want))
    want = want.detach()
    scale = float(want.abs().max()) if want.numel() else 0.0
    return math.isfinite(scale) and torch.allclose(got, want, rtol=0, atol=share * scale)


def agrees(got: Any, want: Any, share: float = 0.05) -> bool:
    """Tell whether two outputs are close, as far as the wanted one is finite; or are no tensors."""
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        return isinstance(want, Tensor) == isinstance(got, Tensor)
    if got.shape != want.shape:
        return False
    return math.isinf(share) or not bool(torch.isfinite(want).all()) or close(got.to(want.dtype), want, share)


def rounding_share(source: nn.Module, dtype: torch.dtype, given: Any, want: Any) -> float:
    """The share of its largest output by which eager itself is off in the frozen dtype: infinite where it overflows, 0
    where it does not run."""
    if dtype is dtype_of(source):
        return 0.0
    try:
        eager = private("model", source).to(dtype)
        got = run_once(eager, map_tensors(given, lambda _, t: t.to(dtype) if t.is_floating_point() else t, ""))
    except Exception:  # nothing to compare with
        return 0.0
    worst = 0.0
    for g, w in zip(tree_leaves(got), tree_leaves(want), strict=False):
        if (
            isinstance(w, Tensor)
            and isinstance(g, Tensor)
            and w.is_floating_point()
            and w.shape == g.shape
            and w.numel()
        ):
            off = float((g.to(w.dtype) - w).abs().max() / w.abs().max().clamp_min(1e-30))
            worst = max(worst, off if math.isfinite(off) else math.inf)
    return worst
