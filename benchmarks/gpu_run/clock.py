"""Timing on a GPU as `make gpu` does it: cold caches, no launch gaps, the clocks noted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import torch

from fastres.lab.timing import Timer, event_timer, timer_for

_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")


def cold_timer(device: torch.device) -> Timer:
    """Events around a call that finds nothing of its tensors in the L2 cache; the wall clock on a CPU.

    Filling a buffer of four times the cache, and 256 MiB at least, takes about 100 us, in which a call's first launches
    are queued: an operator's time is its kernels', as between other operators of a network.
    """
    if device.type != "cuda":
        return timer_for(device)
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 256 << 20)
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return event_timer(device, before=buffer.zero_)


def graphed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as one CUDA graph, so that what is timed is kernels and not Python; the call itself on a CPU."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_bandwidth(device: torch.device, size: int | None = None, repeats: int = 9) -> float:
    """Bytes/s of a copy too large for any cache, read and written; the best of a few."""
    size = size or (1 << 30 if device.type == "cuda" else 1 << 26)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    timer = timer_for(device)
    timer(lambda: target.copy_(source))
    return 2 * size / min(timer(lambda: target.copy_(source)) for _ in range(repeats))


def state() -> dict[str, str] | None:
    """Clocks, temperature and power of the GPU now; None where nvidia-smi does not say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in text.splitlines()[0].split(",")] if text.strip() else []
    return dict(zip(_FIELDS, values, strict=False)) or None
