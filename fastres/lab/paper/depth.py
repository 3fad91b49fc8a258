"""Experiment 4, depth (Table 6): residual networks of 20 to 110 layers, and 1202 for one step, with its memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastres.lab import networks
from fastres.lab.devices import channels_last, pick_device
from fastres.lab.loop_state import RunSpec
from fastres.lab.paper import curves
from fastres.lab.paper.experiment import Context, Experiment
from fastres.lab.paper.presets import Preset
from fastres.lab.paper.published import PARAMETERS, find
from fastres.lab.paper.tables import Comparison, Outcome, Panel, Table, percent, spread


def specs(preset: Preset) -> list[RunSpec]:
    """Residual networks of every depth, every seed."""
    return preset.specs(tuple(f"resnet{depth}" for depth in preset.more_depths))


def one_step(network: str, preset: Preset, device_name: str) -> dict[str, Any]:
    """Builds a network, takes one training step of a whole batch on random images, and measures time and memory.

    On a CPU the memory is the growth of the process's highest resident set, so this runs in a process of its own.

    Example:
        >>> from fastres.lab.paper.presets import preset
        >>> sorted(one_step("resnet8", preset("ci"), "cpu"))
        ['batch', 'loss', 'memory_bytes', 'parameters', 'seconds']
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        measured: dict[str, Any] = pool.apply(_step, (network, preset, device_name))
    return measured


def _step(network: str, preset: Preset, device_name: str) -> dict[str, Any]:
    device = pick_device(device_name)
    model = networks.build(network, preset.classes, preset.channels)
    model = channels_last(model.to(device))
    batch = preset.recipe.batch_size
    images = torch.randn(batch, preset.channels, preset.size, preset.size, device=device)
    labels = torch.randint(preset.classes, (batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=preset.recipe.lr, momentum=preset.recipe.momentum)
    before = _peak(device, reset=True)
    start = time.perf_counter()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    value = float(loss.detach())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": batch,
        "loss": value,
        "seconds": time.perf_counter() - start,
        "memory_bytes": _peak(device) - (before if device.type == "cpu" else 0),
    }


def _peak(device: torch.device, reset: bool = False) -> int:
    """The most bytes in use since the last reset: allocated on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():  # elsewhere than on Linux: the highest since the process began
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        with contextlib.suppress(OSError):  # not allowed in some containers: then it counts from the process's begin
            Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def outcome(context: Context) -> Outcome:
    """Table 6 beside what was measured here, and the deepest network's step."""
    preset = context.preset
    found = {depth: context.of(f"resnet{depth}") for depth in preset.more_depths}
    rows = []
    for depth, results in found.items():
        paper = find(f"resnet{depth}", source="Table 6")
        others = find(f"resnet{depth}", data="cifar10")[len(paper) :]
        rows.append(
            (
                f"resnet-{depth}",
                f"{results[0].parameters:,}",
                f"{PARAMETERS[f'resnet{depth}'][0]:,}" if f"resnet{depth}" in PARAMETERS else "-",
                spread(curves.train_errors(results)),
                spread(curves.test_errors(results)),
                percent(paper[0].top1) + (f" ({paper[0].note})" if paper[0].note else "") if paper else "-",
                ", ".join(percent(each.top1) for each in others) or "-",
            )
        )
    head = ("network", "parameters here", "with 3 channels (paper)", "training error %", "test error %")
    table = Table(
        f"Residual networks by depth: {preset.title}",
        (*head, "Table 6, CIFAR-10 test error %", "other reproductions %"),
        tuple(rows),
        (f"Mean ± sample deviation of {len(preset.seeds)} seeds at the end of the runs, not the best of them.",),
    )
    deepest = f"resnet{preset.deepest}"
    context.tell(f"one step of {deepest}")
    step = one_step(deepest, preset, context.place.device)
    memory = Table(
        f"One training step of {deepest}",
        ("network", "parameters", "batch", "image", "seconds", "memory MiB", "loss"),
        (
            (
                deepest,
                f"{step['parameters']:,}",
                str(step["batch"]),
                f"{preset.size}x{preset.size}x{preset.channels}",
                f"{step['seconds']:.1f}",
                f"{step['memory_bytes'] / 2**20:,.0f}",
                f"{step['loss']:.3f}",
            ),
        ),
        (
            "Memory: the highest allocated on a GPU; on a CPU the growth of the process during the step, its weights "
            "already there. Its first step, so seconds include the first call of every operator.",
        ),
    )
    depths = list(found)
    values = [curves.test_errors(found[depth]) for depth in depths]
    ends = Comparison(f"resnet-{depths[0]}", values[0], f"resnet-{depths[-1]}", values[-1])
    lines = [
        f"test error falls with depth - {ends.holds(False)}: {ends}",
        f"{deepest} builds and takes a step: loss {step['loss']:.3f}, {step['memory_bytes'] / 2**20:,.0f} MiB",
    ]
    panels = (
        Panel(
            "at the end",
            "layers",
            "error %",
            (
                curves.by_depth(list(zip(depths, values, strict=True)), "test", 0),
                curves.by_depth([(d, curves.train_errors(found[d])) for d in depths], "train", 0, "dashed"),
            ),
            percent=True,
            points=True,
        ),
        Panel(
            "test error",
            "iteration",
            "error %",
            tuple(curves.over_seeds(found[d], "test_error", f"resnet-{d}", i) for i, d in enumerate(depths)),
            percent=True,
        ),
    )
    return Outcome(
        (table, memory), tuple(lines), panels, {"step": step, "test_error": dict(zip(depths, values, strict=True))}
    )


EXPERIMENT = Experiment(4, "depth", "Depth", "Table 6", specs, outcome)
