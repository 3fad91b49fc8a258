"""Experiments 1 and 4: plain and residual networks by depth (Figs. 1 and 6), and residual ones to 1202 (Table 6).

plain      training error rises with depth: not overfitting, since the deeper network contains the shallower one
residual   y = F(x) + x (Eqn. 1): training and test error fall with depth
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

from fastres.lab import batches, datasets, loop, networks
from fastres.lab.devices import channels_last, pick_device
from fastres.lab.loop_state import RunResult, RunSpec
from fastres.lab.paper import tables
from fastres.lab.paper.presets import PARAMETERS, Preset, find
from fastres.lab.paper.runs import Context, Experiment
from fastres.lab.paper.tables import Comparison, Outcome, Panel, Table

KINDS = {"plain": "plain", "resnet": "residual"}
_ERRORS = {"test": "solid", "train": "dashed"}

# ---- 1: degradation --------------------------------------------------------------------------------------------------


def compared(preset: Preset) -> tuple[str, ...]:
    """The names of the networks compared.

    >>> from fastres.lab.paper.presets import preset
    >>> compared(preset("ci"))
    ('plain8', 'resnet8', 'plain20', 'resnet20')
    """
    return tuple(f"{kind}{depth}" for depth in preset.depths for kind in KINDS)


def specs(preset: Preset) -> list[RunSpec]:
    return preset.specs(compared(preset))


def outcome(context: Context) -> Outcome:
    """Errors by depth next to Table 6, curves as in Fig. 6, and a verdict on each claim."""
    preset = context.preset
    found = {network: context.of(network) for network in compared(preset)}
    context.tell("gradients before the first step")
    starts = {network: [first_gradient(r.spec, context) for r in results] for network, results in found.items()}
    table = Table.of(
        f"Plain and residual networks by depth: {preset.title}",
        {
            "network": _dashed,
            **tables.columns(found, "parameters", "training error %", "training loss", "test error %"),
            "gradient, first step": lambda network: f"{statistics.median(starts[network]):.3g}",
            **tables.columns(found, "gradient"),
            "paper, CIFAR-10 test error %": _table_6,
        },
        found,
        preset.seeds_note(
            f", at the end of {preset.recipe.iterations:,} iterations. Training error and loss: the last tenth of the"
            " iterations, on augmented batches. Gradient: the norm over all parameters; the median of the seeds before"
            " the first step (added after the results were seen, to explain them), and the median over the last nine"
            " tenths of the iterations."
        ),
        "The paper's plain networks of 20 to 56 layers are curves in Fig. 6, without numbers.",
    )
    data = {
        network: {
            "seeds": [r.spec.seed for r in results],
            "parameters": results[0].parameters,
            "best_test_error": [r.best_test_error for r in results],
            **{value: tables.per_seed(results, value) for value in ("test_error", "train_error", "train_loss")},
            "first_gradient_norm": starts[network],
            "gradient_norm": tables.per_seed(results, "gradient_norm"),
            "seconds": [r.seconds for r in results],
        }
        for network, results in found.items()
    }
    return Outcome((table,), tuple(_findings(preset, found)), tuple(_panels(preset, found)), data)


def _table_6(network: str) -> str:
    errors = find(network, source="Table 6")
    return tables.percent(errors[0].top1) if errors else "> 60, not displayed" if network == "plain110" else "-"


def _panels(preset: Preset, found: dict[str, list[RunResult]]) -> Iterator[Panel]:
    depths = tuple(enumerate(preset.depths))

    def curves(kind: str, value: str, name: str, style: str) -> Iterator[tables.Curve]:
        return (tables.over_seeds(found[f"{kind}{d}"], value, f"{kind}-{d}{name}", color, style) for color, d in depths)

    for kind, title in KINDS.items():
        styles = _ERRORS.items()
        yield tables.error_panel(title, (c for what, s in styles for c in curves(kind, f"{what}_error", f" {what}", s)))
    ends = (
        tables.curve(
            ((d, tables.per_seed(found[f"{kind}{d}"], f"{what}_error")) for d in preset.depths),
            f"{name} {what}",
            i,
            style,
        )
        for i, (kind, name) in enumerate(KINDS.items())
        for what, style in _ERRORS.items()
    )
    yield tables.error_panel("at the end, by depth", ends, by_depth=True)
    norms = [*curves("plain", "gradient_norm", "", "dashed"), *curves("resnet", "gradient_norm", "", "solid")]
    yield Panel("gradient norm", "iteration", "norm of all gradients", tuple(norms), log=True)


def first_gradient(spec: RunSpec, context: Context) -> float:
    """The norm of all gradients of a run's first batch, before any step: the log starts some steps later."""
    data = datasets.load(spec.data, context.place.data_root)
    device = pick_device(context.place.device)
    model = loop.network(spec, data).to(device)
    images, labels = next(data.batches(spec.recipe, spec.seed, 0, batches.Part(), device))
    F.cross_entropy(model(images), labels).backward()
    return float(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def _findings(preset: Preset, found: dict[str, list[RunResult]]) -> Iterator[str]:
    """Each claim of section 4.2 against the measurements."""

    def compare(a: str, b: str, what: str, claim: str, higher: bool) -> str:
        first, second = (tables.per_seed(found[network], what) for network in (a, b))
        return Comparison(_dashed(a), first, _dashed(b), second).finding(claim, higher)

    first, last = preset.depths[0], preset.depths[-1]
    measures = {"training": "train_error", "test": "test_error"}
    for what, value in measures.items():
        for kind, name in KINDS.items():
            claim = f"{name}: {what} error {'rises' if kind == 'plain' else 'falls'} with depth"
            yield compare(f"{kind}{first}", f"{kind}{last}", value, claim, kind == "plain")
    for depth in preset.depths:
        for what, value in measures.items():
            claim = f"{depth} layers: residual has the lower {what} error"
            yield compare(f"plain{depth}", f"resnet{depth}", value, claim, False)


def _dashed(network: str) -> str:
    kind = network.rstrip("0123456789")
    return f"{kind}-{network.removeprefix(kind)}"


# ---- 4: depth --------------------------------------------------------------------------------------------------------


def depth_specs(preset: Preset) -> list[RunSpec]:
    return preset.specs(tuple(f"resnet{depth}" for depth in preset.more_depths))


def one_step(network: str, preset: Preset, device_name: str) -> dict[str, Any]:
    """Build a network, take one training step of a whole batch on random images, and measure time and memory.

    On a CPU the memory is the growth of the process's peak resident set, so this runs in a process of its own.

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


def depth_outcome(context: Context) -> Outcome:
    """Table 6 next to the errors measured here, and the deepest network's step."""
    preset = context.preset
    found = {depth: context.of(f"resnet{depth}") for depth in preset.more_depths}
    errors = {depth: tables.per_seed(results, "test_error") for depth, results in found.items()}
    table = Table.of(
        f"Residual networks by depth: {preset.title}",
        {
            "network": lambda depth: f"resnet-{depth}",
            "parameters here": lambda depth: f"{found[depth][0].parameters:,}",
            "with 3 channels (paper)": _paper_parameters,
            **tables.columns(found, "training error %", "test error %"),
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
    train = ((depth, tables.per_seed(results, "train_error")) for depth, results in found.items())
    at_the_end = tables.curve(errors.items(), "test", 0), tables.curve(train, "train", 0, "dashed")
    by_iteration = (
        tables.over_seeds(each, "test_error", f"resnet-{d}", i) for i, (d, each) in enumerate(found.items())
    )
    panels = tables.error_panel("at the end", at_the_end, by_depth=True), tables.error_panel("test error", by_iteration)
    return Outcome((table, memory), lines, panels, {"step": step, "test_error": errors})


def _paper_parameters(depth: int) -> str:
    known = PARAMETERS.get(f"resnet{depth}")
    return f"{known[0]:,}" if known else "-"


def _published(depth: int, paper: bool) -> str:
    found = [each for each in find(f"resnet{depth}", data="cifar10") if (each.source == "Table 6") == paper]
    return ", ".join(tables.percent(each.top1) + (f" ({each.note})" if each.note else "") for each in found) or "-"


EXPERIMENTS = (
    Experiment(1, "degradation", "Degradation: plain against residual by depth", "Figs. 1, 6; Table 6", specs, outcome),
    Experiment(4, "depth", "Depth", "Table 6", depth_specs, depth_outcome),
)
