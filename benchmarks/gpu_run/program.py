"""The frame of the programs that `make gpu` starts to measure: options, deadline, workers, timer, clocks, file."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastres.lab.results import environment, write_json
from fastres.lab.timing import Timer, event_timer, timer_for

WORKER_GIB = 5  # of GPU memory per compiling process, at most
_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")


class Program:
    """A program that measures on one device until a deadline, and updates one file of the run as it goes."""

    def __init__(self, name: str, doc: str | None, arguments: Sequence[str] | None) -> None:
        parser = argparse.ArgumentParser(prog=f"gpu_run.{name}", description=(doc or "").partition("\n")[0])
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--seconds", type=float, required=True)
        parser.add_argument("--dry-run", action="store_true")
        options = parser.parse_args(arguments)
        self.out, self.seconds, self.dry_run = options.out, options.seconds, options.dry_run
        self.started = time.monotonic()
        self.end = self.started + self.seconds
        self.device = torch.device("cpu" if self.dry_run else "cuda:0")
        self._environment = environment(self.device, " ".join([f"gpu_run.{name}", *sys.argv[1:]]))
        self._clocks = Clocks()

    def save(self, schema: str, version: int, **data: Any) -> None:
        """Write the file, with the environment and the clocks."""
        head = {"schema": schema, "schema_version": version, "dry_run": self.dry_run}
        write_json(self.out, head | {"environment": self._environment | {"clocks": self._clocks.read()}} | data)


def memory(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


def workers(device: torch.device) -> ProcessPoolExecutor:
    """Processes that compile kernels, as many as the cores and the GPU's memory allow; one on a CPU."""
    count = 1
    if device.type == "cuda":
        count = max(1, min((os.cpu_count() or 2) - 2, memory(device) // (WORKER_GIB << 30)))
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


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
