"""The ties of a frozen model to its source: a reference that keeps nothing alive, and the signature of its forward."""

from __future__ import annotations

import inspect
import weakref
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastres._stamp import Stamp
from fastres.graph.export import difference, plain_state
from fastres.graph.signature import Signature


def source_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, also those with two names, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


class Source:
    """The origin of a snapshot: a weak reference, and what its tensors and attributes were.

    Copies share it, pickles drop it.

    Args:
        keep: hold the model itself, for a part of a network, of which nobody else may keep the source.
    """

    def __init__(self, model: nn.Module | None = None, keep: bool = False) -> None:
        self._model = None if model is None else (lambda: model) if keep else weakref.ref(model)
        self._stamp = Stamp({} if model is None else source_tensors(model))
        self._state = {} if model is None else plain_state(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self

    def __reduce__(self) -> tuple[type[Source], tuple[()]]:
        return Source, ()

    @property
    def model(self) -> nn.Module | None:
        """The source, while somebody else keeps it."""
        return None if self._model is None else self._model()

    def moved(self) -> bool:
        """Tell whether a tensor of the source was replaced, added, removed or written to since, or an attribute set."""
        model = self.model
        return model is not None and (not self._stamp.holds(source_tensors(model)) or bool(self.other_attribute()))

    def other_attribute(self) -> str:
        """An attribute of the source that has another value than it had; empty where none has, or it is gone.

        Such as a flag that its forward reads: a graph has one of its values in it.
        """
        model = self.model
        return "" if model is None else difference(self._state, plain_state(model))


class LikeItsSource:
    """`FrozenModel.forward`: a method with the signature of the source's, by which exporters name inputs and sizes."""

    def __get__(self, frozen: Any, owner: Any) -> Any:
        if frozen is None:
            return self
        if torch.compiler.is_dynamo_compiling():  # which follows methods of classes alone
            return frozen._forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        forward.__signature__ = _method_signature(frozen._signature)  # type: ignore[attr-defined]
        return MethodType(forward, frozen)


def _method_signature(forward: Signature) -> inspect.Signature:
    """With `self`, which a bound method's signature leaves out."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    taken = {name for name, _, _ in forward.parameters}
    own = own if "self" not in taken else own.replace(name="_self")
    rest = [inspect.Parameter(name, kind, default=default) for name, kind, default in forward.parameters]
    return inspect.Signature([own, *rest])
