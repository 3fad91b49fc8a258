"""The call convention of a network: how arguments become the flat tensors that a captured graph takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_KINDS = inspect.Parameter
_TEXT = (bool, int, float, str)


@dataclass(frozen=True)
class Call:
    """One call, taken apart: ``tree`` of its bound arguments, the leaves that are no tensors by place, the tensors."""

    tree: TreeSpec
    plain: tuple[tuple[int, Any], ...]
    tensors: tuple[Tensor, ...]

    def arguments(self, tensors: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) again, with other tensors where given."""
        leaves: list[Any] = list(self.tensors if tensors is None else tensors)
        for place, value in self.plain:
            leaves.insert(place, value)
        args, kwargs = tree_unflatten(leaves, self.tree)
        return args, kwargs

    def like(self, model: nn.Module) -> Call:
        """The same call with floating tensors in the dtype of ``model``'s first floating tensor, on its device."""
        for own in [*model.parameters(), *model.buffers()]:
            if own.is_floating_point():
                moved = (t.to(own.device, own.dtype if t.is_floating_point() else t.dtype) for t in self.tensors)
                return Call(self.tree, self.plain, tuple(moved))
        return self


class Signature:
    """The parameters of a forward. Arguments equal to their default are dropped, names given by place or by name alike.

    ``parameters`` holds (name, kind, default) with ``inspect.Parameter.empty`` for none.
    """

    def __init__(self, parameters: list[tuple[str, Any, Any]]) -> None:
        self.parameters = parameters
        self._signature = inspect.Signature([_KINDS(name, kind, default=default) for name, kind, default in parameters])
        self._defaults = {name: default for name, _, default in parameters if default is not _KINDS.empty}
        first = parameters[0] if parameters else ("", _KINDS.KEYWORD_ONLY, None)
        self._one = first[1] in (_KINDS.POSITIONAL_ONLY, _KINDS.POSITIONAL_OR_KEYWORD)
        self._tree = tree_flatten(((0,), {}))[1]  # of a call with one argument, a tensor

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> Signature:
        """The signature of a bound forward."""
        return cls([(p.name, p.kind, p.default) for p in inspect.signature(forward).parameters.values()])

    @classmethod
    def any(cls) -> Signature:
        """The signature of a forward whose parameters nobody knows."""
        return cls([("args", _KINDS.VAR_POSITIONAL, _KINDS.empty), ("kwargs", _KINDS.VAR_KEYWORD, _KINDS.empty)])

    def __deepcopy__(self, memo: dict[int, Any]) -> Signature:
        return self  # never written to

    def __reduce__(self) -> tuple[type[Signature], tuple[Any]]:
        return Signature, (self.parameters,)

    def __str__(self) -> str:
        return str(self._signature)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self.parameters == other.parameters

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call, taken apart.

        Raises:
            TypeError: as the source's forward raises for a missing, unknown or doubled argument.
        """
        if self._one and not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
            return Call(self._tree, (), args)
        bound = self._signature.bind(*args, **kwargs)
        defaults = self._defaults
        for name in [n for n, value in bound.arguments.items() if n in defaults and _is_same(value, defaults[n])]:
            if not any(self._after(name, other) for other in bound.arguments):
                del bound.arguments[name]
        leaves, tree = tree_flatten((bound.args, bound.kwargs))
        for leaf in leaves:
            if hasattr(leaf, "__array__") and not isinstance(leaf, Tensor) and getattr(leaf, "ndim", None):
                name = next((n for n, value in bound.arguments.items() if value is leaf), "input")
                what = f"{type(leaf).__module__}.{type(leaf).__name__} {leaf.dtype} {list(leaf.shape)}"
                raise TypeError(f"{name}: got a {what}, expected a tensor (torch.from_numpy, torch.as_tensor)")
        plain = tuple((i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
        return Call(tree, plain, tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)))

    def _after(self, name: str, other: str) -> bool:
        """Tell whether `other` is given by place behind `name`: then `name` must stay, or places would shift."""
        order = [n for n, _, _ in self.parameters]
        kinds = {n: kind for n, kind, _ in self.parameters}
        by_place = kinds[other] is _KINDS.VAR_POSITIONAL or kinds[other] is _KINDS.POSITIONAL_ONLY
        return by_place and order.index(other) > order.index(name)


def _is_same(value: Any, default: Any) -> bool:
    """Tell whether an argument is its default: the same object, or a number or text equal to it."""
    return value is default or (type(value) is type(default) and type(value) in _TEXT and bool(value == default))
