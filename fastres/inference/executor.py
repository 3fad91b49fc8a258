"""The executor: a loop over the list of a network's operator calls, lowered once for each input signature.

exact    a call whose input is not finite takes a plan of its own, of calls that pass NaN as eager's do; a network on
         integers, which hold no NaN, gives NaN for those images
traced   under torch.export, torch.compile and torch.jit.trace the steps run stock operators, as they are written
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres._dispatch import Choices, operator_of
from fastres._stamp import Stamp
from fastres.graph import export
from fastres.graph.recipe import is_quantized
from fastres.graph.steps import Graph, filled
from fastres.inference.arena import Arenas, Places
from fastres.inference.lower import Call, lower
from fastres.inference.plan import Plan
from fastres.ops._int8_quantize import load_stock_operators

logger = logging.getLogger("fastres")

_PLANS = 64  # signatures that an executor keeps a plan for
_HELD = 5, 64 << 20  # times the bytes of the constants, and bytes: what plans may hold beside them


@dataclass(eq=False)
class _Lowered:
    calls: list[Call]
    constants: Sequence[Tensor]  # that the calls hold
    stamp: Stamp
    ways: dict[int, str]
    held: list[Tensor]  # packed and transformed weights; plans share those that are equal
    places: Places
    used: int = 0  # in the order of use


def _bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors take; each once."""
    unique = {id(t): t for t in tensors}.values()
    return sum(torch.ops.mkldnn._nbytes(t) if t.is_mkldnn else t.numel() * t.element_size() for t in unique)


def is_traced(*tensors: Any) -> bool:
    """Tell whether a compiler, an exporter or a dispatch mode follows this thread's calls.

    Not by `torch.compiler.is_compiling()`, which an export in another thread makes true.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return bool(
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or any(isinstance(t, Tensor) and type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    )


class Executor:
    """Runs one Graph. A deep copy or a pickle has no plans: they hold tensors of the model that it belongs to.

    Args:
        graph: the network.
        plan: the ways to take.
        exact: every call is to pass NaN as eager's do.
    """

    def __init__(self, graph: Graph, plan: Plan | None = None, exact: bool = False) -> None:
        self.graph, self.plan, self.exact = graph, plan or Plan(), exact
        self._plans: dict[Any, _Lowered] = {}
        self._arenas = Arenas()
        self._clock = itertools.count(1)
        self._warned = False
        self.quantized = is_quantized(graph)
        if self.quantized:
            load_stock_operators()
        self._stock = [(stock_of(step.operator), step.args, step.kwargs, step.writes) for step in graph.steps]

    def __deepcopy__(self, memo: dict[int, Any]) -> Executor:
        return Executor(self.graph, copy.deepcopy(self.plan, memo), self.exact)

    def __reduce__(self) -> Any:
        return Executor, (self.graph, self.plan, self.exact)

    def forget(self) -> None:
        """Let go of every plan, and with it of packed weights and planned memory."""
        self._plans, self._arenas = {}, Arenas()

    def run(self, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Any]:
        """The outputs, in the order of the graph's, without gradients.

        Args:
            inputs: as many as the graph has.
            constants: in the order of the graph's; the tensors themselves, as they are now.
        """
        finite = not _is_not_finite(inputs)
        if self.quantized and not finite:
            return self._run_beside_nan(inputs, constants)
        return self._run(inputs, constants, self.exact or not finite)

    def _run_beside_nan(self, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Any]:
        """The outputs of a network on integers, which hold no NaN: the rows of images that are not finite are NaN."""
        clean = [torch.where(torch.isfinite(t), t, 0) if t.is_floating_point() else t for t in inputs]
        bad = [~torch.isfinite(t).flatten(1).all(1) for t in inputs if t.is_floating_point() and t.ndim]  # [N] each
        rows = bad[0] if len(bad) == 1 else None
        outputs = self._run(clean, constants, self.exact)
        for place, y in enumerate(outputs):
            if isinstance(y, Tensor) and y.is_floating_point() and any(bool(t.any()) for t in bad):
                apart = rows is not None and y.ndim > 0 and len(y) == len(rows)
                mask = rows.view(-1, *[1] * (y.ndim - 1)) if apart and rows is not None else torch.tensor(True)
                outputs[place] = y.masked_fill(mask, math.nan)
        return outputs

    def _run(self, inputs: Sequence[Tensor], constants: Sequence[Tensor], exact: bool) -> list[Any]:
        with torch.no_grad():
            key = self._key(inputs, exact)
            plan = self._plans.get(key)
            if plan is None or not all(map(operator.is_, plan.constants, constants)) or not plan.stamp.holds():
                return self._prepare(key, exact, inputs, constants)
            plan.used = next(self._clock)
            arena, views = self._arenas.take(plan, plan.places)
            values: list[Any] = [*inputs, *constants, *[None] * len(self.graph.steps), *views]
            for function, template, slots, writes, frees in plan.calls:
                args = list(template)
                for place, slot in slots:
                    args[place] = values[slot]
                values[writes] = function(*args)
                for slot in frees:
                    values[slot] = None
            self._arenas.give_back(arena)
            values[self.graph.first_constant : self.graph.first_result] = constants  # one may be an output
            return list(filled(self.graph.outputs, values))

    def trace(self, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Any]:
        """The same by stock operators."""
        values: list[Any] = [*inputs, *constants, *[None] * len(self.graph.steps)]
        for function, args, kwargs, writes in self._stock:
            values[writes] = function(*filled(args, values), **filled(kwargs, values))
        return list(filled(self.graph.outputs, values))

    def ways(self, inputs: Sequence[Tensor]) -> dict[int, str]:
        """The way that calls like this one take at each step with a choice, by its place; empty before the first."""
        plan = self._plans.get(self._key(inputs, self.exact))
        return {} if plan is None else dict(plan.ways)

    def bytes_held(self, inputs: Sequence[Tensor]) -> int:
        """The bytes that calls like this one hold beside the constants: packed and transformed weights."""
        plan = self._plans.get(self._key(inputs, self.exact))
        return 0 if plan is None else _bytes(plan.held)

    def find_choices(self, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[tuple[Choices, list[Any]]]:
        """The choices that a call on these inputs has, alike ones once, with arguments to try the ways on."""
        with export.LOCK, torch.inference_mode(False), torch.no_grad():
            found = lower(self.graph, inputs, constants, self.plan, self.exact, keep_choices=True)
        return list(found.choices.values())

    def keys(self, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> dict[int, str]:
        """The keys of those choices, by the places of their steps."""
        with export.LOCK, torch.inference_mode(False), torch.no_grad():
            return lower(self.graph, inputs, constants, self.plan, self.exact).keys

    def _key(self, inputs: Sequence[Tensor], exact: bool) -> Any:
        return exact, *[(t.shape, t.stride(), t.dtype) for t in inputs]

    def _prepare(self, key: Any, exact: bool, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Any]:
        """Run the steps, and keep what they came to as the plan of this signature."""
        with export.LOCK, torch.inference_mode(False), torch.no_grad():  # in this order: the first enables gradients
            stamp = Stamp(dict(enumerate(constants)))
            found = lower(self.graph, inputs, constants, self.plan, exact)
            plan = _Lowered(found.calls, constants, stamp, found.ways, found.held, found.places, next(self._clock))
            self._plans = self._within_bounds({**self._plans, key: plan}, constants)  # replaced: other threads read it
        return found.outputs

    def _within_bounds(self, plans: dict[Any, _Lowered], constants: Sequence[Tensor]) -> dict[Any, _Lowered]:
        """The plans, without those used longest ago that are too many or hold too much."""
        own = self.plan.max_weights
        bound = _HELD[0] * _bytes(constants) + _HELD[1] if own is None else own
        latest = sorted(plans.items(), key=lambda item: item[1].used)
        while len(latest) > 1 and (len(latest) > _PLANS or _bytes(t for _, p in latest for t in p.held) > bound):
            latest.pop(0)
            if not self._warned:
                self._warned = True
                logger.warning(
                    "frozen: inputs of more than %d signatures take turns; packed weights for the one used longest ago "
                    "go, and are made again when it comes back. Fewer image and batch sizes are faster",
                    len(latest),
                )
        return dict(latest)


def stock_of(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, or for one of ours the stock operators that compute the same."""
    ours = operator_of(operator)
    return operator if ours is None or ours.stock is None else ours.stock


def _is_not_finite(inputs: Sequence[Tensor]) -> bool:
    """Tell whether a tensor on a CPU is not finite: its sum is not then (nor is, rarely, a finite one's: no harm)."""
    return any(
        t.is_floating_point() and t.device.type == "cpu" and not math.isfinite(float(t.detach().sum())) for t in inputs
    )
