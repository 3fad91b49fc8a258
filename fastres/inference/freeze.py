"""freeze: capture, fold, plan, verify; each step in a module of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastres.inference.capture import dtype_of, sharing_copy
from fastres.inference.checks import check_example, check_model, copies, own_example, put_back
from fastres.inference.choose import (
    choose_layout,
    find_bound,
    overwrite_residuals,
    pack,
    record_graph,
    say_if_slower,
    split,
    write_program,
)
from fastres.inference.frozen import FrozenModel
from fastres.inference.judge import judge
from fastres.inference.likeness import take_likeness
from fastres.inference.making import make
from fastres.inference.recipe import source_tensors
from fastres.inference.report import FreezeReport
from fastres.nn.fold import short
from fastres.verify.runs import named_tensors, private

logger = logging.getLogger("fastres")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@torch.random.fork_rng(devices=[])
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
    own = dtype_of(source)
    target = torch.device(device) if device is not None else _device_of(source, example_inputs)
    dtype = dtype or own
    if cuda_graph is True and target.type != "cuda":
        raise ValueError(f"cuda_graph: got True for a model on {target}, expected a CUDA device")
    if any(t.device != target for t in source_tensors(source).values()):
        source = private("model", source).to(target)
    inputs = own_example(example_inputs, target, own)
    report = FreezeReport(type(model).__name__, short(dtype), str(target), [])
    frozen = make(source, model, inputs, report, capture, dtype, target)
    if any(m.training for m in model.modules()):
        report.notes.append("the model is in training mode; frozen as in eval mode")
    if not report.folded:
        report.notes.append("no BN was folded")
    if not report.folded and report.counts["norms_left"]:
        logger.warning("freeze: no BN of %s was folded: see the report", report.model)
    if dtype is torch.bfloat16 and target.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        report.notes.append("this CPU has no native bfloat16: oneDNN emulates it, slower than float32")
    example = copies(inputs)
    frozen = choose_layout(frozen, source, inputs, target, tune)
    overwrite_residuals(frozen, inputs, target)
    pack(frozen, inputs, target, tune)
    split(frozen, inputs, target, tune)
    write_program(frozen, inputs, target)
    find_bound(report, inputs, target, dtype, tune)
    record_graph(frozen, inputs, target, tune, cuda_graph)
    say_if_slower(report)
    put_back(named_tensors(inputs, ""), named_tensors(example, ""))
    if report.capture == "modules" and put_back(source_tensors(source), source_tensors(model)):
        frozen.refresh()  # its forward keeps state, which the runs above have moved
    if verify:
        report.verification = judge(source, frozen, inputs, report)
        if report.verification is not None and not report.verification:
            text = f"freeze: the referee rejects the frozen {report.model}:\n{report.verification}"
            if verify != "warn":
                raise RuntimeError(text)
            logger.warning(text)
    return take_likeness(frozen, model)


def _check(model: Any, inputs: Any, dtype: Any, tune: Any, cuda_graph: Any, verify: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if isinstance(model, FrozenModel):
        raise TypeError("model: got a FrozenModel, expected the model it came from; refresh() takes new weights in")
    if not isinstance(inputs, Tensor | tuple | list | Mapping):
        raise TypeError(f"example_inputs: got {type(inputs).__name__}, expected a tensor, a tuple or a mapping")
    check_example(inputs)
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype: got {dtype!r}, expected one of {', '.join(short(d) for d in _DTYPES)}")
    for name, value, word in (("tune", tune, "auto"), ("cuda_graph", cuda_graph, "auto"), ("verify", verify, "warn")):
        if not isinstance(value, bool) and value != word:
            raise TypeError(f"{name}: got {value!r}, expected True, False or {word!r}")
    check_model(model)


def _device_of(model: nn.Module, inputs: Any) -> torch.device:
    for t in [*model.parameters(), *model.buffers(), *named_tensors(inputs, "").values()]:
        return t.device
    return torch.device("cpu")
