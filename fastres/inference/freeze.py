"""freeze: capture, fold, plan, verify; each step in a module of its own."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fastres.graph.captured import Captured
from fastres.graph.export import CaptureError, batch_of, capture_for, dtype_of, own_memory, sharing_copy
from fastres.graph.fold import short
from fastres.graph.rewrite import Rewritten
from fastres.graph.signature import Signature
from fastres.inference.checks import (
    check_example,
    check_model,
    copies,
    names_the_example,
    own_example,
    put_back,
    run_once,
    shapes,
)
from fastres.inference.compare import agrees, rounding_share
from fastres.inference.fallback import frozen_parts, swapped_copy
from fastres.inference.frozen import FrozenModel
from fastres.inference.hub import take_likeness
from fastres.inference.int8 import Metric, calibration_images, check_int8, quantized
from fastres.inference.network import fold
from fastres.inference.precision import settle
from fastres.inference.report import FreezeReport
from fastres.inference.source import Source, source_tensors
from fastres.inference.tune import tell_ways, tune_plan
from fastres.inference.verify import judge
from fastres.verify.runs import call, map_tensors, named_tensors, private

logger = logging.getLogger("fastres")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPE_NAMES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
DTYPE_NAMES |= {short(dtype): dtype for dtype in _DTYPES}


@torch.random.fork_rng(devices=[])
@torch.inference_mode(False)  # the snapshot's tensors are refreshed later, in whatever mode
def freeze(
    model: nn.Module,
    example_inputs: Any,
    *,
    examples: Sequence[Any] = (),
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    capture: Literal["auto", "graph", "modules"] = "auto",
    tune: bool | Literal["auto"] = "auto",
    cuda_graph: bool | Literal["auto"] = "auto",
    precision: Literal["auto", "exact"] = "auto",
    max_weights: int | None = None,
    verify: bool | Literal["warn"] = True,
    differentiable: bool = False,
    calibrate: Any = None,
    gate: Metric | None = None,
    max_drop: float = 0.01,
    observer: Literal["mse", "minmax", "percentile"] = "mse",
) -> FrozenModel:
    """A copy of ``model`` for inference: BN folded into convolutions in float64, layout chosen, answers verified.

    The model runs as in eval mode, whatever mode it is in, and is never changed. Its forward is captured as a graph of
    ATen operators (`torch.export`, any batch and image size that its code treats alike); each convolution takes in what
    alone reads it, in whatever form it is written: batch norms and other arithmetic with one number a channel, a
    residual sum, an activation. A network that has no graph (control flow that depends on data, hooks) keeps its own
    code; its largest parts that have one are frozen each, and known blocks of the rest are swapped
    (:func:`fastres.swap`). What could not be folded stays, with the reason in ``.report``.

    Args:
        model: the source; on any device, in any mode.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments for one call. The result takes
            any batch size; times and the layout are measured on this one.
        examples: further calls that must be answered, where the network's code treats them unlike the first: image
            sizes, arguments. Each that needs a graph of its own is captured now and saved with the model; any other
            such call is captured when it is made, while the source is there (:meth:`FrozenModel.capture`).
        dtype: torch.float32, float16, bfloat16 or float64, or "fp32", "fp16", "bf16", "fp64"; None keeps the model's.
            Inputs are cast to it, outputs come in it. "int8" or torch.int8 quantizes on a CPU what passes the gate (see
            ``calibrate``); inputs and outputs are float32 then.
        device: where the copy goes; None keeps the model's.
        capture: "auto" takes the graph or, where there is none, the modules as they are; "graph" and "modules" insist.
        tune: "auto" or True measures eager and both memory layouts on the example, for a few seconds, and keeps the
            faster; False measures nothing and takes channels_last. A frozen model slower than eager says so in the
            report.
        cuda_graph: record the example's shapes as a CUDA graph: "auto" on a GPU when that is measured faster, True
            always, False never; other shapes run eagerly.
        precision: "auto" may run 3x3 convolutions on a CPU by Winograd's F(2x2, 3x3), which is as exact as a direct
            product, and with ``verify`` by F(4x4, 3x3), for as many layers as the referee takes; "exact" runs direct
            products alone.
        max_weights: bytes that weights made ready for a CPU's kernels may take beside the weights: packed ones are as
            large as these, those of F(2x2, 3x3) and F(4x4, 3x3) 1.8 and 4 times as large in float32. The first layers
            of a network have them first; 0 runs every layer on its weight as it is. None: no bound for one input size,
            and 5 times the weights and 64 MiB for all sizes together.
        verify: run the referee (:func:`fastres.verify`) against the model in eval mode on the example and put its
            verdict in the report. A failure raises, with "warn" it is logged and reported. BN layers with their initial
            statistics are given the example's, on copies, for that comparison only.
        differentiable: calls whose input requires a gradient run PyTorch's operators on the folded weights, slower, and
            give gradients of the input: for saliency maps, adversarial examples, a head trained before a frozen body.
            The weights have none. Without it a backward pass through the network raises.
        calibrate: images for int8, like those that the network will see: a tensor [N, C, H, W], a list of such, or an
            iterable of batches such as a DataLoader (images, or tuples whose first tensor is images); at most 512 are
            read. They give the ranges of the tensors, and the gate compares the int8 network with the float32 one on
            them. The report has each layer's precision; where no int8 network passes, the float32 one is returned.
        gate: None asks for 99 % top-1 agreement on calibration images whose margin exceeds noise and an SNR of 10 dB of
            the logits, or of 20 dB where outputs are no logits. A function of the network that returns a number, the
            higher the better, asks for that instead: an accuracy on held-out images.
        max_drop: what the function's value may lose from float32 to int8.
        observer: how ranges are found: "mse" has the least square error, "percentile" leaves out one number in 10,000,
            "minmax" none.

    Returns:
        A :class:`FrozenModel`.

    Raises:
        TypeError: an argument of the wrong kind, a model that cannot be copied or is frozen already.
        ValueError: no tensor in ``example_inputs``, a model on the meta device, ``cuda_graph=True`` without a GPU,
            ``capture="graph"`` for a network that has none; calibration images that are missing, empty, not finite or
            of another size, or given without ``dtype="int8"``; int8 for a model without a graph or with several inputs.
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
    model = _uncompiled(model)
    is_int8 = dtype in ("int8", torch.int8)
    check_int8(dtype, calibrate, gate, max_drop, observer, differentiable)
    dtype = torch.float32 if is_int8 else dtype
    dtype = DTYPE_NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    _check(model, example_inputs, examples, dtype, tune, cuda_graph, verify)
    for name, word, known in (
        ("capture", capture, ("auto", "graph", "modules")),
        ("precision", precision, ("auto", "exact")),
    ):
        if word not in known:
            raise ValueError(f"{name}: got {word!r}, expected {', '.join(map(repr, known[:-1]))} or {known[-1]!r}")
    if max_weights is not None and (type(max_weights) is not int or max_weights < 0):
        raise ValueError(f"max_weights: got {max_weights!r}, expected a number of bytes, or None for no bound")
    source = sharing_copy(model).eval()
    own = dtype_of(source)
    target = torch.device(device) if device is not None else _device_of(source, example_inputs)
    batches = calibration_images(calibrate, example_inputs, target) if is_int8 else []
    assert not isinstance(dtype, str)  # checked
    dtype = dtype or own
    if cuda_graph is True and target.type != "cuda":
        raise ValueError(f"cuda_graph: got True for a model on {target}, expected a CUDA device")
    if any(t.device != target for t in source_tensors(source).values()):
        source = private("model", source).to(target)
    inputs = own_example(example_inputs, target, own)
    report = FreezeReport(type(model).__name__, short(dtype), str(target), [])
    say = functools.partial(logger.info, "freeze: %s: %s", report.model)
    say("capturing its graph")
    if is_int8:
        capture = "graph" if capture == "auto" else capture
    frozen = _capture(source, model, inputs, report, capture, dtype, target)
    if any(m.training for m in model.modules()):
        report.notes.append("the model is in training mode; frozen as in eval mode")
    if report.capture == "graph" and not report.folded:
        report.notes.append("no BN was folded")
        if report.counts["norms_left"]:
            logger.warning("freeze: no BN of %s was folded: see the report", report.model)
    if dtype is torch.bfloat16 and target.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        report.notes.append("this CPU has no native bfloat16: oneDNN emulates it, slower than float32")
    for made in frozen.modules():  # its parts too
        if isinstance(made, FrozenModel):
            made.plan.differentiable, made.plan.max_weights = differentiable, max_weights
            made.plan.winograd = 0 if precision == "exact" else 4 if verify and made is frozen else 2
            made.forget()  # what its first runs have lowered
    example = copies(inputs)
    if is_int8:
        frozen = quantized(frozen, source, inputs, target, batches, observer, gate, max_drop)
        put_back(named_tensors(inputs, ""), named_tensors(example, ""))
        verify = False if frozen.is_quantized else verify  # the gate has judged it
    say("choosing how it runs" + ("" if tune is False else ", by measuring for seconds"))
    frozen = tune_plan(frozen, source, inputs, target, tune, cuda_graph)
    put_back(named_tensors(inputs, ""), named_tensors(example, ""))
    if report.capture == "modules" and put_back(source_tensors(source), source_tensors(model)):
        frozen.refresh()  # its forward keeps state, which the runs above have moved
    further = [own_example(other, target, own) for other in examples]
    for place, other in enumerate(further):
        with names_the_example(other, f"examples[{place}]"):
            frozen.capture(other)
    for given in (inputs, *further) if verify else ():
        say("comparing its answers with float64's")
        verdict = settle(frozen, given, functools.partial(judge, source, frozen, given, report))
        rejected = verdict is not None and not verdict
        if report.verification is None or rejected:
            report.verification = verdict
        if rejected:
            text = f"freeze: the referee rejects the frozen {report.model} on {shapes(given)}:\n{verdict}"
            if verify != "warn":
                raise RuntimeError(text)
            logger.warning(text)
            break
    if verify and report.winograd:  # as the referee left it
        tell_ways(frozen, inputs)
    report.notes = list(dict.fromkeys(report.notes))
    return take_likeness(frozen, model)


def _capture(
    source: nn.Module,
    model: nn.Module,
    inputs: Any,
    report: FreezeReport,
    how: str,
    dtype: torch.dtype,
    device: torch.device,
) -> FrozenModel:
    """The frozen network, without a plan: of its graph or, where it has none, of a swapped copy; fills the report."""
    signature = None
    try:
        if how == "modules":
            raise CaptureError("capture='modules'")
        signature = _signature(source)
        args, kwargs = call(lambda *args, **kwargs: (args, kwargs), inputs)
        try:
            given = signature.take(args, kwargs)
        except TypeError as error:
            raise TypeError(f"example_inputs: {error}, {report.model}.forward takes {signature}") from error
        for any_size in (True, False):
            captured = capture_for(source, given, dtype, any_size)
            made = _folded(captured, source, dtype, report)
            report.capture, report.rows = "graph", made.rows
            frozen = FrozenModel(made, model, signature, report, dtype, captured)
            if not any_size or _answers_other_sizes(source, frozen, inputs):
                break
        reason = _why_not_any_batch(source, frozen, inputs)
        if reason:
            raise CaptureError(reason)
        report.notes[:0] = captured.notes
        frozen.drop_captures()  # for that batch
        frozen.forget()  # its packs
        return frozen
    except CaptureError as error:
        if how == "graph":
            raise ValueError(f"capture: got 'graph', and {report.model} has none: {error}") from error
        report.capture, report.capture_reason, report.notes = "modules", str(error), []
        if how != "modules":
            report.notes.append(f"no graph, its known blocks are swapped instead: {error}")
            logger.info("freeze: %s has no graph: %s", report.model, error)
    own_memory(source)  # a forward without a graph may write to its parameters
    with names_the_example(inputs):
        run_once(source, inputs)
    parts = frozen_parts(sharing_copy(source), inputs, functools.partial(_part, model, dtype)) if how == "auto" else {}
    module, report.rows = swapped_copy(source, dtype, device, parts)
    if parts:
        rest = "the rest runs as it is, its known blocks swapped"
        report.notes.append(f"{len(parts)} parts have a graph and are frozen: {', '.join(parts)}; {rest}")
    if signature is None:
        with contextlib.suppress(CaptureError):
            signature = _signature(source)
    return FrozenModel(module, model, signature or Signature.any(), report, dtype)


def _part(model: nn.Module, dtype: torch.dtype, name: str, part: nn.Module, args: tuple[Any, ...]) -> FrozenModel:
    """The submodule `name` of a network without a graph, frozen. Raises CaptureError where it has none either."""
    report = FreezeReport(type(part).__name__, short(dtype), "", [])
    device = _device_of(part, args)
    try:
        frozen = _capture(part, model.get_submodule(name), args, report, "graph", dtype, device)
        frozen.use_channels_last()
        run_once(frozen, args)
    except (ValueError, RuntimeError, TypeError) as error:  # a view that no channels_last tensor has
        raise CaptureError(str(error)) from error
    frozen._source = Source(model.get_submodule(name), keep=True)
    return frozen


def _folded(captured: Captured, source: nn.Module, dtype: torch.dtype, report: FreezeReport) -> Rewritten:
    try:
        return fold(captured, source, dtype)
    except Exception as error:  # whatever the graph is, the network must not be lost
        logger.warning("freeze: a fault of fastres: the graph of %s cannot be rewritten", report.model, exc_info=True)
        text = f"a fault of fastres: its graph cannot be rewritten: {type(error).__name__}: {error}"
        raise CaptureError(text) from error


def _signature(source: nn.Module) -> Signature:
    try:
        return Signature.of(source.forward)
    except ValueError as error:  # a forward in C++
        raise CaptureError(str(error)) from error


# ---- the graph against its source ------------------------------------------------------------------------------------


def _answers_other_sizes(source: nn.Module, frozen: FrozenModel, inputs: Any) -> bool:
    """Tell whether images one pixel higher and wider are answered as by eager; true where eager does not take them."""
    larger = map_tensors(inputs, lambda _, t: F.pad(t, [0, 1] * (t.ndim - 2)) if t.is_floating_point() else t, "")
    args, kwargs = call(lambda *args, **kwargs: (args, kwargs), larger)
    given = frozen._signature.take(args, kwargs)
    if frozen._network is None or not frozen._network.captured.takes(given):
        return True  # another graph is captured for them, or the sizes are fixed
    try:
        want = run_once(source, larger)
    except Exception:
        return True
    try:
        got = run_once(frozen, larger)
    except Exception:
        return False
    return _agree(got, want) or _agree(got, want, 2 * rounding_share(source, frozen.dtype, larger, want))


def _why_not_any_batch(source: nn.Module, frozen: FrozenModel, inputs: Any) -> str:
    """Say what shows that the graph is not good for every batch; empty where it is.

    It was captured at 2 or more, where a size of 1 that the source's code asks for is not seen. So one image, or two
    for an example of one, must be answered as eager does.
    """
    batch = batch_of(named_tensors(inputs, "").values())
    if batch == 0:
        return ""
    other = 2 if batch == 1 else 1

    def resized(_: str, t: Tensor) -> Tensor:
        return t.clone() if not t.ndim or len(t) != batch else torch.cat([t, t]) if batch == 1 else t[:1].clone()

    given = map_tensors(inputs, resized, "")
    try:
        want = run_once(source, given)
    except Exception:  # the source does not take it: nor need the frozen network; the example it must
        with names_the_example(inputs):
            run_once(source, inputs)
        return ""
    if not _agree(run_once(source, given), want, 1e-3):
        return "it answers the same input differently from call to call: it keeps state"
    try:
        got = run_once(frozen, given)
    except Exception as error:  # whatever the graph is, the network must not be lost
        return f"a batch of {other} is not answered: {type(error).__name__}: {error}"
    if _agree(got, want) or _agree(got, want, 2 * rounding_share(source, frozen.dtype, given, want)):
        return ""
    want = run_once(source, inputs)
    got = run_once(frozen, inputs)
    if not _agree(got, want) and not _agree(got, want, 2 * rounding_share(source, frozen.dtype, inputs, want)):
        logger.warning("freeze: a fault of fastres: the graph of %s gives other answers", type(source).__name__)
        return "a fault of fastres: its graph answers the example otherwise than the source"
    return f"a batch of {other} is answered otherwise than by the source"


def _agree(got: Any, want: Any, tolerance: float = 0.05) -> bool:
    """Tell whether two outputs have one structure, and their leaves agree."""
    (got, its_tree), (want, tree) = tree_flatten(got), tree_flatten(want)
    return str(its_tree) == str(tree) and all(agrees(g, w, tolerance) for g, w in zip(got, want, strict=True))


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check(model: Any, inputs: Any, examples: Any, dtype: Any, tune: Any, cuda_graph: Any, verify: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if isinstance(model, FrozenModel):
        raise TypeError("model: got a FrozenModel, expected the model it came from; refresh() takes new weights in")
    check_example(inputs)
    if not isinstance(examples, tuple | list):
        raise TypeError(f"examples: got {type(examples).__name__}, expected a list of examples")
    for place, example in enumerate(examples):
        check_example(example, f"examples[{place}]")
    if dtype is not None and dtype not in _DTYPES:
        names = f"{', '.join(short(d) for d in _DTYPES)}, or {', '.join(map(repr, list(DTYPE_NAMES)[:4]))}"
        raise TypeError(f"dtype: got {dtype!r}, expected one of {names}")
    for name, value, word in (("tune", tune, "auto"), ("cuda_graph", cuda_graph, "auto"), ("verify", verify, "warn")):
        if not isinstance(value, bool) and value != word:
            raise TypeError(f"{name}: got {value!r}, expected True, False or {word!r}")
    check_model(model)


def _uncompiled(model: Any) -> Any:
    """The network in what `torch.compile` made of it, which no graph is captured of."""
    compiled = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())
    return model._orig_mod if isinstance(model, compiled) else model


def _device_of(model: nn.Module, inputs: Any) -> torch.device:
    for t in [*model.parameters(), *model.buffers(), *named_tensors(inputs, "").values()]:
        return t.device
    return torch.device("cpu")
