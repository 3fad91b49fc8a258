"""freeze in int8: calibrate the float32 network, quantize it, ask the gate, move layers back until it passes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fastres.graph.quantize import Quantized, Weights, quantize
from fastres.graph.recipe import BFLOAT16, FLOAT, Recipe, layers, why_not_layer
from fastres.graph.rewrite import Rewritten
from fastres.inference.calibration import Runs, observe, read_images
from fastres.inference.checks import names_the_example, run_once, shapes
from fastres.inference.frozen import FrozenModel
from fastres.inference.gate import Gate, Score, Settled, checked_metric, settle, snr
from fastres.inference.observers import OBSERVERS
from fastres.inference.quantization import LayerPrecision, Quantization
from fastres.inference.tune import choose_layout
from fastres.verify.runs import call, map_tensors, named_tensors

logger = logging.getLogger("fastres")
_TRIED = 4  # images that the damage of a single layer is measured on
Metric = Callable[[nn.Module], float]


# ---- freeze's arguments ----------------------------------------------------------------------------------------------


def check_int8(dtype: Any, calibrate: Any, gate: Any, max_drop: Any, observer: Any, differentiable: bool) -> None:
    """Refuse arguments of freeze that int8 does not take, or that are for int8 alone.

    Raises:
        TypeError: a gate that is no function, a max_drop that is no number.
        ValueError: the others.
    """
    if gate is not None and not callable(gate):
        raise TypeError(
            f"gate: got {type(gate).__name__}, expected None or a function of the network that gives a number"
        )
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float):
        raise TypeError(f"max_drop: got {type(max_drop).__name__}, expected a number")
    if not max_drop >= 0:
        raise ValueError(f"max_drop: got {max_drop}, expected a number of at least 0")
    if observer not in OBSERVERS:
        raise ValueError(f"observer: got {observer!r}, expected {', '.join(map(repr, OBSERVERS))}")
    if dtype not in ("int8", torch.int8):
        for name, value in (("calibrate", calibrate), ("gate", gate)):
            if value is not None:
                raise ValueError(f"{name}: got {type(value).__name__} with dtype={dtype!r}, expected dtype='int8'")
        return
    if differentiable:
        raise ValueError("differentiable: got True with dtype='int8', expected False: rounding has no gradient")


def calibration_images(calibrate: Any, example: Any, device: torch.device) -> list[Tensor]:
    """freeze's calibration images in batches of a few.

    Raises:
        TypeError, ValueError: they are none, or do not fit the example; or the network is for a GPU.
    """
    if device.type != "cpu":
        raise ValueError(f"dtype: got 'int8' for a model on {device}, expected one on a CPU: no GPU kernel runs int8")
    tensors = list(named_tensors(example, "").values())
    if len(tensors) != 1 or not tensors[0].is_floating_point() or tensors[0].ndim != 4:
        raise ValueError(f"example_inputs: got {shapes(example)}, expected one tensor of images for dtype='int8'")
    return read_images(calibrate, tensors[0])


def quantized(
    frozen: FrozenModel,
    source: nn.Module,
    inputs: Any,
    device: torch.device,
    batches: Sequence[Tensor],
    observer: str,
    metric: Metric | None,
    max_drop: float,
) -> FrozenModel:
    """The network in int8, or in float32 with the reason in its report.

    Raises:
        ValueError: the network has no graph, or does not take the calibration images.
    """
    if frozen.graph is None:
        reason = frozen.report.capture_reason
        raise ValueError(f"dtype: got 'int8', and {frozen.report.model} has no graph to quantize: {reason}")
    frozen = choose_layout(frozen, source, inputs, device, False)
    if not frozen.plan.channels_last:
        frozen.report.notes.append("int8 needs channels_last, in which the model does not run: float32 is returned")
        return frozen
    for images in {t.shape[1:]: t for t in batches}.values():
        with names_the_example(images, "calibrate"):
            network = frozen._network
            given = _with(inputs, images)
            args, kwargs = call(lambda *args, **kwargs: (args, kwargs), given)
            assert network is not None
            if not network.captured.takes(frozen._signature.take(args, kwargs)):
                raise ValueError(f"the network is captured for {network.captured.describe()}")
            run_once(frozen, given)
    return quantize_frozen(frozen, inputs, batches, observer, metric, max_drop)


# ---- the network -----------------------------------------------------------------------------------------------------


def quantize_frozen(
    frozen: FrozenModel,
    example: Any,
    batches: Sequence[Tensor],
    observer: str,
    metric: Metric | None,
    max_drop: float,
) -> FrozenModel:
    """The network in int8, or the float32 network where the gate takes no int8 one; its report says which and why.

    Args:
        frozen: in float32, in channels_last; with a graph.
        example: one call of it, with one tensor of images.
        batches: calibration images.
        metric: the caller's gate.
    """
    work = _Work(frozen, example, batches)
    say = functools.partial(logger.info, "freeze: %s: %s", frozen.report.model)
    say(f"finding ranges on {sum(map(len, batches))} images")
    recipe = observe(work.runs, work.inputs, observer)
    baseline = None if metric is None else checked_metric(metric(frozen))
    gate = Gate([work.answer(frozen, images) for images in batches], metric, max_drop, baseline)
    candidates = sorted(quantize(work.made, recipe, work.known).taken)
    say(f"quantizing {len(candidates)} layers")
    settled, back = _settled(work, recipe, gate, candidates, say)
    report = _report(work, recipe, gate, settled, back, observer)
    frozen.report.quantization = report
    if settled.network is None:
        text = f"int8 does not pass the gate, and float32 is returned: {settled.first.fault or 'no layer can be int8'}"
        frozen.report.notes.append(text)
        logger.warning("freeze: %s: %s", frozen.report.model, text)
        return frozen
    taken = {work.made.graph.steps[place].name for place in candidates if place not in back}
    frozen.report.rows = [
        replace(row, became=f"{row.became}, int8", bytes=row.bytes // 4, weights=row.weights // 4)
        if row.name in taken
        else row
        for row in frozen.report.rows
    ]
    frozen.report.dtype = "int8"
    return settled.network


def _with(example: Any, images: Tensor) -> Any:
    """The example's call with these images."""
    return map_tensors(example, lambda _, t: images, "")


class _Work:
    """The float32 network, and what quantized ones are made of and judged on."""

    def __init__(self, frozen: FrozenModel, example: Any, batches: Sequence[Tensor]) -> None:
        found = frozen.prepared(_with(example, batches[0]))
        network = frozen._network
        assert found is not None and network is not None
        executor, _, constants = found
        names = executor.graph.constants
        self.frozen, self.example, self.batches = frozen, example, batches
        self.runs, self.known = Runs(executor.graph, constants), Weights()
        self._tried: list[Any] | None = None  # the float32 network's answer to the first images
        self.made = Rewritten(executor.graph, dict(zip(names, constants, strict=True)), frozen.report.rows)
        self.inputs = [[frozen._prepare("", images)] for images in batches]

    def network(self, recipe: Recipe, max_weights: int | None = None) -> tuple[FrozenModel, Quantized]:
        """A network of this recipe; `max_weights` as for freeze: 0 packs nothing for a network that runs once."""
        quantized, frozen = quantize(self.made, recipe, self.known), self.frozen
        own = frozen._network
        assert own is not None
        bound = frozen.plan.max_weights if max_weights is None else max_weights
        plan = replace(frozen.plan, winograd=min(frozen.plan.winograd, 2), max_weights=bound)
        how = frozen._signature, frozen.report, torch.float32, own.captured, plan
        made = FrozenModel(quantized.made, frozen._source.model, *how, recipe)
        made.use_channels_last()
        return made, quantized

    def answer(self, network: FrozenModel, images: Tensor) -> list[Any]:
        """The leaves of its output."""
        leaves: list[Any] = tree_flatten(call(network, _with(self.example, images)))[0]
        return leaves

    def alone(self, recipe: Recipe, place: int, candidates: Sequence[int]) -> float:
        """The SNR at the output, of the first images, with one layer alone quantized."""
        network, _ = self.network(recipe.keeping({other: FLOAT for other in candidates if other != place}), 0)
        images = self.batches[0][:_TRIED]
        if self._tried is None:
            self._tried = self.answer(self.frozen, images)
        pairs = zip(self._tried, self.answer(network, images), strict=True)
        return min((snr(w, g) for w, g in pairs if isinstance(w, Tensor) and w.is_floating_point()), default=0.0)


def _settled(
    work: _Work, recipe: Recipe, gate: Gate, candidates: list[int], say: Callable[[str], None]
) -> tuple[Settled[FrozenModel], dict[int, str]]:
    """The network that the gate takes, and the layers that went back, each with what it computes in."""

    def score(network: FrozenModel) -> Score:
        return gate.score([work.answer(network, images) for images in work.batches], network)

    @functools.cache
    def damage(place: int) -> float:
        return work.alone(recipe, place, candidates)

    settled: Settled[FrozenModel] | None = None
    for precision in (BFLOAT16, FLOAT) if has_fast_bfloat16() else (FLOAT,):

        def make(back: Sequence[int], precision: str = precision) -> FrozenModel:
            if back:
                say(f"the gate does not pass: {len(back)} layers in {precision}")
            return work.network(recipe.keeping(dict.fromkeys(back, precision)))[0]

        settled = settle(candidates, make, score, damage)
        if settled.network is not None:
            return settled, dict.fromkeys(settled.back, precision)
    assert settled is not None
    return settled, dict.fromkeys(candidates, FLOAT)


def has_fast_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _report(
    work: _Work, recipe: Recipe, gate: Gate, settled: Settled[FrozenModel], back: dict[int, str], observer: str
) -> Quantization:
    graph, score = work.made.graph, settled.score
    found = layer_snr(work, recipe.keeping(back)) if settled.network is not None else {}
    rows = []
    for place, step in enumerate(graph.steps):
        reason = why_not_layer(step, graph)
        if reason is None:
            continue
        alone = settled.damage.get(place)
        if place in back:
            reason = "it was moved back, the gate did not pass with it on integers"
            reason = reason if settled.network is not None else "the gate takes no int8 network"
        elif not reason and place not in settled.damage and place not in found:
            reason = (
                "no range: its numbers on the calibration images are not finite, or its input is no batch of images"
            )
        precision = back.get(place, FLOAT if reason else "int8")
        rows.append(LayerPrecision(step.name, precision, found.get(place), alone, reason))
    weak = gate.weakness()
    images = sum(map(len, work.batches))
    return Quantization(
        observer,
        images,
        recipe.limit,
        rows,
        gate.describe(),
        settled.network is not None,
        score.snr,
        score.agreement,
        score.counted,
        score.metric,
        gate.baseline,
        "" if settled.first.holds else settled.first.fault,
        [weak] if weak else [],
    )


def layer_snr(work: _Work, recipe: Recipe) -> dict[int, float]:
    """The SNR of each layer's output against the float32 network's on the first images, by the layer's place."""
    network, quantized = work.network(recipe)
    found = network.prepared(_with(work.example, work.batches[0]))
    assert found is not None
    executor, inputs, constants = found
    own = {slot: (place, bits) for place, (slot, bits) in quantized.written.items() if place in layers(work.made.graph)}
    places = {place for place, _ in own.values()}
    wants = {
        slot - work.made.graph.first_result: value.clone()
        for slot, value in work.runs.each(work.inputs[0])
        if slot - work.made.graph.first_result in places
    }
    ratios: dict[int, float] = {}
    for slot, value in Runs(executor.graph, constants).each(inputs):
        if slot in own:
            place, bits = own[slot]
            got = value.float() if bits is None else (value.float() - bits.zero_point) * bits.scale
            ratios[place] = snr(wants[place], got.view(wants[place].shape))
    return ratios
