"""Experiment 4, depth (Table 6): residual networks of 20 to 110 layers, and one step of 1202, with its memory."""

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
from fastres.lab.paper.curves import columns, curve, error_panel, over_seeds, test_errors, train_errors
from fastres.lab.paper.experiment import Context, Experiment
from fastres.lab.paper.presets import Preset
from fastres.lab.paper.published import PARAMETERS, find
from fastres.lab.paper.tables import Comparison, Outcome, Table, percent


def specs(preset: Preset) -> list[RunSpec]:
    """Residual networks of every depth, every seed."""
    return preset.specs(tuple(f"resnet{depth}" for depth in preset.more_depths))


def one_step(network: str, preset: Preset, device_name: str) -> dict[str, Any]:
    """Build a network, take one training step of a whole batch on random images, and measure time and memory.

    On a CPU the memory is the growth of the process's peak resident set, so this runs in a process of its own.

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
    """The peak bytes in use since the last reset: allocated on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():  # not on Linux: the peak since the process started
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        with contextlib.suppress(OSError):  # not allowed in some containers: then since the process started
            Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def outcome(context: Context) -> Outcome:
    """Table 6 next to the errors measured here, and the deepest network's step."""
    preset = context.preset
    found = {depth: context.of(f"resnet{depth}") for depth in preset.more_depths}
    errors = {depth: test_errors(results) for depth, results in found.items()}
    table = Table.of(
        f"Residual networks by depth: {preset.title}",
        {
            "network": lambda depth: f"resnet-{depth}",
            "parameters here": lambda depth: f"{found[depth][0].parameters:,}",
            "with 3 channels (paper)": _paper_parameters,
            **columns(found, "training error %", "test error %"),
            "Table 6, CIFAR-10 test error %": lambda depth: _published(depth, True),
            "other reproductions %": lambda depth: _published(depth, False),
        },
        found,
        preset.seeds_note(" at the end of the runs, not the best of them."),
    )
    deepest = f"resnet{preset.deepest}"
    context.tell(f"one step of {deepest}")
    step = one_step(deepest, preset, context.place.device)
    mib = f"{step['memory_bytes'] / 2**20:,.0f}"
    cells = {
        "network": deepest,
        "parameters": f"{step['parameters']:,}",
        "batch": str(step["batch"]),
        "image": f"{preset.size}x{preset.size}x{preset.channels}",
        "seconds": f"{step['seconds']:.1f}",
        "memory MiB": mib,
        "loss": f"{step['loss']:.3f}",
    }
    note = (
        "Memory: the most allocated on a GPU; on a CPU the growth of the process during the step, its weights already"
        " there. This is the first step, so seconds include the first call of every operator."
    )
    memory = Table(f"One training step of {deepest}", tuple(cells), (tuple(cells.values()),), (note,))
    first, last = preset.more_depths[0], preset.more_depths[-1]
    ends = Comparison(f"resnet-{first}", errors[first], f"resnet-{last}", errors[last])
    lines = (
        ends.finding("test error falls with depth", higher=False),
        f"{deepest} builds and takes a step: loss {step['loss']:.3f}, {mib} MiB",
    )
    train = ((depth, train_errors(results)) for depth, results in found.items())
    panels = (
        error_panel(
            "at the end", (curve(errors.items(), "test", 0), curve(train, "train", 0, "dashed")), by_depth=True
        ),
        error_panel(
            "test error",
            (over_seeds(each, "test_error", f"resnet-{d}", i) for i, (d, each) in enumerate(found.items())),
        ),
    )
    return Outcome((table, memory), lines, panels, {"step": step, "test_error": errors})


def _paper_parameters(depth: int) -> str:
    known = PARAMETERS.get(f"resnet{depth}")
    return f"{known[0]:,}" if known else "-"


def _published(depth: int, paper: bool) -> str:
    found = [each for each in find(f"resnet{depth}", data="cifar10") if (each.source == "Table 6") == paper]
    return ", ".join(percent(each.top1) + (f" ({each.note})" if each.note else "") for each in found) or "-"


EXPERIMENT = Experiment(4, "depth", "Depth", "Table 6", specs, outcome)
