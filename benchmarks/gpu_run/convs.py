"""Times the backends of conv_act, and each kernel of fastres._C_cuda, at the convolutions of ResNet-50 and -18.

    compile   other processes run each Triton kernel once: what they compiled is on the disk then
    agree     each candidate's answer beside a convolution in IEEE fp32 of the same values; wrong ones are left out
    time      CUDA graphs in interleaved rounds, the L2 cache flushed, medians

convs.json, of the form that fastres/ops/_conv_tiles.py reads, is written after each convolution, the most important
first: what is not reached is not in it. All are timed with a bias and a ReLU, which cuDNN fuses: the table does not
tell activations apart. Beside the backends stands what they are compared with:

    conv             cuDNN's convolution alone
    conv_bias        the same and its bias, as eager's conv2d: cuDNN, then an addition
    conv_bias_tuned  conv_bias with the fastest of cuDNN's plans, which torch.backends.cudnn.benchmark = True would take
    read             one reading of the residual

    python -m gpu_run.convs --out convs.json --seconds 90
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.functional import conv_act
from fastres.lab.results import environment, write_json
from fastres.lab.timing import Timer, interleave
from fastres.ops import _conv_tiles
from gpu_run import files
from gpu_run.clock import cold_timer, graphed, state
from gpu_run.layers import Call, Layer, batch_for, candidates, capability, planned, reference, tiny, yardsticks
from gpu_run.problems import differs
from gpu_run.tune import FAULTS, WORKER_GIB, memory
from peers import DTYPES

COMPILING = 0.3  # of the time
ROUNDS = 11
TF32 = 2.0**-9  # of the largest value: operands have ten bits, which may be rounded or cut
CLOCKS_S = 20.0  # between two looks at them


class Fault(Exception):
    """A kernel read or wrote where it must not: nothing runs in this process any more."""


# ---- measuring -------------------------------------------------------------------------------------------------------


def tried(call: Call, wanted: Tensor) -> tuple[str, str] | None:
    """None where a candidate runs and its answer is right; else ("refused" | "wrong", why). Raises Fault."""
    try:
        y = call()
        if y.device.type == "cuda":
            torch.cuda.synchronize(y.device)
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        if FAULTS.search(str(error)):
            raise Fault(why) from error
        return "refused", why
    why = differs((y,), (wanted,), TF32 if wanted.dtype is torch.float32 else None)
    return None if why is None else ("wrong", why)


@dataclass
class Found:
    """What came of one layer: an entry of the table, and what has no place in it."""

    entry: dict[str, Any] | None
    wrong: list[str]
    refused: list[str]


def measured(layer: Layer, device: torch.device, timer: Timer, rounds: int, tuned: bool) -> Found:
    tensors = layer.tensors(device)
    wanted, found = reference(layer, tensors), Found(None, [], [])
    y = torch.empty_like(wanted)
    calls, graphs = candidates(layer, tensors, y, device), {}
    for name, call in list(calls.items()):
        y.fill_(float("nan"))  # what a kernel leaves out is seen
        try:
            outcome = tried(call, wanted)
        except Fault as fault:
            raise Fault(f"{name} at {layer.title}: {fault}") from fault
        if outcome is None:
            graphs[name] = graphed(call, device)
            continue
        kind, why = outcome
        (found.wrong if kind == "wrong" else found.refused).append(f"{name} at {layer.title}: {why}")
        del calls[name]
    del wanted
    if not calls:
        return found
    beside = yardsticks(layer, tensors, device, tuned)
    graphs |= {name: graphed(call, device) for name, call in beside.items()}
    samples = interleave(graphs, rounds, timer=timer)
    ms = {name: float(f"{1e3 * statistics.median(seconds):.5g}") for name, seconds in samples.items()}
    major, minor = capability(device)
    found.entry = {
        "arch": 10 * major + minor,
        "dtype": str(DTYPES[layer.dtype]).removeprefix("torch."),
        "shape": list(layer.shape),
        "residual": layer.conv.residual,
        "ms": {name: ms[name] for name in calls},
        "beside": {name: ms[name] for name in beside},
        "conv": layer.conv.id,
        "counts": layer.conv.counts,
    }
    return found


def compiled(layer: Layer) -> None:
    """Runs the Triton kernel once; in a process of its own."""
    device = torch.device("cuda:0")
    x, weight, bias, residual = layer.tensors(device)
    where = {"stride": layer.conv.stride, "padding": layer.conv.padding}
    conv_act(x, weight, bias, residual, **where, act="relu", backend="triton")
    torch.cuda.synchronize(device)


def compile_all(layers: Sequence[Layer], device: torch.device, until: float) -> None:
    """What is not compiled by then is compiled when it is measured."""
    workers = max(1, min((os.cpu_count() or 2) - 2, memory(device) // (WORKER_GIB << 30)))
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        with contextlib.suppress(BrokenProcessPool):
            wait_for([pool.submit(compiled, layer) for layer in layers], max(until - time.monotonic(), 0))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run(layers: Sequence[Layer], device: torch.device, end: float, rounds: int, save: Callable[..., None]) -> None:
    """Calls `save(entries, wrong, refused)` after each layer. Raises Fault, with everything before it saved."""
    entries: list[dict[str, Any]] = []
    wrong: list[str] = []
    refused: list[str] = []
    timer, longest = cold_timer(device), 0.0
    save(entries, wrong, refused)
    for layer in layers:
        begun = time.monotonic()
        if begun + longest > end:
            break
        try:
            tuned = layer.dtype == "fp16" and layer.batch == layers[0].batch
            found = measured(layer, device, timer, rounds, tuned)
        except Fault as fault:
            save(entries, [*wrong, str(fault)], refused)
            raise
        except torch.cuda.OutOfMemoryError:
            found = Found(None, [], [f"everything at {layer.title}: out of memory"])
        entries += [found.entry] if found.entry else []
        wrong += found.wrong
        refused += found.refused
        save(entries, wrong, refused)
        longest = max(longest, time.monotonic() - begun) if len(entries) > 1 else 0.0  # the first one warms up


def main(arguments: Sequence[str] | None = None) -> int:
    options = files.program_options("convs", __doc__, arguments)
    begun = time.monotonic()
    end = begun + options.seconds
    device = torch.device("cpu" if options.dry_run else "cuda:0")
    torch.backends.cudnn.allow_tf32 = True
    about = environment(device, " ".join(["gpu_run.convs", *sys.argv[1:]]))
    layers = tiny() if options.dry_run else planned(batch_for(device))
    why_not = None
    if not options.dry_run and not any(kernel.runs_on(capability(device)) for kernel in _conv_tiles.kernels()):
        why_not = "; ".join(_conv_tiles.why_not(layers[0].problem(device)))
    clocks: dict[str, Any] = {"before": state()}
    looked = begun

    def save(entries: list[dict[str, Any]], wrong: list[str], refused: list[str]) -> None:
        nonlocal looked
        if time.monotonic() - looked > CLOCKS_S:
            looked, clocks["after"] = time.monotonic(), state()
        data = {
            "schema": _conv_tiles.SCHEMA,
            "schema_version": _conv_tiles.VERSION,
            "dry_run": options.dry_run,
            "environment": about | {"clocks": clocks},
            "why_not": why_not,
            "planned": len(layers),
            "rounds": ROUNDS,
            "wrong": wrong,
            "refused": refused,
            "entries": entries,
        }
        write_json(options.out, data)

    if why_not is not None:
        save([], [], [])
        return 0
    if not options.dry_run:
        compile_all(layers, device, begun + COMPILING * options.seconds)
    run(layers, device, end, 2 if options.dry_run else ROUNDS, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
