"""The facts about a tensor that every launch needs: its device and its architecture."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


def device_guard(x: torch.Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, because Triton launches on the current device and its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(x: torch.Tensor) -> int:
    """Compute capability as 80, 90, 100, ...; 0 on a CPU, where kernels run in Triton's interpreter."""
    return _capability(x.device.index) if x.is_cuda else 0
