"""Memory around a tensor that a kernel must neither read nor write."""

import torch


def guarded(t):
    """The tensor in the middle of NaN, and the memory around it."""
    memory = torch.full((t.numel() + 256,), float("nan"), dtype=t.dtype)
    view = memory.as_strided(t.shape, t.stride(), 128)
    view.copy_(t)
    return view, memory
