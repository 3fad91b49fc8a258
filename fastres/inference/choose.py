"""freeze's choices, each by measuring on the example: the layout, packs, images at a time, a CUDA graph."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fastres.inference.checks import without_writing
from fastres.inference.conv import frozen_convs
from fastres.inference.frozen import FrozenModel
from fastres.inference.plan import measure, measured_rates
from fastres.inference.report import FreezeReport
from fastres.verify.runs import call, map_tensors, named_tensors

logger = logging.getLogger("fastres")

_NO_VIEWS = "channels_last is out: the model takes a view() that only NCHW tensors have; reshape() would do in both"
_OTHER_ANSWERS = "channels_last is out: the model answers otherwise in it, or from call to call"

PARTS = (8, 4)  # images at a time; weights are read once per part


def choose_layout(
    frozen: FrozenModel, source: nn.Module, inputs: Any, device: torch.device, tune: bool | Literal["auto"]
) -> FrozenModel:
    """The frozen model in the faster memory layout; times are in its report."""
    report = frozen.report
    images = any(t.ndim == 4 and t.is_floating_point() for t in named_tensors(inputs, "").values())
    if tune is False:
        report.memory_format_reason = "not measured"
        if images:
            want = call(frozen, inputs)
            frozen.use_channels_last()
            reason = _why_not_this_layout(frozen, inputs, want)
            if reason:
                frozen.use_channels_last(False)
                report.notes.append(reason)
                return frozen
            report.memory_format = "channels_last"
        return frozen
    layouts = {"contiguous": frozen}
    if images:
        layouts["channels_last"] = copy.deepcopy(frozen)
        layouts["channels_last"].use_channels_last()
        reason = _why_not_this_layout(layouts["channels_last"], inputs, call(frozen, inputs))
        if reason:
            del layouts["channels_last"]
            report.notes.append(reason)
    calls: dict[str, Callable[[], Any]] = {"eager": without_writing(lambda given: call(source, given), inputs)}
    calls |= {name: _bound(candidate, inputs) for name, candidate in layouts.items()}
    times = measure(calls, device)
    best = min(layouts, key=lambda name: times[name])
    chosen = layouts[best]
    chosen.report = report
    report.memory_format, report.memory_format_reason = best, "the faster of the two on the example"
    if images and len(layouts) == 1:
        report.memory_format_reason = "the other does not run"
    if not images:
        report.memory_format_reason = "no 4-dimensional input"
    report.milliseconds = {"eager": times["eager"], "frozen": times[best]}
    report.milliseconds |= {f"frozen {name}": times[name] for name in layouts if name != best}
    return chosen


def _why_not_this_layout(frozen: FrozenModel, inputs: Any, want: Any) -> str:
    """Why the network, which answered ``want`` in NCHW, does not run in channels_last; empty where it does.

    A view across channels and pixels exists in one of the layouts only; as_strided() reads other numbers in each.
    """
    try:
        got = call(frozen, inputs)
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        return _NO_VIEWS
    pairs = zip(named_tensors(got, "").values(), named_tensors(want, "").values(), strict=True)
    return "" if all(agrees(g, w) for g, w in pairs) else _OTHER_ANSWERS


def overwrite_residuals(frozen: FrozenModel, inputs: Any, device: torch.device) -> None:
    """Blocks write over the output of the block before, if the outputs on the example are the same with it.

    For calls with tensors alone: a flag could ask for the outputs of blocks, and the example would not show it.
    """
    given = [inputs] if isinstance(inputs, Tensor) else inputs
    graph = frozen.report.capture == "graph"  # its programs see who reads what
    if graph or device.type != "cpu" or isinstance(given, Mapping) or not all(isinstance(t, Tensor) for t in given):
        return
    frozen.overwrite_residuals(False)
    want = map_tensors(call(frozen, inputs), lambda _, t: t.clone(), "")
    frozen.overwrite_residuals(True)
    got = named_tensors(call(frozen, inputs), "")
    # other orders of summation differ by rounding, memory written over by everything
    if not all(close(got[name], t) for name, t in named_tensors(want, "").items()):
        frozen.overwrite_residuals(False)
        frozen.report.notes.append("outputs of blocks are used elsewhere, or not finite: none is written over")


def pack(frozen: FrozenModel, inputs: Any, device: torch.device, tune: bool | Literal["auto"]) -> None:
    """On a CPU, weights reordered for the example's shapes where that is measured faster; untuned, always."""
    if device.type != "cpu" or tune is False or not frozen_convs(frozen.module):
        return
    frozen.report.packed = frozen.choose_packs(inputs)


def split(frozen: FrozenModel, inputs: Any, device: torch.device, tune: bool | Literal["auto"]) -> None:
    """On a CPU, large batches a few images at a time where that is faster, and the outputs on the example are equal."""
    images = inputs[0] if isinstance(inputs, tuple | list) and len(inputs) == 1 else inputs
    if device.type != "cpu" or tune is False or not isinstance(images, Tensor) or images.ndim != 4:
        return
    sizes = [n for n in PARTS if len(images) >= 2 * n]
    if not sizes:
        return
    whole = call(frozen, images)
    leaves, tree = tree_flatten(whole)
    if not all(isinstance(t, Tensor) and t.ndim and len(t) == len(images) for t in leaves):
        return
    candidates = {0: frozen}
    for n in sizes:
        part = copy.deepcopy(frozen)
        part.images_at_a_time = n
        got, its_tree = tree_flatten(call(part, images))
        same = str(its_tree) == str(tree) and all(g.shape == t.shape for g, t in zip(got, leaves, strict=True))
        # a network that mixes the images of a batch is off by everything, other packs by rounding
        if same and all(close(g, t) for g, t in zip(got, leaves, strict=True)):
            part.choose_packs(images)
            candidates[n] = part
    times = measure({str(n): _bound(candidate, images) for n, candidate in candidates.items()}, device)
    best = min(candidates, key=lambda n: times[str(n)])
    if best and times[str(best)] < 0.97 * times["0"]:
        frozen.images_at_a_time = best
        frozen.choose_packs(images)
        frozen.report.milliseconds |= {"frozen": times[str(best)], "frozen whole batch": times["0"]}
        frozen.report.images_at_a_time = best


def write_program(frozen: FrozenModel, inputs: Any, device: torch.device) -> None:
    """On a CPU, the example's operator calls written down, so that the first call of the user runs them alone."""
    if device.type == "cpu":
        for _ in range(2):
            call(frozen, inputs)
        frozen.report.program = frozen.program


def find_bound(
    report: FreezeReport, inputs: Any, device: torch.device, dtype: torch.dtype, tune: bool | Literal["auto"]
) -> None:
    """The example's batch, and where times are measured, the rates that the bound is at."""
    sizes = [len(t) for t in named_tensors(inputs, "").values() if t.is_floating_point() and t.ndim]
    report.batch = sizes[0] if sizes else 1
    if tune is not False and any(row.flops for row in report.rows):
        report.bandwidth, report.rate = measured_rates(device, dtype)


def _bound(candidate: nn.Module, inputs: Any) -> Callable[[], Any]:
    return lambda: call(candidate, inputs)


def record_graph(
    frozen: FrozenModel, inputs: Any, device: torch.device, tune: bool | str, cuda_graph: bool | str
) -> None:
    """Record the example's shapes, and keep the recording if that was asked for or is faster."""
    report = frozen.report
    if device.type != "cuda" or cuda_graph is False or (cuda_graph == "auto" and tune is False):
        report.cuda_graph = "off" if device.type == "cuda" else "off (no GPU)"
        return
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    frozen.record_graph(tuple(args) if isinstance(args, tuple | list) else (args,), kwargs)
    report.cuda_graph = "on, for the example's shapes"
    if tune is False:
        return
    eager = copy.deepcopy(frozen)  # has no graphs
    times = measure({"frozen": _bound(frozen, inputs), "without": _bound(eager, inputs)}, device)
    if cuda_graph == "auto" and times["frozen"] >= times["without"]:
        frozen.drop_graphs()
        report.cuda_graph = f"off: {times['frozen']:.3g} ms with it, {times['without']:.3g} ms without"
        return
    report.milliseconds |= {"frozen": times["frozen"], "frozen without graph": times["without"]}


def say_if_slower(report: FreezeReport) -> None:
    if report.speedup is not None and report.speedup < 1:
        eager, frozen = report.milliseconds["eager"], report.milliseconds["frozen"]
        text = f"slower than eager on the example: {frozen:.3g} ms, eager {eager:.3g} ms"
        report.notes.append(text)
        logger.warning("freeze: %s is %s", report.model, text)


def close(got: Tensor, want: Tensor, share: float = 0.05) -> bool:
    """Whether two outputs differ by a ``share`` of the largest at most, or at all where they are no floating ones."""
    if got.is_complex():
        got, want = torch.view_as_real(got), torch.view_as_real(want)
    if not got.is_floating_point():
        return bool(torch.equal(got, want))
    want = want.detach()
    scale = float(want.abs().max()) if want.numel() else 0.0
    return math.isfinite(scale) and torch.allclose(got, want, rtol=0, atol=share * scale)


def agrees(got: Any, want: Any, share: float = 0.05) -> bool:
    """Whether two outputs are close, as far as the wanted one is finite; or are no tensors."""
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        return isinstance(want, Tensor) == isinstance(got, Tensor)
    if got.shape != want.shape:
        return False
    return not bool(torch.isfinite(want).all()) or close(got.to(want.dtype), want, share)
