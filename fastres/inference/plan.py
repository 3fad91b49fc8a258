"""How a frozen network runs: the plan, and choosing it by measuring, in turn, on the example."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.inference.conv import FrozenConv

ROUNDS = 7
SECONDS = 2.0
HOPELESS = 3.0
PACK_MARGIN = 1.1  # a layer by itself has its weight in cache: the plain one must win by more than noise


@dataclass
class Plan:
    """What was chosen for a network, beside what its convolutions keep of themselves (packed weights).

    Attributes:
        channels_last: the memory layout of 4-dimensional inputs and weights; else NCHW.
        images_at_a_time: larger batches run in parts of so many images; None: whole.
    """

    channels_last: bool = False
    images_at_a_time: int | None = None


def measure(calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Milliseconds a call, the (upper) median of interleaved rounds: at most 7 of them, about 2 seconds, at least 3.

    Args:
        calls: what to time, by name; each is run twice first (a frozen network's second call records its program), and
            one that then takes more than 3x the fastest's time twice running is not timed further.
        device: synchronised around every call when it is a GPU.
    """
    with torch.no_grad():
        for call in calls.values():
            call()
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


def choose_packs(convs: Sequence[FrozenConv], run: Callable[[], Any]) -> int:
    """For each convolution and input that `run` shows, keeps the pack or the plain weight, whichever is faster.

    Convolutions alike in shape are measured once; a layer is timed 5 times each way.

    Returns:
        How many layers run on a pack.
    """
    seen: list[tuple[FrozenConv, Tensor]] = []

    def watch(conv: FrozenConv, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append((conv, torch.empty_like(x)))
            return real(x, *args, **kwargs)

        return record

    for conv in convs:
        conv.__dict__["run"] = watch(conv, conv.run)
    try:
        with torch.no_grad():
            run()
    finally:
        for conv in convs:
            del conv.__dict__["run"]
    faster: dict[Any, bool] = {}
    packed = 0
    with torch.no_grad():
        for conv, x in seen:
            pack = conv.weight_for(x)
            if pack is None:
                continue
            key = x.shape, x.dtype, conv.weight.shape, conv.stride, conv.padding, conv.dilation
            if key not in faster:
                x.normal_()
                ways = {True: pack, False: conv.weight.detach()}
                calls = {way: _bound(conv, x, weight) for way, weight in ways.items()}
                times = {way: [_milliseconds(call, x.device) for _ in range(6)][1:] for way, call in calls.items()}
                faster[key] = min(times[True]) <= PACK_MARGIN * min(times[False])
            packed += faster[key]
            if not faster[key]:
                conv.plain(x)
    return packed


def measured_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s of a large copy, read and written; flop/s of a square product in ``dtype``): best of four."""
    size, elements = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 24)
    a = torch.ones(size, size, device=device, dtype=dtype)
    x = torch.ones(elements, device=device)
    y = torch.empty_like(x)
    with torch.no_grad():
        product = min(_milliseconds(lambda: a @ a, device) for _ in range(4))
        copy = min(_milliseconds(lambda: y.copy_(x), device) for _ in range(4))
    return 2 * x.numel() * x.itemsize / copy * 1e3, 2 * size**3 / product * 1e3


def _bound(conv: FrozenConv, x: Tensor, weight: Tensor) -> Callable[[], Any]:
    return lambda: conv.onednn(x, weight, None, conv.act, False)


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1e3
