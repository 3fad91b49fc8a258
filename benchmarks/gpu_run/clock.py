"""Timing on a GPU for `make gpu`: a cold L2 cache, no launch gaps, and the clocks on record."""

from __future__ import annotations

import shutil
import subprocess
import time

import torch

from fastres.lab.timing import Timer, event_timer, timer_for

_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")


def cold_timer(device: torch.device) -> Timer:
    """Events around a call that finds none of its tensors in the L2 cache; the wall clock on a CPU.

    The cache is flushed by filling a buffer of four times its size, at least 256 MiB. That takes about 100 us, during
    which the first launches of the call are queued: an operator's time is that of its kernels, as in a network.
    """
    if device.type != "cuda":
        return timer_for(device)
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 256 << 20)
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return event_timer(device, before=buffer.zero_)


class Clocks:
    """The state of the GPU before the measurements and, looked up again every 20 s, after them."""

    def __init__(self) -> None:
        self._found, self._looked = {"before": state()}, time.monotonic()

    def read(self) -> dict[str, dict[str, str] | None]:
        if time.monotonic() - self._looked > 20:
            self._looked, self._found["after"] = time.monotonic(), state()
        return dict(self._found)


def state() -> dict[str, str] | None:
    """The GPU's clocks, temperature and power now; None where nvidia-smi cannot tell."""
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
