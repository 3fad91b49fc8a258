"""Time the backends of conv_act, and each kernel of fastres._C_cuda, at the convolutions of ResNet-50 and -18.

    compile   other processes run each Triton kernel once, which leaves the compiled code on the disk
    agree     each candidate's answer is compared with a convolution in IEEE fp32; wrong ones are left out
    time      CUDA graphs in interleaved rounds, the L2 cache flushed, medians

convs.json has the form that fastres/ops/_conv_tiles.py reads. It is written after each convolution, the most important
first; those not reached are not in it. Everything is timed with a bias and a ReLU, which cuDNN fuses; the table does
not distinguish activations. The backends are compared with:

    conv             cuDNN's convolution alone
    conv_bias        the same plus its bias, as in eager's conv2d: cuDNN, then an addition
    conv_bias_tuned  conv_bias with the fastest of cuDNN's plans, as torch.backends.cudnn.benchmark = True picks it
    read             one pass over the residual

    python -m gpu_run.convs --out convs.json --seconds 90
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastres.functional import conv_act
from fastres.lab.timing import Timer, interleave
from fastres.ops import _conv_tiles
from gpu_run.layers import Call, Layer, batch_for, candidates, capability, planned, reference, tiny, yardsticks
from gpu_run.problems import differs
from gpu_run.program import Program, cold_timer, workers
from gpu_run.tune import FAULTS
from measure import cuda_graph, one_line
from peers import DTYPES

COMPILING = 0.3  # of the time
ROUNDS = 11
TF32 = 2.0**-9  # of the largest value: operands have ten bits, rounded or truncated


class Fault(Exception):
    """A kernel accessed memory that it must not; nothing else can run in this process."""


# ---- measuring -------------------------------------------------------------------------------------------------------


def tried(call: Call, wanted: Tensor) -> tuple[str, str] | None:
    """Run a candidate and compare its answer. None if it is right, else ("refused" | "wrong", why). Raises Fault."""
    try:
        y = call()
        if y.device.type == "cuda":
            torch.cuda.synchronize(y.device)
    except Exception as error:
        why = one_line(error)[:180]
        if FAULTS.search(str(error)):
            raise Fault(why) from error
        return "refused", why
    why = differs((y,), (wanted,), TF32 if wanted.dtype is torch.float32 else None)
    return None if why is None else ("wrong", why)


@dataclass
class Found:
    """The outcomes so far: entries of the table, and the candidates left out."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def entry(self) -> dict[str, Any] | None:
        return self.entries[-1] if self.entries else None


def measured(layer: Layer, device: torch.device, timer: Timer, rounds: int, tuned: bool) -> Found:
    """Check and time everything that can run one layer."""
    tensors = layer.tensors(device)
    wanted, found = reference(layer, tensors), Found()
    y = torch.empty_like(wanted)
    calls, graphs = candidates(layer, tensors, y, device), {}
    for name, call in list(calls.items()):
        y.fill_(float("nan"))  # shows what a kernel does not write
        try:
            outcome = tried(call, wanted)
        except Fault as fault:
            raise Fault(f"{name} at {layer.title}: {fault}") from fault
        if outcome is None:
            graphs[name] = cuda_graph(call, device)
            continue
        getattr(found, outcome[0]).append(f"{name} at {layer.title}: {outcome[1]}")
        del calls[name]
    del wanted
    if not calls:
        return found
    beside = yardsticks(layer, tensors, device, tuned)
    graphs |= {name: cuda_graph(call, device) for name, call in beside.items()}
    samples = interleave(graphs, rounds, timer=timer)
    ms = {name: float(f"{1e3 * statistics.median(seconds):.5g}") for name, seconds in samples.items()}
    major, minor = capability(device)
    found.entries.append(
        {
            "arch": 10 * major + minor,
            "dtype": str(DTYPES[layer.dtype]).removeprefix("torch."),
            "shape": list(layer.shape),
            "residual": layer.conv.residual,
            "ms": {name: ms[name] for name in calls},
            "beside": {name: ms[name] for name in beside},
            "conv": layer.conv.id,
            "counts": layer.conv.counts,
        }
    )
    return found


def compiled(layer: Layer) -> None:
    """Run the Triton kernel once; called in a process of its own."""
    device = torch.device("cuda:0")
    x, weight, bias, residual = layer.tensors(device)
    where = {"stride": layer.conv.stride, "padding": layer.conv.padding}
    conv_act(x, weight, bias, residual, **where, act="relu", backend="triton")
    torch.cuda.synchronize(device)


def compile_all(layers: Sequence[Layer], device: torch.device, until: float) -> None:
    """Compile the layers' Triton kernels until the time is over; the rest compile when they are measured."""
    pool = workers(device)
    try:
        with contextlib.suppress(BrokenProcessPool):
            wait_for([pool.submit(compiled, layer) for layer in layers], max(until - time.monotonic(), 0))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run(layers: Sequence[Layer], device: torch.device, end: float, rounds: int, save: Callable[..., None]) -> None:
    """Call `save(entries, wrong, refused)` after each layer. Raises Fault once everything before it is saved."""
    total, timer, longest = Found(), cold_timer(device), 0.0
    save(total.entries, total.wrong, total.refused)
    for layer in layers:
        begun = time.monotonic()
        if begun + longest > end:
            break
        try:
            tuned = layer.dtype == "fp16" and layer.batch == layers[0].batch
            found = measured(layer, device, timer, rounds, tuned)
        except Fault as fault:
            save(total.entries, [*total.wrong, str(fault)], total.refused)
            raise
        except torch.cuda.OutOfMemoryError:
            found = Found(refused=[f"everything at {layer.title}: out of memory"])
        total.entries += found.entries
        total.wrong += found.wrong
        total.refused += found.refused
        save(total.entries, total.wrong, total.refused)
        longest = max(longest, time.monotonic() - begun) if len(total.entries) > 1 else 0.0  # the first one warms up


def main(arguments: Sequence[str] | None = None) -> int:
    program = Program("convs", __doc__, arguments)
    device, dry = program.device, program.dry_run
    torch.backends.cudnn.allow_tf32 = True
    layers = tiny() if dry else planned(batch_for(device))
    why_not = None
    if not dry and not any(kernel.runs_on(capability(device)) for kernel in _conv_tiles.kernels()):
        why_not = "; ".join(_conv_tiles.why_not(layers[0].problem(device)))

    def save(entries: list[dict[str, Any]], wrong: list[str], refused: list[str]) -> None:
        data = {"why_not": why_not, "planned": len(layers), "rounds": ROUNDS}
        data |= {"wrong": wrong, "refused": refused, "entries": entries}
        program.save(_conv_tiles.SCHEMA, _conv_tiles.VERSION, **data)

    if why_not is not None:
        save([], [], [])
        return 0
    if not dry:
        compile_all(layers, device, program.started + COMPILING * program.seconds)
    run(layers, device, program.end, 2 if dry else ROUNDS, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
