"""freeze: capture, fold, plan, verify; each step in a module of its own."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fastres.inference.capture import WRITES_TO_INPUT, CaptureError, capture, sharing_copy
from fastres.inference.conv import frozen_convs
from fastres.inference.frozen import FrozenModel
from fastres.inference.likeness import take_likeness
from fastres.inference.plan import measure, measured_rates
from fastres.inference.recipe import GraphRecipe, ModuleRecipe, Recipe, source_tensors
from fastres.inference.report import FreezeReport
from fastres.inference.signature import Signature
from fastres.inference.watch import capture as watch
from fastres.nn.fold import short
from fastres.verify import Verification, calibrate, uncalibrated, verify
from fastres.verify.runs import call, map_tensors, named_tensors, private

logger = logging.getLogger("fastres")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_verify, _capture = verify, capture  # arguments of freeze have the functions' names


@torch.inference_mode(False)  # the snapshot's tensors are refreshed later, in whatever mode
def freeze(
    model: nn.Module,
    example_inputs: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    capture: Literal["auto", "graph", "modules"] = "auto",
    tune: bool | Literal["auto"] = "auto",
    cuda_graph: bool | Literal["auto"] = "auto",
    verify: bool | Literal["warn"] = True,
) -> FrozenModel:
    """A copy of ``model`` for inference: BN folded into convolutions in float64, layout chosen, answers verified.

    The model runs as in eval mode, whatever mode it is in, and is never changed. Its forward is captured as a graph of
    ATen operators (`torch.export`, any batch size); each convolution takes in what alone reads it, in whatever form it
    is written: batch norms and other arithmetic with one number a channel, a residual sum, an activation. A network
    that has no graph (control flow that depends on data, hooks) keeps its modules, and BN are folded into the
    convolutions among them. What could not be folded stays, with the reason in ``.report``.

    Args:
        model: the source; on any device, in any mode.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments for one call. The result takes
            any batch size; times and the layout are measured on this one.
        dtype: float32, float16, bfloat16 or float64; None keeps the model's. Inputs are cast to it, outputs come in it.
        device: where the copy goes; None keeps the model's.
        capture: "auto" rewrites the graph or, where there is none, the modules; "graph" and "modules" insist.
        tune: "auto" or True measures eager and both memory layouts on the example, for a few seconds, and keeps the
            faster; False measures nothing and takes channels_last. A frozen model slower than eager says so in the
            report.
        cuda_graph: record the example's shapes as a CUDA graph: "auto" on a GPU when that is measured faster, True
            always, False never; other shapes run eagerly.
        verify: run the referee (:func:`fastres.verify`) against the model in eval mode on the example and put its
            verdict in the report. A failure raises, with "warn" it is logged and reported. BN layers with their initial
            statistics are given the example's, on copies, for that comparison only.

    Returns:
        A :class:`FrozenModel`.

    Raises:
        TypeError: an argument of the wrong kind, a model that cannot be copied or is frozen already.
        ValueError: no tensor in ``example_inputs``, a model on the meta device, ``cuda_graph=True`` without a GPU,
            ``capture="graph"`` for a network that has none.
        RuntimeError: the referee rejects the result; the message holds its table.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 3.2 (folding); He et al. 2016, section 3.4 (BN right after each convolution).

    Example:
        >>> import torch, fastres
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> fast = fastres.freeze(net, torch.randn(2, 3, 16, 16))
        >>> fast.report.folded, tuple(fast(torch.randn(5, 3, 16, 16)).shape)
        (1, (5, 8, 14, 14))
    """
    _check(model, example_inputs, dtype, tune, cuda_graph, verify)
    if capture not in ("auto", "graph", "modules"):
        raise ValueError(f"capture: got {capture!r}, expected 'auto', 'graph' or 'modules'")
    source = sharing_copy(model).eval()
    own = _dtype_of(source)
    target = torch.device(device) if device is not None else _device_of(source, example_inputs)
    dtype = dtype or own
    if cuda_graph is True and target.type != "cuda":
        raise ValueError(f"cuda_graph: got True for a model on {target}, expected a CUDA device")
    if any(t.device != target for t in source_tensors(source).values()):
        source = private("model", source).to(target)
    inputs = map_tensors(example_inputs, lambda _, t: t.detach().to(target), "example_inputs")
    report = FreezeReport(type(model).__name__, short(dtype), str(target), [])
    recipe = _recipe(source, inputs, report, capture)
    module, report.rows = recipe.make(source, dtype)
    frozen = FrozenModel(module, model, recipe, report, dtype)
    reason = "" if report.capture == "modules" else _why_not_any_batch(source, frozen, inputs)
    if reason:
        recipe = _by_modules(source, inputs, report, capture, CaptureError(reason))
        module, report.rows = recipe.make(source, dtype)
        frozen = FrozenModel(module, model, recipe, report, dtype)
    if model.training:
        report.notes.append("the model is in training mode; frozen as in eval mode")
    if not report.folded:
        report.notes.append("no BN was folded")
        logger.warning("freeze: no BN of %s was folded: see the report", report.model)
    if dtype is torch.bfloat16 and target.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        report.notes.append("this CPU has no native bfloat16: oneDNN emulates it, slower than float32")
    frozen = _plan(frozen, source, inputs, target, tune)
    _overwrite_residuals(frozen, inputs, target)
    _pack(frozen, inputs, target, tune)
    _split(frozen, inputs, target, tune)
    _program(frozen, inputs, target)
    _roofline(report, inputs, target, dtype, tune)
    _graph(frozen, inputs, target, tune, cuda_graph)
    _say_if_slower(report)
    if verify:
        report.verification = _judge(source, frozen, inputs, report)
        if not report.verification:
            text = f"freeze: the referee rejects the frozen {report.model}:\n{report.verification}"
            if verify != "warn":
                raise RuntimeError(text)
            logger.warning(text)
    return take_likeness(frozen, model)


def _recipe(source: nn.Module, inputs: Any, report: FreezeReport, how: str) -> Recipe:
    """The network's graph; where it has none, its modules, with the reason in the report."""
    if how == "modules":
        report.capture_reason = "capture='modules'"
        return ModuleRecipe(watch(source, inputs))
    try:
        signature = Signature.of(source.forward)
        args, kwargs = call(lambda *args, **kwargs: (args, kwargs), inputs)
        captured = _capture(source, signature.take(args, kwargs).like(source))
    except CaptureError as error:
        return _by_modules(source, inputs, report, how, error)
    report.capture = "graph"
    report.notes += captured.notes
    return GraphRecipe(captured, signature)


def _by_modules(source: nn.Module, inputs: Any, report: FreezeReport, how: str, error: CaptureError) -> Recipe:
    if how == "graph":
        raise ValueError(f"capture: got 'graph', and {report.model} has none: {error}") from error
    report.capture, report.capture_reason, report.notes = "modules", str(error), []
    report.notes.append(f"no graph, its modules are rewritten instead: {error}")
    logger.info("freeze: %s has no graph: %s", report.model, error)
    return ModuleRecipe(watch(source, inputs))


def _why_not_any_batch(source: nn.Module, frozen: FrozenModel, inputs: Any) -> str:
    """What shows that the graph is not good for every batch: it was captured at 2 or more, where a size of 1 that the
    source's code asks for is not seen. Empty where one image, or two for an example of one, is answered as eager does.
    """
    sizes = [len(t) for t in named_tensors(inputs, "").values() if t.is_floating_point() and t.ndim]
    batch = sizes[0] if sizes else 0
    if batch == 0:
        return ""
    other = 2 if batch == 1 else 1
    resized = map_tensors(
        inputs, lambda _, t: t if not t.ndim or len(t) != batch else torch.cat([t, t]) if batch == 1 else t[:1], ""
    )
    with torch.no_grad():
        try:
            want, tree = tree_flatten(call(source, resized))
        except Exception:  # the source does not take it: nor need the frozen network
            return ""
        got, its_tree = tree_flatten(call(frozen, resized))
    same = str(its_tree) == str(tree)
    for g, w in zip(got, want, strict=False):
        if isinstance(w, Tensor) != isinstance(g, Tensor) or (isinstance(w, Tensor) and g.shape != w.shape):
            same = False
        elif isinstance(w, Tensor) and bool(torch.isfinite(w).all()):
            same = same and _close(g.to(w.dtype), w)
    return "" if same else f"a batch of {other} is answered otherwise than by the source"


def _check(model: Any, inputs: Any, dtype: Any, tune: Any, cuda_graph: Any, verify: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if isinstance(model, FrozenModel):
        raise TypeError("model: got a FrozenModel, expected the model it came from; refresh() takes new weights in")
    if not isinstance(inputs, Tensor | tuple | list | Mapping):
        raise TypeError(f"example_inputs: got {type(inputs).__name__}, expected a tensor, a tuple or a mapping")
    if not named_tensors(inputs, ""):
        raise ValueError("example_inputs: no tensor in it, expected an example of one call")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype: got {dtype!r}, expected one of {', '.join(short(d) for d in _DTYPES)}")
    for name, value, word in (("tune", tune, "auto"), ("cuda_graph", cuda_graph, "auto"), ("verify", verify, "warn")):
        if not isinstance(value, bool) and value != word:
            raise TypeError(f"{name}: got {value!r}, expected True, False or {word!r}")
    if any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
        raise ValueError("model: it is on the meta device and has no weights to fold")


def _dtype_of(model: nn.Module) -> torch.dtype:
    for t in [*model.parameters(), *model.buffers()]:
        if t.is_floating_point():
            return t.dtype
    return torch.get_default_dtype()


def _device_of(model: nn.Module, inputs: Any) -> torch.device:
    for t in [*model.parameters(), *model.buffers(), *named_tensors(inputs, "").values()]:
        return t.device
    return torch.device("cpu")


def _plan(
    frozen: FrozenModel, source: nn.Module, inputs: Any, device: torch.device, tune: bool | Literal["auto"]
) -> FrozenModel:
    """The frozen model in the faster memory layout; times are in its report."""
    report = frozen.report
    images = any(t.ndim == 4 and t.is_floating_point() for t in named_tensors(inputs, "").values())
    if tune is False:
        report.memory_format_reason = "not measured"
        if images:
            frozen.use_channels_last()
            if not _views_fit(frozen, inputs):
                frozen.use_channels_last(False)
                report.notes.append(_NO_VIEWS)
                return frozen
            report.memory_format = "channels_last"
        return frozen
    layouts = {"contiguous": frozen}
    if images:
        layouts["channels_last"] = copy.deepcopy(frozen)
        layouts["channels_last"].use_channels_last()
        if not _views_fit(layouts["channels_last"], inputs):
            del layouts["channels_last"]
            report.notes.append(_NO_VIEWS)
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: call(source, inputs)}
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


_NO_VIEWS = "channels_last is out: the model takes a view() that only NCHW tensors have; reshape() would do in both"


def _views_fit(frozen: FrozenModel, inputs: Any) -> bool:
    """Whether the network runs in this layout: a view across channels and pixels exists in one of them only."""
    try:
        call(frozen, inputs)
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        return False
    return True


def _overwrite_residuals(frozen: FrozenModel, inputs: Any, device: torch.device) -> None:
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
    if not all(_close(got[name], t) for name, t in named_tensors(want, "").items()):
        frozen.overwrite_residuals(False)
        frozen.report.notes.append("outputs of blocks are used elsewhere, or not finite: none is written over")


def _pack(frozen: FrozenModel, inputs: Any, device: torch.device, tune: bool | Literal["auto"]) -> None:
    """On a CPU, weights reordered for the example's shapes where that is measured faster; untuned, always."""
    if device.type != "cpu" or tune is False or not frozen_convs(frozen.module):
        return
    frozen.report.packed = frozen.choose_packs(inputs)


PARTS = (8, 4)  # images at a time; weights are read once per part


def _split(frozen: FrozenModel, inputs: Any, device: torch.device, tune: bool | Literal["auto"]) -> None:
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
        if same and all(_close(g, t) for g, t in zip(got, leaves, strict=True)):
            part.choose_packs(images)
            candidates[n] = part
    times = measure({str(n): _bound(candidate, images) for n, candidate in candidates.items()}, device)
    best = min(candidates, key=lambda n: times[str(n)])
    if best and times[str(best)] < 0.97 * times["0"]:
        frozen.images_at_a_time = best
        frozen.choose_packs(images)
        frozen.report.milliseconds |= {"frozen": times[str(best)], "frozen whole batch": times["0"]}
        frozen.report.images_at_a_time = best


def _program(frozen: FrozenModel, inputs: Any, device: torch.device) -> None:
    """On a CPU, the example's operator calls written down, so that the first call of the user runs them alone."""
    if device.type == "cpu":
        for _ in range(2):
            call(frozen, inputs)
        frozen.report.program = frozen.program


def _roofline(
    report: FreezeReport, inputs: Any, device: torch.device, dtype: torch.dtype, tune: bool | Literal["auto"]
) -> None:
    """The example's batch, and where times are measured, the rates that the bound is at."""
    sizes = [len(t) for t in named_tensors(inputs, "").values() if t.is_floating_point() and t.ndim]
    report.batch = sizes[0] if sizes else 1
    if tune is not False and any(row.flops for row in report.rows):
        report.bandwidth, report.rate = measured_rates(device, dtype)


def _close(got: Tensor, want: Tensor) -> bool:
    if not got.is_floating_point():
        return bool(torch.equal(got, want))
    scale = float(want.abs().max()) if want.numel() else 0.0
    return math.isfinite(scale) and torch.allclose(got, want, rtol=0, atol=0.05 * scale)


def _bound(candidate: nn.Module, inputs: Any) -> Callable[[], Any]:
    return lambda: call(candidate, inputs)


def _graph(frozen: FrozenModel, inputs: Any, device: torch.device, tune: bool | str, cuda_graph: bool | str) -> None:
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


def _say_if_slower(report: FreezeReport) -> None:
    if report.speedup is not None and report.speedup < 1:
        eager, frozen = report.milliseconds["eager"], report.milliseconds["frozen"]
        text = f"slower than eager on the example: {frozen:.3g} ms, eager {eager:.3g} ms"
        report.notes.append(text)
        logger.warning("freeze: %s is %s", report.model, text)


def _judge(source: nn.Module, frozen: FrozenModel, inputs: Any, report: FreezeReport) -> Verification:
    """The referee's verdict; a network that never saw data is judged on a calibrated copy, frozen the same way."""
    layers = uncalibrated(source)
    if layers:
        calibrated = private("model", source)
        try:
            calibrate(calibrated, inputs)
        except Exception as error:
            report.notes.append(f"{len(layers)} BN have initial statistics and could not be calibrated: {error}")
        else:
            report.notes.append(f"{len(layers)} BN have initial statistics; verified on a copy with the example's")
            module, _ = frozen._recipe.make(calibrated, frozen.dtype)
            twin = FrozenModel(module, calibrated, frozen._recipe, report, frozen.dtype)
            if frozen.channels_last:
                twin.use_channels_last()
            twin.overwrite_residuals(frozen._overwrites)
            twin.images_at_a_time = frozen.images_at_a_time
            source, frozen = calibrated, twin
    judged = _OnCopies(source) if WRITES_TO_INPUT in report.notes else source
    return _verify(judged, frozen, inputs, backward=False, training=False, calibrate_bn=False)


class _OnCopies(nn.Module):
    """A network that writes to its input, on copies of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors((args, kwargs), lambda _, t: t.clone(), "")
        return self.module(*args, **kwargs)
