"""The frame of the programs that `make gpu` starts to measure: options, deadline, workers, and the file they update."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastres.lab.results import environment, write_json
from gpu_run.clock import Clocks

WORKER_GIB = 5  # of GPU memory per compiling process, at most


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
    """Bytes of GPU memory."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def workers(device: torch.device) -> ProcessPoolExecutor:
    """Processes that compile kernels, as many as the cores and the GPU's memory allow; one on a CPU."""
    count = 1
    if device.type == "cuda":
        count = max(1, min((os.cpu_count() or 2) - 2, memory(device) // (WORKER_GIB << 30)))
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
