"""The fused classes: one subclass per stock class, made on demand and found again by pickle.

A swapped block is the same object with another `__class__`: same children, same names, same state_dict. The subclass
replaces one method; it asks the adapter at every call and runs the stock method where the answer is no. Its name under
this module spells the stock class, so that unpickling in another process makes it again.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, NamedTuple

from torch import nn

from fastres.nn.checkpoint import moving_once
from fastres.swap import library as _library  # noqa: F401  (registers the known classes)
from fastres.swap.adapters import find_adapter, inherits_method

_PREFIX = "Fused:"
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The fused subclass of `stock`, the same one every time.

    Raises:
        LookupError: no adapter is registered for `stock` or a class it inherits the method from.
    """
    found = find_adapter(stock)
    if found is None or not inherits_method(stock, found[1], found[0].method):
        raise LookupError(
            f"no adapter for {stock.__module__}.{stock.__qualname__}: call fastres.register_block for it first"
        )
    adapter = found[0]
    fused: Any = _CLASSES.get(stock)
    if fused is None:
        metaclass: Any = type(stock)
        namespace = {
            "__module__": __name__,
            "__qualname__": _spell(stock),
            "__doc__": f"{stock.__name__}, run by fused operators (fastres.swap).",
            "fastres_stock": stock,
            **{f"fastres_{name}": value for name, value in Options()._asdict().items()},
            adapter.method: _method(stock, adapter.method),
        }
        fused = _CLASSES.setdefault(stock, metaclass(f"Fused{stock.__name__}", (stock,), namespace))
    fused.fastres_adapter = adapter  # follows a later registration
    made: type[nn.Module] = fused
    return made


class Options(NamedTuple):
    """Options of a swap: attributes `fastres_<name>` of the class, of a block where it asks for more."""

    backend: str = "auto"
    memory: str = "default"
    checkpoint_bn: str = "torch"


def convert(block: nn.Module, options: Options) -> type[nn.Module]:
    """Gives `block` its fused class, and returns that."""
    fused = fused_class(type(block))
    block.__class__ = fused
    for (name, value), default in zip(options._asdict().items(), Options(), strict=True):
        if value != default:
            setattr(block, f"fastres_{name}", value)
    return fused


def options_of(block: Any) -> Options:
    """Return the options that `block` was swapped with."""
    return Options(*(getattr(block, f"fastres_{name}") for name in Options._fields))


def restore(block: Any) -> None:
    """Gives a swapped block its stock class back."""
    block.__class__ = block.fastres_stock
    for name in Options._fields:
        block.__dict__.pop(f"fastres_{name}", None)


def _method(stock: type[nn.Module], name: str) -> Callable[..., Any]:
    """The replacing method, with the stock method's own parameters: tracers count them, callers may name them."""
    stock_method = getattr(stock, name)
    parameters = [p for p in signature(stock_method).parameters.values()][1:]
    if any(p.kind is not Parameter.POSITIONAL_OR_KEYWORD or p.default is not Parameter.empty for p in parameters):

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            adapter = self.fastres_adapter
            run = adapter.forward if adapter.ready(self) else stock_method
            if self.fastres_checkpoint_bn == "once":
                return moving_once(self, run, *args, **kwargs)
            return run(self, *args, **kwargs)

        return method
    names = ", ".join(p.name for p in parameters)
    source = (
        f"def make(stock_method, moving_once):\n"
        f"    def {name}(self, {names}):\n"
        f"        adapter = self.fastres_adapter\n"
        f"        run = adapter.forward if adapter.ready(self) else stock_method\n"
        f"        if self.fastres_checkpoint_bn == 'once':\n"
        f"            return moving_once(self, run, {names})\n"
        f"        return run(self, {names})\n"
        f"    return {name}\n"
    )
    scope: dict[str, Any] = {}
    exec(source, scope)
    made: Callable[..., Any] = scope["make"](stock_method, moving_once)
    return made


def _spell(stock: type[nn.Module]) -> str:
    """A name without dots, which pickle would split: "Fused:torchvision/models/resnet:BasicBlock"."""
    module = "__main__" if stock.__module__ == "__mp_main__" else stock.__module__  # multiprocessing's name for it
    return f"{_PREFIX}{module}:{stock.__qualname__}".replace(".", "/")


def __getattr__(name: str) -> type[nn.Module]:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, qualname = name[len(_PREFIX) :].replace("/", ".").partition(":")
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in qualname.split("."):
        if part == "<locals>":
            break
        found = getattr(found, part)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return fused_class(found)
    raise AttributeError(f"{module}.{qualname} is not an importable Module class")
