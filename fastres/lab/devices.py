"""Device selection, and the memory layout that suits fused blocks."""

from __future__ import annotations

import torch
from torch import nn

from fastres.lab.errors import DeviceError


def channels_last(model: nn.Module) -> nn.Module:
    """Convert the weights to channels_last in place: the layout in which fused blocks and tensor cores are fastest."""
    moved: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the GPU if there is one, else the CPU.

    Raises DeviceError for a name that is not auto, cpu, cuda or cuda:N, and for a GPU that is not there.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    if (device.index or 0) >= count:
        have = f"cuda:0 to cuda:{count - 1}" if count else "no GPU that torch can use (see fastres info)"
        raise DeviceError(f"device: got {name!r}, but this machine has {have}")
    return torch.device("cuda", device.index or 0)
