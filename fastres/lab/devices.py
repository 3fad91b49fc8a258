"""Device selection, and the memory layout that suits fused blocks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastres.lab.batches import Part
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
    try:
        device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"fastres runs on no {device.type}")
    except RuntimeError as error:
        raise DeviceError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if (device.index or 0) >= count:
        have = f"cuda:0 to cuda:{count - 1}" if count else "no GPU that torch can use (see fastres info)"
        raise DeviceError(f"device: got {name!r}, but this machine has {have}")
    return torch.device("cuda", device.index or 0)


@dataclass(frozen=True)
class Place:
    """This process among those of a run."""

    device: torch.device
    part: Part

    @property
    def first(self) -> bool:
        """True in the process that writes files and shows progress."""
        return self.part.rank == 0

    def total(self, sums: Tensor) -> Tensor:
        """`sums` added up over the processes."""
        if self.part.of > 1:
            dist.all_reduce(sums)
        return sums

    def take_buffers(self, model: nn.Module) -> None:
        """Copy the first process's buffers, BN's running statistics, to every process."""
        if self.part.of > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.part.of > 1:
            dist.barrier()


@contextmanager
def place(device: str) -> Iterator[Place]:
    """Join the processes that torchrun started: gloo on CPUs, NCCL where each has a GPU; a lone process joins nothing.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N"; under torchrun "cuda" is the process's own GPU.

    Raises DeviceError for a device that is not there.
    """
    several = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not several and not dist.is_initialized():
        yield Place(pick_device(device), Part())
        return
    if device == "auto" and torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        device = "cpu"
    mine = pick_device(device)
    if mine.type == "cuda":
        mine = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(mine)
    joins = not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if mine.type == "cuda" else "gloo")
    try:
        yield Place(mine, Part(dist.get_rank(), dist.get_world_size()))
    finally:
        if joins:
            dist.destroy_process_group()


@contextmanager
def interrupts(here: Place) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that the iteration ends and is saved; a second one interrupts at once.

    Several processes would stop at different iterations and wait for one another, so there the first Ctrl-C interrupts
    at once, and the run resumes from the last checkpoint; likewise in a thread, which cannot set handlers.
    """
    event = threading.Event()
    if here.part.of > 1 or threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        event.set()
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
