"""freeze's choices, each by measuring on the example: the layout, packed weights, images at a time, a CUDA graph.

Another process can slow any run down, none can speed one up. So candidates take turns, their fastest rounds are
compared, and the known-good default stays unless another one is faster by a margin there and wins most rounds.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastres.inference.checks import run_once, without_writing
from fastres.inference.compare import agrees, close, rounding_share
from fastres.inference.executor import Executor
from fastres.inference.frozen import FrozenModel
from fastres.inference.lower import lower, run
from fastres.inference.parts import answers_each_alone
from fastres.inference.plan import Plan
from fastres.inference.report import FreezeReport
from fastres.ops import _conv_native as native
from fastres.verify.runs import call, named_tensors

logger = logging.getLogger("fastres")

Tune = bool | Literal["auto"]
Times = dict[str, list[float]]  # milliseconds of each round, by candidate

ROUNDS = 7
SECONDS = 2.0
HOPELESS = 3.0
MARGIN = 0.05
PARTS = (8, 4)  # images at a time; weights are read once per part

_NO_VIEWS = "channels_last is out: the model takes a view() that only NCHW tensors have; reshape() would do in both"
_OTHER_ANSWERS = "channels_last is out: the model answers otherwise in it, or from call to call"


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int = ROUNDS, seconds: float = SECONDS
) -> Times:
    """Milliseconds a call, in interleaved rounds: at most `rounds`, about `seconds` in all, and at least 3.

    Args:
        calls: what to time, by name; each is run twice first, and one that then takes more than 3x the fastest's time
            is timed once more.
        device: synchronized around every call when it is a GPU.
    """
    with torch.no_grad():
        for run in calls.values():
            run()
        warm = {name: milliseconds(run, device) for name, run in calls.items()}
        times: Times = {name: [] for name in calls}
        begin = time.perf_counter()
        for turn in range(rounds):
            if turn >= 3 and time.perf_counter() - begin > seconds:
                break
            for name, run in calls.items():
                if turn and min(warm[name], *times[name]) > HOPELESS * min(min(t) for t in times.values()):
                    continue
                times[name].append(milliseconds(run, device))
    return times


def prefer(times: Times, default: str, margin: float = MARGIN) -> str:
    """The default, unless another candidate's fastest round is faster by the margin, and it wins most rounds."""
    best = min(times, key=lambda name: min(times[name]))
    if best == default or min(times[best]) > (1 - margin) * min(times[default]):
        return default
    if len(times[default]) == 1:  # more than 3x slower, and given up
        return best
    pairs = list(zip(times[best], times[default], strict=False))
    return best if 2 * sum(a < b for a, b in pairs) > len(pairs) else default


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """The time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def measured_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s of a copy, read and written; flop/s of a product in ``dtype``): the best that half a second shows.

    Of several sizes, small ones too: what fits in a cache moves faster than memory, and a bound must hold for it. On a
    CPU of a convolution too, which may be another library's: 255 GFLOP/s where the best matrix product had 115.
    """
    on_gpu = device.type == "cuda"
    sizes, lengths = ((2048, 8192), (1 << 24, 1 << 28)) if on_gpu else ((256, 512, 1024), (1 << 16, 1 << 19, 1 << 24))
    calls: dict[Callable[[], Any], tuple[float, str]] = {}
    for n in sizes:
        a = torch.ones(n, n, device=device, dtype=dtype)
        calls[_product(a, torch.empty_like(a))] = 2 * n**3, "flops"
    if not on_gpu:
        images, weight = (torch.ones(size, dtype=dtype) for size in ((4, 64, 28, 28), (64, 64, 3, 3)))
        calls[_convolution(images, weight)] = 2 * images.numel() * weight[0].numel(), "flops"
    for n in lengths:
        x = torch.ones(n, device=device)
        calls[_copy(x, torch.empty_like(x))] = 2 * x.numel() * x.itemsize, "bytes"
    best = {"flops": 0.0, "bytes": 0.0}
    begin = time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() - begin < 0.5:
            for run, (work, what) in calls.items():
                best[what] = max(best[what], work / milliseconds(run, device) * 1e3)
    return best["bytes"], best["flops"]


def _product(a: Tensor, out: Tensor) -> Callable[[], Any]:
    return lambda: torch.mm(a, a, out=out)


def _convolution(x: Tensor, weight: Tensor) -> Callable[[], Any]:
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return lambda: torch.conv2d(x, weight, padding=1)


def _copy(x: Tensor, y: Tensor) -> Callable[[], Any]:
    return lambda: y.copy_(x)


def _bound(candidate: nn.Module, inputs: Any) -> Callable[[], Any]:
    return lambda: call(candidate, inputs)


# ---- choosing --------------------------------------------------------------------------------------------------------


def tune_plan(
    frozen: FrozenModel,
    source: nn.Module,
    inputs: Any,
    device: torch.device,
    how: Tune,
    cuda_graph: bool | Literal["auto"],
) -> FrozenModel:
    """The frozen model with its plan, of which its report tells; the example may have been written to."""
    report = frozen.report
    if frozen.is_quantized:  # whose kernels read channels_last
        report.memory_format, report.memory_format_reason = "channels_last", "int8 has no other"
    else:
        frozen = choose_layout(frozen, source, inputs, device, how)
    if device.type == "cpu":
        if how is not False:
            choose_ways(frozen, inputs, device)
            split(frozen, inputs, device)
        tell_ways(frozen, inputs)
    if how is not False:
        compare_with_eager(frozen, source, inputs, device)
    report.steps = 0 if frozen.graph is None else len(frozen.graph.steps)
    sizes = [len(t) for t in named_tensors(inputs, "").values() if t.is_floating_point() and t.ndim]
    report.batch = sizes[0] if sizes else 1
    record_graph(frozen, inputs, device, how, cuda_graph)
    if how is not False and any(row.flops for row in report.rows) and not frozen.is_quantized:
        find_bound(report, device, frozen.dtype)
    return frozen


def find_bound(report: FreezeReport, device: torch.device, dtype: torch.dtype) -> None:
    """The rates that the report's bound is at; none where the network beats what 2 seconds of measuring show."""
    for _ in range(4):
        bandwidth, rate = measured_rates(device, dtype)
        report.bandwidth, report.rate = max(report.bandwidth, bandwidth), max(report.rate, rate)
        if (report.bound or 0.0) <= report.milliseconds["frozen"]:
            return
    report.bandwidth = report.rate = 0.0
    report.notes.append("no bound: the network is faster than the rates that were measured; something else was running")


def choose_layout(frozen: FrozenModel, source: nn.Module, inputs: Any, device: torch.device, how: Tune) -> FrozenModel:
    """The frozen model in channels_last or, where that does not run or is measured slower, in NCHW."""
    report = frozen.report
    images = any(t.ndim == 4 and t.is_floating_point() for t in named_tensors(inputs, "").values())
    report.memory_format_reason = "not measured" if how is False else "no 4-dimensional input"
    layouts = {"contiguous": frozen}
    default = "contiguous"
    if images:
        want = call(frozen, inputs)
        last = frozen if how is False else copy.deepcopy(frozen)
        last.use_channels_last()
        reason = _why_not_this_layout(last, source, inputs, want)
        if reason:
            last.use_channels_last(False)
            report.notes.append(reason)
            report.memory_format_reason = "the other does not run"
        else:
            layouts["channels_last"], default = last, "channels_last"
    report.memory_format = default
    if how is False or len(layouts) == 1:
        return frozen
    times = measure({name: _bound(candidate, inputs) for name, candidate in layouts.items()}, device)
    report.memory_format = best = prefer(times, default)
    faster = min(layouts, key=lambda name: min(times[name]))
    report.memory_format_reason = (
        "the faster of the two on the example" if best == faster else "the other one is not clearly faster"
    )
    report.milliseconds |= {f"frozen {name}": min(times[name]) for name in layouts if name != best}
    chosen = layouts[best]
    chosen.report = report
    return chosen


def compare_with_eager(frozen: FrozenModel, source: nn.Module, inputs: Any, device: torch.device) -> None:
    """Time both on the example, for the report; it says so where the frozen network is slower."""
    report = frozen.report
    eager = without_writing(lambda given: call(source, given), inputs)
    times = measure({"eager": eager, "frozen": _bound(frozen, inputs)}, device)
    report.milliseconds = {name: min(found) for name, found in times.items()} | report.milliseconds
    if all(mine > (1 + MARGIN) * theirs for mine, theirs in zip(times["frozen"], times["eager"], strict=False)):
        spans = [f"{min(times[name]):.3g} to {max(times[name]):.3g} ms" for name in ("frozen", "eager")]
        text = f"slower than eager on the example: {spans[0]}, eager {spans[1]}"  # in every round: no noise
        report.notes.append(text)
        logger.warning("freeze: %s is %s", report.model, text)


def _why_not_this_layout(frozen: FrozenModel, source: nn.Module, inputs: Any, want: Any) -> str:
    """Say why the network, which answered ``want`` in NCHW, does not run in channels_last; empty where it does.

    A view across channels and pixels exists in one of the layouts only; as_strided() reads other numbers in each.
    """
    try:
        got = call(frozen, inputs)
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        return _NO_VIEWS
    pairs = list(zip(named_tensors(got, "").values(), named_tensors(want, "").values(), strict=True))
    if all(agrees(g, w) for g, w in pairs):
        return ""
    noise = 2 * rounding_share(source, frozen.dtype, inputs, run_once(source, inputs))  # two 16-bit answers are off by
    return "" if noise and all(agrees(g, w, noise) for g, w in pairs) else _OTHER_ANSWERS


def choose_ways(frozen: FrozenModel, inputs: Any, device: torch.device) -> None:
    """For each step of a call on these inputs that can run in several ways, keep the fastest one."""
    found = frozen.prepared(inputs)
    if found is None:
        return
    chosen = dict(frozen.plan.choices)
    for key, times in _time_ways(*found, frozen.plan.winograd).items():
        if len(times) > 1:
            chosen[key] = prefer(times, next(iter(times)))
    frozen.choose(chosen)


def _time_ways(executor: Executor, inputs: list[Tensor], constants: tuple[Tensor, ...], tile: int) -> dict[str, Times]:
    """Milliseconds of the steps with a choice, by its key and the way, the default first: in whole runs of the network.

    A step by itself would have its weight in cache, and nobody else's: ways with larger weights would look better.
    """
    found = executor.find_choices(inputs, constants)
    allowed = {choices.key: choices.within(tile) for choices, _ in found}
    times: dict[str, Times] = {key: {way: [] for way in known} for key, known in allowed.items()}
    runs = []  # as many as the most ways of a step: each has every step's first way, or its second, ...
    for nth in range(max(map(len, allowed.values()), default=0)):
        plan = Plan(winograd=tile, choices={key: known[nth] for key, known in allowed.items() if nth < len(known)})
        with torch.inference_mode(False), torch.no_grad():
            lowered = lower(executor.graph, inputs, constants, plan, executor.exact)
            runs.append((lowered, lowered.places.views(torch.empty(lowered.places.size, dtype=torch.uint8))))
    begin = time.perf_counter()
    for turn in range(ROUNDS):
        if turn >= 3 and time.perf_counter() - begin > SECONDS:
            break
        for nth, (lowered, views) in enumerate(runs):
            spent: dict[str, float] = {}
            values = [*inputs, *constants, *[None] * len(executor.graph.steps), *views]
            with torch.no_grad():
                for step in lowered.calls:
                    started = time.perf_counter()
                    run(step, values)
                    key = lowered.keys.get(step.writes - executor.graph.first_result)
                    if key is not None:
                        spent[key] = spent.get(key, 0.0) + (time.perf_counter() - started) * 1e3
                    for slot in step.frees:
                        values[slot] = None
            for key, milliseconds in spent.items():
                if nth < len(allowed[key]):
                    times[key][allowed[key][nth]].append(milliseconds)
    return times


def tell_ways(frozen: FrozenModel, inputs: Any) -> None:
    """Put into the report how each convolution runs on the example, and what that holds beside the weights."""
    found = frozen.prepared(inputs)
    if found is None:
        return
    call(frozen, inputs)  # lowers its signature
    executor, tensors, _ = found
    parts = frozen.plan.images_at_a_time
    if parts and frozen._goes_in_parts(tensors):
        tensors = [tensors[0][:parts]]
    report, ways = frozen.report, executor.ways(tensors)
    report.packed, report.held = list(ways.values()).count("packed"), executor.bytes_held(tensors)
    tiles = {executor.graph.steps[place].name: native.TILES.get(way, 0) for place, way in ways.items()}
    report.rows = [replace(row, tile=tiles.get(row.name, 0)) for row in report.rows]
    counts = Counter(f"{tile}x{tile}" for tile in tiles.values() if tile)
    report.winograd = dict(counts)


def split(frozen: FrozenModel, inputs: Any, device: torch.device) -> None:
    """Large batches a few images at a time where that is faster, and each image is answered by itself."""
    images = inputs[0] if isinstance(inputs, tuple | list) and len(inputs) == 1 else inputs
    if not isinstance(images, Tensor) or images.ndim != 4:
        return
    sizes = [n for n in PARTS if len(images) >= 2 * n]
    if not sizes or not answers_each_alone(frozen, images):
        return
    want = named_tensors(call(frozen, images), "")
    candidates = {"whole": frozen}
    for n in sizes:
        part = copy.deepcopy(frozen)
        part.plan.images_at_a_time = n
        got = named_tensors(call(part, images), "")
        if all(got[name].shape == t.shape and close(got[name], t) for name, t in want.items()):
            choose_ways(part, images[:n], device)
            candidates[str(n)] = part
    times = measure({n: _bound(candidate, images) for n, candidate in candidates.items()}, device)
    best = prefer(times, "whole")
    if best != "whole":
        frozen.plan.images_at_a_time = frozen.report.images_at_a_time = int(best)
        frozen.choose(candidates[best].plan.choices)
        frozen.report.milliseconds |= {"frozen whole batch": min(times["whole"])}


def record_graph(
    frozen: FrozenModel, inputs: Any, device: torch.device, how: Tune, cuda_graph: bool | Literal["auto"]
) -> None:
    """Record the example's shapes, and keep the recording if that was asked for or is faster."""
    report = frozen.report
    if device.type != "cuda" or cuda_graph is False or (cuda_graph == "auto" and (how is False or not frozen.graph)):
        report.cuda_graph = "off" if device.type == "cuda" else "off (no GPU)"
        return
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    frozen.record_graph(tuple(args) if isinstance(args, tuple | list) else (args,), kwargs)
    report.cuda_graph = "on, for the example's shapes"
    if how is False:
        return
    eager = copy.deepcopy(frozen)  # has no graphs
    times = measure({"frozen": _bound(frozen, inputs), "without": _bound(eager, inputs)}, device)
    if cuda_graph == "auto" and prefer(times, "without", 0.0) == "without":
        frozen.drop_graphs()
        report.cuda_graph = f"off: {min(times['frozen']):.3g} ms with it, {min(times['without']):.3g} ms without"
        return
    report.milliseconds |= {"frozen": min(times["frozen"]), "frozen without graph": min(times["without"])}
