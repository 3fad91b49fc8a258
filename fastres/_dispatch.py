"""Backends of an operator: refusals as data, the choice among them, and its explanation.

A backend says why it cannot take a call as a list of sentences, empty when it can. `choose` takes the first backend, in
the operator's order for that device, that refuses nothing; a backend asked for by name either runs or raises with its
reasons. No operator is named here.

What refusals follow from is x's dtype and device, and for an operator with `kind` one more value, which that function
makes of a call's arguments: hashable, so that choices are remembered.

Environment, read at import and by `reload_environment`: `FASTRES_BACKEND` replaces "auto"; `FASTRES_DISABLE` is a
comma-separated list of backends never chosen ("all" leaves the reference alone).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

REFERENCE = "reference"
AUTO = "auto"


class BackendError(RuntimeError):
    """A backend asked for by name refuses the call; the message holds its reasons."""


@dataclass(frozen=True)
class Backend:
    """One way to run an operator: `why_not(x)`, or `why_not(x, kind)`, lists its refusals; the others return outputs.

    `native`: the operator's `_<op>_native` and `_<op>_backward_native` run it, which the fast path calls without the
    dispatcher. `signs_from_x`: its backward finds a ReLU's sign without the forward's output.
    """

    name: str
    why_not: Callable[..., list[str]]
    forward: Callable[..., Any]
    backward: Any = None  # a Callable; None for an operator whose gradients are other operators'
    native: bool = False
    signs_from_x: bool = False


@dataclass(frozen=True)
class Argument:
    """Stands for an argument of an operator's call, by its place, among those of a Prepared call."""

    place: int


OUTPUT = Argument(-1)  # the tensor that a call writes to


@dataclass(frozen=True)
class Prepared:
    """A call made ready for arguments alike: a function, and what it takes, with `Argument` for what differs.

    `instead`, where there is one, is the same call written over the tensor in the place `overwrites`. `into` is the
    same call, which writes to the tensor given as `OUTPUT`: one alike to what the call returns.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    overwrites: int | None = None
    instead: Prepared | None = None
    into: Prepared | None = None


@dataclass(frozen=True)
class Choices:
    """Ways to run one call, the default first.

    `key` is a line that is equal for calls alike; `ways` has by name what prepares each. A plan may bound two things:
    `tiles` has the ways that are Winograd's, with the side of their tile of outputs, and `holds` the bytes that a way
    keeps beside the weight.
    """

    key: str
    ways: dict[str, Callable[[], Prepared]]
    tiles: dict[str, int] = field(default_factory=dict)
    holds: dict[str, int] = field(default_factory=dict)

    def within(self, tile: int, room: float = math.inf) -> list[str]:
        """The ways with tiles of at most that side that keep at most `room` bytes."""
        return [way for way in self.ways if self.tiles.get(way, 0) <= tile and self.holds.get(way, 0) <= room]


@dataclass
class Operator:
    """An operator's backends and, per device type, the order in which "auto" tries them.

    `kind(x, *args, **kwargs)` is what refusals depend on besides x; `chosen` remembers choices. `measured(x, kind)`
    has the order for one call where it was measured, else nothing. `example(probe)` makes of a small tensor
    [1, 1, 1, 1] the arguments of an ordinary call in its dtype, on its device.

    For frozen networks, all three on the operator's own arguments: `call` runs it; `stock` does by PyTorch's operators
    alone, for exporters; `bind`, where it returns Choices, prepares a faster call, which may treat NaN otherwise;
    `images` gives the places of the arguments that hold images, each computed by itself: none where they are mixed.
    """

    name: str
    order: dict[str, tuple[str, ...]]
    backends: dict[str, Backend] = field(default_factory=dict)
    chosen: dict[tuple[Hashable, ...], Backend] = field(default_factory=dict)
    kind: Callable[..., Hashable] | None = None
    measured: Callable[..., tuple[str, ...]] = lambda x, *kind: ()
    example: Callable[[Tensor], tuple[Any, ...]] = lambda probe: (probe,)
    call: Callable[..., Any] | None = None
    stock: Callable[..., Any] | None = None
    bind: Callable[..., Choices | None] | None = None
    images: Callable[..., tuple[int, ...]] = lambda *args, **kwargs: ()

    def add(self, backend: Backend) -> None:
        self.backends[backend.name] = backend


@dataclass(frozen=True)
class Explanation:
    """Findings of `explain`: the chosen backend and every backend's refusals."""

    operator: str
    chosen: str
    refusals: dict[str, list[str]]

    def __str__(self) -> str:
        width = max(len(name) for name in self.refusals)
        lines = [f"{self.operator}: {self.chosen}"]
        for name, reasons in self.refusals.items():
            state = "chosen" if name == self.chosen else "; ".join(reasons) or "can"
            lines.append(f"  {name:<{width}}  {state}")
        return "\n".join(lines)


OPERATORS: dict[str, Operator] = {}


def operator_of(function: Any) -> Operator | None:
    """The operator whose overload `function` is, torch.ops.fastres.bn_act.default for one; None for other functions."""
    if not isinstance(function, torch._ops.OpOverload) or function.namespace != "fastres":
        return None
    return OPERATORS.get(function._schema.name.partition("::")[2])


def register(operator: Operator) -> Operator:
    """Makes an operator known to `explain` and `info`; its module calls this once."""
    OPERATORS[operator.name] = operator
    return operator


def check_name(backend: str, operator: Operator | None = None) -> None:
    """Raises ValueError unless `backend` is "auto" or a backend of `operator` (of any operator when None)."""
    operators = OPERATORS.values() if operator is None else [operator]
    known = {AUTO, *(name for op in operators for name in op.backends)}
    if backend not in known:
        raise ValueError(f"backend: got {backend!r}, expected one of {sorted(known)}")


@dataclass(frozen=True)
class Settings:
    """Choices asked for by the environment."""

    backend: str = AUTO
    disabled: frozenset[str] = frozenset()

    def disables(self, name: str) -> bool:
        return name != REFERENCE and (name in self.disabled or "all" in self.disabled)


def _from_environment() -> Settings:
    names = (part.strip() for part in os.environ.get("FASTRES_DISABLE", "").split(","))
    return Settings(os.environ.get("FASTRES_BACKEND") or AUTO, frozenset(name for name in names if name))


_settings = _from_environment()  # not at every call: reading the environment costs more than choosing


def settings() -> Settings:
    """Return what the environment asked for when it was last read: another object after each reading."""
    return _settings


def reload_environment() -> None:
    """Takes changes of FASTRES_BACKEND and FASTRES_DISABLE since import into account."""
    global _settings
    _settings = _from_environment()
    for operator in OPERATORS.values():
        operator.chosen.clear()


def environment_problem() -> str | None:
    """Say what is wrong with FASTRES_BACKEND or FASTRES_DISABLE; None when nothing is."""
    known = {name for op in OPERATORS.values() for name in op.backends}
    can_disable = known - {REFERENCE} | {"ext", "all"}
    unknown = sorted(_settings.disabled - can_disable)
    if _settings.backend not in known | {AUTO}:
        return f"FASTRES_BACKEND: got {_settings.backend!r}, expected one of {sorted(known | {AUTO})}"
    if unknown:
        return f"FASTRES_DISABLE: got {', '.join(map(repr, unknown))}, expected some of {sorted(can_disable)}"
    return None


def check_environment() -> None:
    """Raises ValueError if FASTRES_BACKEND or FASTRES_DISABLE, as last read, holds a name that nothing has.

    Asked by `swap` and whenever an operator chooses a backend for a new kind of call: at import the operators are not
    known yet.
    """
    problem = environment_problem()
    if problem is not None:
        raise ValueError(problem)


def refusals(backend: Backend, x: Tensor, *kind: Hashable) -> list[str]:
    """List why `backend` cannot take a call whose input is `x` (of this kind); empty when it can."""
    if _settings.disabled and _settings.disables(backend.name):
        return ["disabled by FASTRES_DISABLE"]
    return backend.why_not(x, *kind)


def ordinary_refusals(operator: Operator, backend: Backend, probe: Tensor) -> list[str]:
    """List why `backend` cannot take an ordinary call in `probe`'s dtype, on its device; empty when it can."""
    x, *others = operator.example(probe)
    kind = () if operator.kind is None else (operator.kind(x, *others),)
    return refusals(backend, x, *kind)


_CHOSEN = 4096  # choices that an operator remembers


def choose(operator: Operator, requested: str, x: Tensor, *kind: Hashable) -> Backend:
    """The backend that runs `operator` on `x` (a call of this kind).

    Raises:
        ValueError: `requested` names no backend of this operator, or the environment none of any.
        BackendError: `requested` names a backend that refuses.
    """
    key = (requested, x.dtype, x.device, *kind)
    backend = operator.chosen.get(key)
    if backend is None:
        if len(operator.chosen) >= _CHOSEN:  # kinds with sizes in them, of inputs that never repeat
            operator.chosen.clear()
        backend = operator.chosen[key] = _choose(operator, requested, x, *kind)
    return backend


def _choose(operator: Operator, requested: str, x: Tensor, *kind: Hashable) -> Backend:
    check_environment()
    if requested == AUTO:
        if _settings.backend in operator.backends:  # else other operators have it, and this one chooses for itself
            requested = _settings.backend
    if requested != AUTO:
        check_name(requested, operator)
        backend = operator.backends[requested]
        reasons = refusals(backend, x, *kind)
        if reasons:
            raise BackendError(f"{operator.name}: backend {requested!r} refuses: {'; '.join(reasons)}")
        return backend
    for name in operator.measured(x, *kind) or operator.order.get(x.device.type, ()):
        backend = operator.backends[name]
        if not refusals(backend, x, *kind):
            return backend
    return operator.backends[REFERENCE]


def check_stock(operator: Operator, requested: str) -> None:
    """Check the backend of a call that PyTorch's operators run: one in a transform of torch.func or forward-mode AD.

    Raises:
        ValueError: `requested` names no backend of this operator.
        BackendError: it names one other than the reference.
    """
    check_name(requested, operator)
    if requested not in (AUTO, REFERENCE):
        why = "PyTorch's operators alone run under torch.func's transforms and forward-mode differentiation"
        raise BackendError(f"{operator.name}: backend {requested!r} refuses: {why}")


def explain(operator: str, x: Tensor, *args: object, backend: str = AUTO, **kwargs: object) -> Explanation:
    """Say which backend would run `operator` on `x`, and why not the others.

    Args:
        operator: an operator's name, such as "bn_act".
        x: the operator's first tensor, [N, C, H, W]; further arguments are accepted, so that a call can be pasted.
        backend: as in the call.

    Raises:
        ValueError: no such operator or backend.
        TypeError: `x` is not a tensor.
        BackendError: the named backend refuses.

    Example:
        >>> import torch, fastres
        >>> fastres.explain("bn_act", torch.randn(2, 8, 4, 4, dtype=torch.float64)).chosen
        'reference'
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: got {operator!r}, expected one of {sorted(OPERATORS)}")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a Tensor")
    op = OPERATORS[operator]
    kind = () if op.kind is None else (op.kind(x, *args, **kwargs),)
    chosen = choose(op, backend, x, *kind)
    return Explanation(operator, chosen.name, {name: refusals(b, x, *kind) for name, b in op.backends.items()})
