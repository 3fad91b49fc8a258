"""Choosing a memory layout: by measuring, in turn, on the example."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS = 7
SECONDS = 2.0
HOPELESS = 3.0


def measure(calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Milliseconds a call, the (upper) median of interleaved rounds: at most 7 of them, about 2 seconds, at least 3.

    Args:
        calls: what to time, by name; each is warmed up once first, and one that then takes more than 3x the fastest's
            time twice running is not timed further.
        device: synchronised around every call when it is a GPU.
    """
    with torch.no_grad():
        warm = {name: _milliseconds(call, device) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        begin = time.perf_counter()
        for turn in range(ROUNDS):
            if turn >= 3 and time.perf_counter() - begin > SECONDS:
                break
            for name, call in calls.items():
                if turn and min(warm[name], *samples[name]) > HOPELESS * min(min(s) for s in samples.values()):
                    continue
                samples[name].append(_milliseconds(call, device))
    return {name: sorted(times)[len(times) // 2] for name, times in samples.items()}


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1e3
