"""Quantizing a finished Graph: layers on 8-bit integers, with what has to be converted between.

    layer      conv_act, stem and linear with constant weights become conv_int8, int8 weights with a scale a channel
    mover      max-pool, concatenation and views do not compute: they run on uint8, what they join has one scale
    mean       a global average pool reads uint8 and has a scale of its own
    the rest   runs in float32; each change of type is one step, on the way to the first reader that wants it

A Recipe has what calibration found (scales, means) and which layers stay in floating point, by their places in the
graph before. The same recipe serves every graph with the same steps: other image sizes, and refreshed weights.

    bias'      = bias + sum over c, r, s of (w - scale_k * w_int8) * E[x_c]      E[x_c]: mean of an input channel

Source: Jacob et al. 2018 (integer arithmetic); Nagel et al. 2019, section 4.2 (bias correction from means).
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.graph.recipe import (
    BFLOAT16,
    CONV,
    FLOAT,
    IMAGE,
    INT8,
    LINEAR,
    POOL,
    SIZES,
    STEM,
    Range,
    Recipe,
    is_mean,
    layers,
    movers,
    pair,
)
from fastres.graph.rewrite import Rewritten
from fastres.graph.steps import Graph, Slot, Step, filled, freed, slots_in

aten = torch.ops.aten
_ours: Any = torch.ops.fastres
_LEAST = 1e-30  # a channel whose weights are smaller is dead


# ---- weights ---------------------------------------------------------------------------------------------------------


def quantize_weight(weight: Tensor, limit: int = 127) -> tuple[Tensor, Tensor]:
    """int8 weights and their scales, float32 [K], each channel's largest weight at the limit; a dead channel's are 0.

    Args:
        weight: [K, ...], floating.
    """
    exact = weight.detach().double().flatten(1)  # [K, C / groups * R * S]
    largest = exact.abs().amax(1) if exact.shape[1] else exact.new_zeros(len(exact))
    scale = torch.where(largest > _LEAST, largest / limit, 1.0).float()
    q = torch.round(exact / scale.double()[:, None]).clamp_(-limit, limit).to(torch.int8)
    return q.view(weight.shape), scale


def corrected_bias(
    weight: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, mean: Tensor | None, groups: int
) -> Tensor:
    """The bias, float32 [K], with the mean error of the rounded weights taken off.

    Args:
        weight: [K, C / groups, R, S], q: likewise, int8; scale: [K].
        mean: [C], of the input; None leaves the bias as it is.
    """
    given = torch.zeros(len(scale), dtype=torch.float64) if bias is None else bias.detach().double()
    if mean is None:
        return given.float()
    lost = weight.detach().double() - q.double() * scale.double().view(-1, *[1] * (weight.ndim - 1))
    lost = lost.flatten(2).sum(2)  # [K, C / groups]
    by_group = mean.double().view(groups, -1)  # [groups, C / groups]
    off = torch.einsum("gkc,gc->gk", lost.view(groups, -1, lost.shape[1]), by_group).reshape(-1)  # [K]
    return (given + off).float()


# ---- the pass --------------------------------------------------------------------------------------------------------


class Quantized(NamedTuple):
    """A network on 8-bit integers.

    `taken` are the layers of the old graph that are; `written` has the slot in the new graph of each step of the old
    one, and its range where that holds integers.
    """

    made: Rewritten
    taken: frozenset[int]
    written: dict[int, tuple[int, Range | None]]


Weights = dict[Any, tuple[Tensor, Tensor, Tensor]]  # of a layer: int8 weight, scales, bias


def quantize(made: Rewritten, recipe: Recipe, known: Weights | None = None) -> Quantized:
    """The network of `made` on 8-bit integers, as `recipe` says.

    Args:
        known: its layers' quantized weights, by the slot that each writes; what is missing is put there.

    Raises:
        ValueError: the recipe is of another graph.
    """
    if not recipe.fits(made.graph):
        raise ValueError("recipe: it is of a network with other steps")
    return _Writer(made, recipe, {} if known is None else known).run()


class _Writer:
    """Writes the new steps one after another; a slot of the old graph has up to four forms in the new one."""

    def __init__(self, made: Rewritten, recipe: Recipe, known: Weights) -> None:
        self.known = known
        self.old, self.tensors, self.recipe = made.graph, made.constants, recipe
        self.rows = made.rows
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = []
        self.constants: dict[str, Tensor] = {}
        self.made_of: dict[str, str] = {}
        self.forms: dict[int, dict[str, Slot]] = {slot: {FLOAT: Slot(slot)} for slot in range(self.old.inputs)}
        self.taken = {p for p in layers(self.old) if recipe.kept.get(p, "") == "" and self._has_ranges(p)}
        self.movers = movers(self.old)
        self.wants = self._wants()

    def _has_ranges(self, place: int) -> bool:
        step, ranges = self.old.steps[place], self.recipe.ranges
        constants = [s.index - self.old.first_constant for s in step.args[1:3] if isinstance(s, Slot)]
        if not all(bool(self.tensors[self.old.constants[i]].isfinite().all()) for i in constants):
            return False  # integers have no NaN
        if step.operator is LINEAR and step.args[0].index not in self.recipe.vectors:
            return False  # a product along the last of more dimensions
        needed = [step.args[0].index] + ([step.args[3].index] if self._residual(step) is not None else [])
        return all(slot in ranges for slot in needed) and (step.writes in ranges or step.operator is LINEAR)

    @staticmethod
    def _residual(step: Step) -> Slot | None:
        return step.args[3] if step.operator is CONV else None

    def _wants(self) -> set[int]:
        """The slots that some reader wants on integers."""
        wanted: set[int] = set()
        producer = {step.writes: place for place, step in enumerate(self.old.steps)}
        for place, step in reversed(list(enumerate(self.old.steps))):
            if place in self.taken:
                wanted.add(step.args[0].index)
                residual = self._residual(step)
                wanted |= set() if residual is None else {residual.index}
            elif place in self.movers and step.writes in wanted:
                wanted |= {slot for slot in step.reads if slot in self.recipe.floating}
            elif self._mean_on_integers(step, producer):
                wanted.add(step.args[0].index)
        return wanted

    def _mean_on_integers(self, step: Step, producer: Mapping[int, int]) -> bool:
        """Tell whether a global average pool reads what a quantized layer has written, perhaps moved."""
        if not is_mean(step) or not isinstance(step.args[0], Slot) or step.args[0].index not in self.recipe.images:
            return False
        at = producer.get(step.args[0].index)
        while at is not None and at in self.movers:
            reads = [slot for slot in self.old.steps[at].reads if slot in self.recipe.floating]
            at = producer.get(reads[0]) if reads else None
        return at is not None and at in self.taken and step.args[0].index in self.recipe.ranges

    def run(self) -> Quantized:
        producer = {step.writes: place for place, step in enumerate(self.old.steps)}
        for place, step in enumerate(self.old.steps):
            if place in self.taken:
                self._layer(step)
            elif place in self.movers and self._moves_integers(step):
                self._move(step)
            elif self._mean_on_integers(step, producer):
                self._mean(step)
            elif self.recipe.kept.get(place) == BFLOAT16:
                self._in_bfloat16(step)
            else:
                self._as_it_is(step)
        outputs = self._spelled(self.old.outputs)
        return self._finished(outputs)

    def _moves_integers(self, step: Step) -> bool:
        if step.operator is getitem:  # as its parts are
            return INT8 in self.forms.get(step.args[0].index, {})
        return step.writes in self.wants and step.writes in self.recipe.ranges

    # ---- forms of a slot

    def _call(self, operator: Any, args: tuple[Any, ...], name: str = "", **kwargs: Any) -> Slot:
        self.steps.append((operator, args, kwargs, name))
        return Slot(-len(self.steps))  # numbered at the end

    def _float(self, slot: int) -> Slot:
        """The slot as it was: float32, or what is no floating tensor at all."""
        if self.old.first_constant <= slot < self.old.first_result:
            name = self.old.constants[slot - self.old.first_constant]
            return self._constant(name, self.tensors[name], self.old.made_of.get(name, ""))
        forms = self.forms[slot]
        if FLOAT not in forms:
            if INT8 in forms or IMAGE in forms:
                q = forms[INT8] if INT8 in forms else self._int8(slot)
                forms[FLOAT] = self._call(_ours.dequantize.default, (q, *self.recipe.ranges[slot], torch.float32))
            else:
                forms[FLOAT] = self._call(aten._to_copy.default, (forms[BFLOAT16],), dtype=torch.float32)
        return forms[FLOAT]

    def _int8(self, slot: int) -> Slot:
        forms = self.forms.setdefault(slot, {})
        if INT8 not in forms:
            if IMAGE in forms:
                forms[INT8] = self._call(aten.flatten.using_ints, (forms[IMAGE], 1))
            else:
                source = forms[BFLOAT16] if BFLOAT16 in forms and FLOAT not in forms else self._float(slot)
                forms[INT8] = self._call(_ours.quantize.default, (source, *self.recipe.ranges[slot]))
        return forms[INT8]

    def _image(self, slot: int) -> Slot:
        """uint8 [N, C, 1, 1] of a slot [N, C]."""
        forms = self.forms.setdefault(slot, {})
        if IMAGE not in forms:
            row = self._call(aten.unsqueeze.default, (self._int8(slot), 2))
            forms[IMAGE] = self._call(aten.unsqueeze.default, (row, 3))
        return forms[IMAGE]

    def _bfloat16(self, slot: int) -> Slot:
        forms = self.forms.setdefault(slot, {})
        if BFLOAT16 not in forms:
            if INT8 in forms:
                args = forms[INT8], *self.recipe.ranges[slot], torch.bfloat16
                forms[BFLOAT16] = self._call(_ours.dequantize.default, args)
            else:
                forms[BFLOAT16] = self._call(aten._to_copy.default, (self._float(slot),), dtype=torch.bfloat16)
        return forms[BFLOAT16]

    def _spelled(self, value: Any) -> Any:
        return filled(value, {slot.index: self._float(slot.index) for slot in slots_in(value)})

    def _constant(self, name: str, t: Tensor, made_of: str) -> Slot:
        """The constant of this name, or of the next one that is free where another tensor has it."""
        count, candidate = 1, name
        while candidate in self.constants and self.made_of[candidate] != made_of:
            count += 1
            candidate = f"{name}_{count}"
        self.constants.setdefault(candidate, t)
        self.made_of.setdefault(candidate, made_of)
        return Slot(self.old.size + list(self.constants).index(candidate))  # numbered at the end

    # ---- steps

    def _layer(self, step: Step) -> None:
        linear, stem = step.operator is LINEAR, step.operator is STEM
        x, weight, bias = (*step.args, None)[:3]
        residual = self._residual(step)
        if linear:
            where: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], 1)
            act = "none"
        else:
            where, act = (step.args[3:7], step.args[7]) if stem else (step.args[5:9], step.args[9])
        ranges = self.recipe.ranges
        wide = step.writes not in self.wants and residual is None and not stem
        first = self._alone_reads_an_input(step) and residual is None
        source = self._image(x.index) if linear else self._float(x.index) if first else self._int8(x.index)
        other = None if residual is None else self._int8(residual.index)
        out = (None, None) if wide else ranges[step.writes]
        args = (
            *(source, *self._weights(step, weight, bias, where[3]), other, *ranges[x.index]),
            *(ranges[residual.index] if residual is not None else (1.0, 0)),
            *where,
            *(act, *out),
        )
        if first:
            args = (*args[:4], *args[5:7], *args[9:])  # no residual
        y = self._call(_ours.quantize_conv_int8.default if first else _ours.conv_int8.default, args, step.name)
        if stem:
            y = self._call(_ours.max_pool_int8.default, (y, *step.args[8:11], [1, 1], False))
        if linear and wide:
            y = self._call(aten.flatten.using_ints, (y, 1))
        self.forms[step.writes] = {FLOAT if wide else IMAGE if linear else INT8: y}

    def _alone_reads_an_input(self, step: Step) -> bool:
        """Tell whether nothing but this convolution reads an input of the network."""
        slot = step.args[0].index
        if slot >= self.old.inputs:
            return False
        readers = [s for s in self.old.steps if slot in s.reads]
        outputs = {s.index for s in slots_in(self.old.outputs)}
        return step.operator is not LINEAR and len(readers) == 1 and slot not in outputs

    def _weights(self, step: Step, weight: Slot, bias: Slot | None, groups: int) -> tuple[Slot, Slot, Slot]:
        """The constants of a layer: int8 weight, scales, bias."""
        names = [None if t is None else self.old.constants[t.index - self.old.first_constant] for t in (weight, bias)]
        assert names[0] is not None
        limit = self.recipe.limit
        if step.writes not in self.known:
            t, mean = self.tensors[names[0]], self.recipe.means.get(step.args[0].index)
            t = t[:, :, None, None] if t.ndim == 2 else t  # [K, C / groups, R, S]
            given = None if names[1] is None else self.tensors[names[1]]
            made = quantize_weight(t, limit)
            self.known[step.writes] = *made, corrected_bias(t, *made, given, mean, groups)
        q, scale, shift = self.known[step.writes]
        of, also = (self.old.made_of.get(name or "", name or "") for name in names)
        path = names[0].removesuffix("weight")
        return (
            self._constant(f"{path}weight_int8", q, f"{of} int8 {limit} {list(q.shape)}"),
            self._constant(f"{path}scale_int8", scale, f"{of} int8 {limit} scale"),
            self._constant(f"{path}bias_int8", shift, f"{of} {also} int8 {limit} bias behind {step.args[0]}"),
        )

    def _move(self, step: Step) -> None:
        floating = self.recipe.floating
        slots = {s.index: s.index for s in slots_in((step.args, step.kwargs))}
        found = {s: self._int8(s) if s in floating else self._float(s) for s in slots}
        args, kwargs = filled(step.args, found), filled(step.kwargs, found)
        if step.operator is POOL:
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            given: dict[str, Any] = dict(zip(names, args[1:], strict=False)) | kwargs
            kernel = given["kernel_size"]
            window = [kernel, given.get("stride") or kernel, given.get("padding", 0), given.get("dilation", 1)]
            pairs = [list(pair(part)) for part in window]
            y = self._call(_ours.max_pool_int8.default, (args[0], *pairs, bool(given.get("ceil_mode"))), step.name)
        elif step.operator is aten.pad.default:
            zero = float(self.recipe.ranges[step.writes].zero_point)
            y = self._call(step.operator, (*args[:2], "constant", zero), step.name)
        else:
            y = self._call(step.operator, args, step.name, **kwargs)
        self.forms[step.writes] = {INT8: y}

    def _mean(self, step: Step) -> None:
        x = step.args[0].index
        wide = step.writes not in self.wants or step.writes not in self.recipe.ranges
        out = (None, None) if wide else self.recipe.ranges[step.writes]
        y = self._call(_ours.mean_int8.default, (self._int8(x), *self.recipe.ranges[x], *out), step.name)
        keeps = step.operator is aten.adaptive_avg_pool2d.default or bool(
            step.args[2] if len(step.args) > 2 else step.kwargs.get("keepdim", False)
        )
        if keeps:
            self.forms[step.writes] = {FLOAT if wide else INT8: y}
        elif wide:
            self.forms[step.writes] = {FLOAT: self._call(aten.flatten.using_ints, (y, 1))}
        else:
            self.forms[step.writes] = {IMAGE: y}

    def _in_bfloat16(self, step: Step) -> None:
        found: dict[int, Slot] = {}
        for slot in step.reads:
            if self.old.first_constant <= slot < self.old.first_result:
                name = self.old.constants[slot - self.old.first_constant]
                t, of = self.tensors[name].to(torch.bfloat16), self.old.made_of.get(name, "")
                found[slot] = self._constant(f"{name}_bfloat16", t, f"{of} bfloat16")
            else:
                found[slot] = self._bfloat16(slot)
        y = self._call(step.operator, filled(step.args, found), step.name, **filled(step.kwargs, found))
        self.forms[step.writes] = {BFLOAT16: y}

    def _as_it_is(self, step: Step) -> None:
        def form(slot: int) -> Slot:
            forms = self.forms.get(slot, {})
            if step.operator in SIZES and FLOAT not in forms and (INT8 in forms or BFLOAT16 in forms):
                return forms.get(INT8) or forms[BFLOAT16]
            return self._float(slot)

        found = {slot: form(slot) for slot in step.reads}
        y = self._call(step.operator, filled(step.args, found), step.name, **filled(step.kwargs, found))
        self.forms[step.writes] = {FLOAT: y}

    # ---- the end

    def _finished(self, outputs: Any) -> Quantized:
        names, inputs = list(self.constants), self.old.inputs
        first = inputs + len(names)

        def place(slot: int) -> Slot:
            if slot < 0:
                return Slot(first - slot - 1)
            return Slot(slot if slot < inputs else inputs + slot - self.old.size)

        def numbered(value: Any) -> Any:
            return filled(value, {slot.index: place(slot.index) for slot in slots_in(value)})

        steps = [
            Step(operator, numbered(args), numbered(kwargs), first + i, (), name)
            for i, (operator, args, kwargs, name) in enumerate(self.steps)
        ]
        graph = freed(Graph(inputs, tuple(names), steps, numbered(outputs), dict(self.made_of)))
        graph.check()
        written: dict[int, tuple[int, Range | None]] = {}
        for at, step in enumerate(self.old.steps):
            forms = self.forms[step.writes]
            name = next((name for name in (INT8, IMAGE) if name in forms), "")
            slot = forms[name] if name else next(iter(forms.values()))
            written[at] = place(slot.index).index, self.recipe.ranges[step.writes] if name else None
        return Quantized(Rewritten(graph, self.constants, self.rows), frozenset(self.taken), written)
