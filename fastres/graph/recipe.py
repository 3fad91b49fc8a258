"""A Recipe: what calibration found of a network, and the questions about a graph that it and the quantizing share.

layer   a step with weights that can run on integers
mover   a step that computes nothing: its output has its inputs' scale
mean    a global average pool
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.graph.steps import Graph, Slot, Step, operator_name, slots_in

aten = torch.ops.aten
_ours: Any = torch.ops.fastres
CONV, STEM, LINEAR = _ours.conv_act.default, _ours.stem.default, aten.linear.default
POOL = aten.max_pool2d.default
_VIEWS = {
    *(aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int),
    *(aten.slice.Tensor, aten.select.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.contiguous.default, aten.clone.default),
    *(aten.channel_shuffle.default, aten.pixel_shuffle.default, aten.cat.default, getitem),
}
_SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
SIZES = {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default}
FLOAT, BFLOAT16, INT8, IMAGE = "float32", "bfloat16", "int8", "image"  # forms; IMAGE: uint8 [N, C, 1, 1] of [N, C]


class Range(NamedTuple):
    """The numbers that 0..255 stand for: (q - zero_point) * scale."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Recipe:
    """A plan of how a network is quantized.

    Attributes:
        steps: the names of the graph's operators, which the places and slots below are of.
        ranges: of each slot that may be quantized; slots that movers join have the same.
        means: [C] of the inputs of layers: the mean of each channel.
        floating: the slots that hold float32 tensors, or lists of them.
        vectors: those that hold [N, C].
        images: those that hold [N, C, H, W].
        kept: the layers, by place, that stay in "float32" or "bfloat16".
        limit: the largest weight; 127, or 64 on a CPU without VNNI.
    """

    steps: tuple[str, ...]
    ranges: dict[int, Range]
    means: dict[int, Tensor]
    floating: frozenset[int]
    vectors: frozenset[int]
    images: frozenset[int]
    kept: dict[int, str] = field(default_factory=dict)
    limit: int = 127

    def fits(self, graph: Graph) -> bool:
        """Tell whether a graph has these steps."""
        return self.steps == steps_of(graph)

    def keeping(self, kept: Mapping[int, str]) -> Recipe:
        """The same with other layers in floating point."""
        return replace(self, kept=dict(kept))


def steps_of(graph: Graph) -> tuple[str, ...]:
    """The lines that a recipe recognizes a graph by."""
    return tuple(f"{operator_name(step.operator)} {step.reads} {step.name}" for step in graph.steps)


# ---- questions about a graph -----------------------------------------------------------------------------------------


def layers(graph: Graph) -> list[int]:
    """The places of the steps with weights that can run on integers."""
    return [place for place, step in enumerate(graph.steps) if why_not_layer(step, graph) == ""]


def why_not_layer(step: Step, graph: Graph) -> str | None:
    """Say why a convolution or a product with a matrix stays in float32; empty where it can be quantized.

    None for a step that is neither.
    """
    if step.operator not in (CONV, STEM, LINEAR):
        return None
    x, weight, bias = (*step.args, None)[:3]
    if not isinstance(x, Slot) or _is_constant(x, graph):
        return "its input is a constant"
    if not _is_constant(weight, graph) or not (bias is None or _is_constant(bias, graph)):
        return "its weight is no constant"
    if step.operator is LINEAR:
        return ""
    where = step.args[3:7] if step.operator is STEM else step.args[5:9]
    if not all(type(n) is int for part in where for n in (part if isinstance(part, tuple | list) else [part])):
        return "its geometry depends on the input"
    if step.operator is CONV:
        residual, scale, act = step.args[3], step.args[4], step.args[9]
        if scale is not None:
            return "it has a scale in float32"
        if residual is not None and act not in ("none", "relu"):
            return f"no int8 kernel adds a residual before {act}"
    return ""


def is_mean(step: Step) -> bool:
    """Tell whether a step is a global average pool, if it reads images."""
    if step.operator is aten.adaptive_avg_pool2d.default:
        return list(pair(step.args[1])) == [1, 1]
    if step.operator is not aten.mean.dim or step.kwargs.get("dtype") is not None or len(step.args) > 3:
        return False
    dims = step.args[1]
    return isinstance(dims, tuple | list) and sorted(d % 4 if isinstance(d, int) else -1 for d in dims) == [2, 3]


def movers(graph: Graph) -> frozenset[int]:
    """The places of the steps that only move numbers: their outputs have their inputs' scale."""
    found: set[int] = set()
    lists: set[int] = set()  # slots that hold the parts of one tensor
    for place, step in enumerate(graph.steps):
        if any(graph.first_constant <= slot < graph.first_result for slot in step.reads):
            continue  # a constant has no range
        if step.operator is getitem:
            if not lists.intersection(step.reads):
                continue
        elif step.operator is not POOL and step.operator not in _VIEWS and not _pads_with_zero(step):
            continue
        if step.operator in _SPLITS:
            lists.add(step.writes)
        found.add(place)
    return frozenset(found)


def _pads_with_zero(step: Step) -> bool:
    """Tell whether a step pads with zeros, which the zero point stands for: a projection-free shortcut does."""
    if step.operator is not aten.pad.default:
        return False
    mode, value = (*step.args[2:], *("constant", None)[len(step.args[2:]) :])[:2]
    return not step.kwargs and mode == "constant" and value in (None, 0)


def joined(graph: Graph, floating: frozenset[int]) -> dict[int, int]:
    """Each floating slot -> one slot that stands for all that movers join with it."""
    root = {slot: slot for slot in floating}

    def find(slot: int) -> int:
        while root[slot] != slot:
            slot = root[slot]
        return slot

    for place in movers(graph):
        step = graph.steps[place]
        if step.writes in floating:
            for slot in step.reads:
                if slot in floating:
                    root[find(slot)] = find(step.writes)
    return {slot: find(slot) for slot in floating}


def _is_constant(value: Any, graph: Graph) -> bool:
    return isinstance(value, Slot) and graph.first_constant <= value.index < graph.first_result


def pair(value: Any) -> Any:
    return value if isinstance(value, tuple | list) else (value, value)


def is_quantized(graph: Graph) -> bool:
    """Tell whether a graph has a layer on integers."""
    return any(step.operator in (_ours.conv_int8.default, _ours.quantize_conv_int8.default) for step in graph.steps)


def quantizes_inputs(graph: Graph) -> bool:
    """Tell whether its inputs are quantized, and nothing else reads them: they may come in any layout."""
    readers = [step for step in graph.steps if any(slot < graph.inputs for slot in step.reads)]
    whole = not any(slot.index < graph.inputs for slot in slots_in(graph.outputs))
    quantizing = (_ours.quantize.default, _ours.quantize_conv_int8.default)
    return whole and bool(readers) and all(step.operator in quantizing for step in readers)
