"""Calibration: what freeze is given as images, and what the network's tensors hold on them.

Two passes over the float32 network: the least and the largest number of each tensor, then a histogram between them, and
the means of the channels that layers read. A few images at a time; nothing is kept but those statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.graph.recipe import Recipe, is_mean, joined, layers, steps_of
from fastres.graph.steps import Graph, Slot
from fastres.inference.lower import Lowered, lower, run
from fastres.inference.observers import BINS, find_range
from fastres.inference.plan import Plan
from fastres.ops._int8_conv import weight_limit

MOST = 512  # images that are read; more would say little, and be held in memory
AT_A_TIME = 8


# ---- the images ------------------------------------------------------------------------------------------------------


def read_images(calibrate: Any, example: Tensor) -> list[Tensor]:
    """The calibration images as float32 batches of a few, at most `MOST` in all.

    Args:
        calibrate: a tensor [N, C, H, W], a list of such or of images [C, H, W], or an iterable of batches: images, or
            tuples, lists or mappings of which the first tensor is images.
        example: the network's input.

    Raises:
        TypeError: no tensor or iterable of tensors, or no floating ones.
        ValueError: no image, other channels than the example's, another number of dimensions, NaN or infinity.
    """
    wanted = f"images like the example's, {_shape(example)}"
    if calibrate is None:
        raise ValueError(f"calibrate: got None, expected {wanted}: dtype='int8' needs to see what the network works on")
    if isinstance(calibrate, str | bytes) or not isinstance(calibrate, Tensor | Iterable):
        got = type(calibrate).__name__
        raise TypeError(f"calibrate: got {got}, expected a tensor of images, a list of them or an iterable of batches")
    found: list[Tensor] = []
    count = 0
    for place, item in enumerate([calibrate] if isinstance(calibrate, Tensor) else calibrate):
        name = "calibrate" if isinstance(calibrate, Tensor) else f"calibrate: batch {place}"
        images = _checked(name, item, example, wanted)[: MOST - count]
        count += len(images)
        found += [part for part in images.split(AT_A_TIME) if len(part)]
        if count >= MOST:
            break
    if not count:
        raise ValueError(f"calibrate: got no image, expected {wanted}")
    return found


def _checked(name: str, item: Any, example: Tensor, wanted: str) -> Tensor:
    """The images of a batch, float32 [N, C, H, W]."""
    given = item
    if isinstance(item, Mapping):
        given = next((t for t in item.values() if isinstance(t, Tensor)), None)
    elif isinstance(item, Sequence) and len(item):
        given = item[0]
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: got {type(item).__name__}, expected {wanted}")
    if not given.is_floating_point():
        raise TypeError(f"{name}: got {given.dtype}, expected floating images, as the network takes them")
    images = given.detach()
    if images.ndim == example.ndim - 1:
        images = images[None]
    if images.ndim != example.ndim or images.shape[1:2] != example.shape[1:2]:
        raise ValueError(f"{name}: got {_shape(given)}, expected {wanted}")
    images = images.to("cpu", torch.float32, copy=True)
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"{name}: got NaN or infinity, expected finite images")
    return images


def _shape(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


# ---- the network on them ---------------------------------------------------------------------------------------------


class Runs:
    """Runs a graph on inputs, and gives what each step wrote: by the fast calls, lowered once for each signature."""

    def __init__(self, graph: Graph, constants: Sequence[Tensor]) -> None:
        self.graph, self.constants = graph, constants
        self._lowered: dict[Any, Lowered] = {}

    def each(self, inputs: Sequence[Tensor]) -> Iterator[tuple[int, Any]]:
        """Every slot that holds an input or what a step has made of it, with its value."""
        key = tuple((t.shape, t.stride(), t.dtype) for t in inputs)
        if key not in self._lowered:
            self._lowered[key] = lower(self.graph, inputs, self.constants, Plan())
        lowered = self._lowered[key]
        views = lowered.places.views(torch.empty(lowered.places.size, dtype=torch.uint8))
        values: list[Any] = [*inputs, *self.constants, *[None] * len(self.graph.steps), *views]
        yield from enumerate(inputs)
        for call in lowered.calls:
            run(call, values)
            yield call.writes, values[call.writes]
            for slot in call.frees:
                values[slot] = None


def observe(runs: Runs, batches: Sequence[Sequence[Tensor]], observer: str) -> Recipe:
    """The recipe of a network, every layer on integers.

    Args:
        runs: of the network in float32.
        batches: the network's inputs, a few images each.
        observer: see observers.py.
    """
    graph = runs.graph
    kinds = {slot: getattr(value, "ndim", 0) for slot, value in runs.each(batches[0]) if _is_floating(value)}
    floating = frozenset(kinds)
    vectors, images = (frozenset(slot for slot, dims in kinds.items() if dims == n) for n in (2, 4))
    root = joined(graph, floating)
    wanted = _wanted(graph, root)
    watched = {slot for slot in floating if root[slot] in wanted and kinds[slot] > 0}
    ends: dict[int, list[float]] = {root[slot]: [math.inf, -math.inf] for slot in watched}
    sources = {place: graph.steps[place].args[0].index for place in layers(graph)}
    inputs = {slot for slot in sources.values() if kinds.get(slot, 0) in (2, 4)}
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for batch in batches:
        for slot, value in runs.each(batch):
            if slot in watched and value.numel():
                low, high = (float(end) for end in value.aminmax())
                own = ends[root[slot]]
                finite = math.isfinite(low) and math.isfinite(high)
                own[:] = (min(own[0], low), max(own[1], high)) if finite else (-math.inf, math.inf)
            if slot in inputs:
                dims = [d for d in range(value.ndim) if d != 1]
                sums[slot] = sums.get(slot, torch.zeros(value.shape[1], dtype=torch.float64)) + value.double().sum(dims)
                counts[slot] = counts.get(slot, 0) + value.numel() // max(value.shape[1], 1)
    usable = {at: (low, high) for at, (low, high) in ends.items() if math.isfinite(low) and math.isfinite(high)}
    histograms = {at: torch.zeros(BINS) for at in usable}
    if observer != "minmax":
        for batch in batches:
            for slot, value in runs.each(batch):
                at = root.get(slot)
                if slot in watched and at in histograms and usable[at][1] > usable[at][0]:
                    histograms[at] += torch.histc(value, BINS, *usable[at])
    found = {at: find_range(histograms[at], *usable[at], observer) for at in usable}
    ranges = {slot: found[root[slot]] for slot in sorted(floating) if root[slot] in found}
    means = {slot: (sums[slot] / max(counts[slot], 1)).float() for slot in sums}
    return Recipe(steps_of(graph), ranges, means, floating, vectors, images, {}, weight_limit())


def _wanted(graph: Graph, root: Mapping[int, int]) -> set[int]:
    """The slots that layers and means read and write, by the one that stands for each."""
    found: set[int] = set()
    taken = set(layers(graph))
    for place, step in enumerate(graph.steps):
        if place in taken or is_mean(step):
            read = [step.args[0], step.args[3] if place in taken and len(step.args) > 9 else None]
            found |= {slot.index for slot in read if isinstance(slot, Slot)} | {step.writes}
    return {root[slot] for slot in found if slot in root}


def _is_floating(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return bool(value) and all(_is_floating(item) for item in value)
    return isinstance(value, Tensor) and value.dtype is torch.float32
