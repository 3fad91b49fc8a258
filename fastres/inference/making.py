"""Which recipe a network is frozen by: its graph, or, where that is not to be had, its modules, with the reason."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fastres.inference.capture import CaptureError, batch_of, capture_for, own_memory
from fastres.inference.checks import copies, names_the_example
from fastres.inference.choose import agrees
from fastres.inference.frozen import FrozenModel
from fastres.inference.recipe import GraphRecipe, ModuleRecipe, Recipe
from fastres.inference.report import FreezeReport
from fastres.inference.signature import Signature
from fastres.inference.watch import capture as watch
from fastres.verify.runs import call, map_tensors, named_tensors

logger = logging.getLogger("fastres")


def make(
    source: nn.Module,
    model: nn.Module,
    inputs: Any,
    report: FreezeReport,
    how: str,
    dtype: torch.dtype,
    device: torch.device,
) -> FrozenModel:
    """The frozen network, unplanned; ``report`` is filled.

    Args:
        source: a copy of ``model`` of one's own, in eval mode.
        how: "auto", "graph" or "modules".

    Raises:
        ValueError: ``how`` is "graph" and there is none.
    """
    recipe = find_recipe(source, inputs, report, how, dtype)
    if isinstance(recipe, GraphRecipe):
        frozen, reason = _by_graph(source, model, inputs, recipe, report, dtype)
        if frozen is not None:
            return frozen
        recipe = _by_modules(source, inputs, report, how, CaptureError(reason))
    module, report.rows = recipe.make(model, dtype, device=device)
    return FrozenModel(module, model, recipe, report, dtype)


def find_recipe(source: nn.Module, inputs: Any, report: FreezeReport, how: str, dtype: torch.dtype) -> Recipe:
    """The network's graph; where it has none, its modules, with the reason in the report."""
    if how == "modules":
        report.capture_reason = "capture='modules'"
        return _watched(source, inputs)
    try:
        signature = _signature(source)
        args, kwargs = call(lambda *args, **kwargs: (args, kwargs), inputs)
        try:
            given = signature.take(args, kwargs)
        except TypeError as error:
            raise TypeError(f"example_inputs: {error}, {report.model}.forward takes {signature}") from error
        captured = capture_for(source, given, dtype)
    except CaptureError as error:
        return _by_modules(source, inputs, report, how, error)
    report.capture = "graph"
    report.notes += captured.notes
    return GraphRecipe(captured, signature)


def _by_graph(
    source: nn.Module, model: nn.Module, inputs: Any, recipe: GraphRecipe, report: FreezeReport, dtype: torch.dtype
) -> tuple[FrozenModel | None, str]:
    """The network of a graph; or why it is not to be had."""
    try:
        module, report.rows = recipe.make(source, dtype)
    except Exception as error:  # whatever the graph is, the network must not be lost
        logger.warning("freeze: a fault of fastres: the graph of %s cannot be rewritten", report.model, exc_info=True)
        return None, f"a fault of fastres: its graph cannot be rewritten: {type(error).__name__}: {error}"
    frozen = FrozenModel(module, model, recipe, report, dtype)
    reason = _why_not_any_batch(source, frozen, inputs)
    frozen.forget()  # packs for that batch
    return (None, reason) if reason else (frozen, "")


def _by_modules(source: nn.Module, inputs: Any, report: FreezeReport, how: str, error: CaptureError) -> Recipe:
    if how == "graph":
        raise ValueError(f"capture: got 'graph', and {report.model} has none: {error}") from error
    report.capture, report.capture_reason, report.notes = "modules", str(error), []
    report.notes.append(f"no graph, its modules are rewritten instead: {error}")
    logger.info("freeze: %s has no graph: %s", report.model, error)
    return _watched(source, inputs)


def _watched(source: nn.Module, inputs: Any) -> Recipe:
    own_memory(source)  # a forward without a graph may write to its parameters
    with names_the_example(inputs):
        return ModuleRecipe(watch(source, copies(inputs)))


def _signature(source: nn.Module) -> Signature:
    try:
        return Signature.of(source.forward)
    except ValueError as error:  # a forward in C++
        raise CaptureError(str(error)) from error


def _why_not_any_batch(source: nn.Module, frozen: FrozenModel, inputs: Any) -> str:
    """What shows that the graph is not good for every batch: it was captured at 2 or more, where a size of 1 that the
    source's code asks for is not seen. Empty where one image, or two for an example of one, is answered as eager does.
    """
    batch = batch_of(named_tensors(inputs, "").values())
    if batch == 0:
        return ""
    other = 2 if batch == 1 else 1

    def resized(_: str, t: Tensor) -> Tensor:
        return t.clone() if not t.ndim or len(t) != batch else torch.cat([t, t]) if batch == 1 else t[:1].clone()

    def run(model: nn.Module, given: Any) -> Any:
        torch.default_generator.manual_seed(0)  # networks that draw numbers draw the same
        with torch.no_grad():
            return call(model, given)

    try:
        want = run(source, map_tensors(inputs, resized, ""))
    except Exception:  # the source does not take it: nor need the frozen network; the example it must
        with names_the_example(inputs):
            run(source, copies(inputs))
        return ""
    if not _agree(run(source, map_tensors(inputs, resized, "")), want, 1e-3):
        return "it answers the same input differently from call to call: it keeps state"
    try:
        got = run(frozen, map_tensors(inputs, resized, ""))
    except Exception as error:  # whatever the graph is, the network must not be lost
        return f"a batch of {other} is not answered: {type(error).__name__}: {error}"
    if _agree(got, want):
        return ""
    if not _agree(run(frozen, copies(inputs)), run(source, copies(inputs))):
        logger.warning("freeze: a fault of fastres: the graph of %s gives other answers", type(source).__name__)
        return "a fault of fastres: its graph answers the example otherwise than the source"
    return f"a batch of {other} is answered otherwise than by the source"


def _agree(got: Any, want: Any, tolerance: float = 0.05) -> bool:
    """Whether two outputs have one structure, and their leaves agree."""
    (got, its_tree), (want, tree) = tree_flatten(got), tree_flatten(want)
    return str(its_tree) == str(tree) and all(agrees(g, w, tolerance) for g, w in zip(got, want, strict=True))
