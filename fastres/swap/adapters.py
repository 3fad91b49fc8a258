"""Adapters: what is known of a block class, and the registry of them.

An adapter holds the fused forward of one class and the conditions under which it means what the stock forward means.
The conditions are asked twice: with reasons when a model is swapped (`refusal`), without when a block runs (`ready`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from fastres.nn.norms import is_frozen_norm
from fastres.nn.steps import is_bare, is_norm, is_plain

ReasonCode = Literal[
    "NOT_MATCHED",  # no adapter for this class
    "NORM_TYPE",  # a norm that is neither BatchNorm2d nor a FrozenBatchNorm2d
    "ACT_TYPE",  # an activation that is not exactly ReLU
    "HAS_HOOKS",  # a hook, or a forward patched on the instance, on a module that fusing would pass over
    "HAS_PARAMETRIZATION",
    "HAS_EXTRA_LAYER",  # squeeze-excite, drop-path, drop-block, anti-aliasing
    "SUBCLASS_FORWARD",  # the class's forward is not the one that the adapter knows
    "FSDP",  # fully_shard came first
    "FILTERED",  # include or exclude
    "ALREADY",
    "NUMERICS",  # verify= found the fused block further from float64 than the tolerance
]


class Refusal(NamedTuple):
    """A reason to leave a block alone: a code and a sentence."""

    code: ReasonCode
    message: str


def stock_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that `cls` was made from by a swap, or `cls` itself."""
    stock: type[nn.Module] = getattr(cls, "fastres_stock", cls)
    return stock


def refuse_norm(name: str, module: Any) -> Refusal | None:
    """Say why the child `module` cannot be fused as a BN."""
    if is_norm(module):
        return None
    expected = type(module).__name__ if is_frozen_norm(module) and not module._modules else "BatchNorm2d"
    return _refuse(name, module, "NORM_TYPE", expected)


def refuse_act(name: str, module: Any) -> Refusal | None:
    """Say why the child `module` cannot be fused as the ReLU."""
    if is_plain(module, nn.ReLU):
        return None
    return _refuse(name, module, "ACT_TYPE", "ReLU")


def refuse_extra(name: str, module: Any) -> Refusal | None:
    """Say why the optional child `module` is in the way."""
    if module is None or is_plain(module, nn.Identity):
        return None
    return _refuse(name, module, "HAS_EXTRA_LAYER", "None or Identity")


def _refuse(name: str, module: Any, code: ReasonCode, expected: str) -> Refusal:
    if not isinstance(module, nn.Module):
        return Refusal(code, f"{name}: got {module!r}, expected {expected}")
    if parametrize.is_parametrized(module):
        return Refusal("HAS_PARAMETRIZATION", f"{name} is parametrized")
    got = type(module).__name__
    if got == expected and not is_bare(module):
        return Refusal("HAS_HOOKS", f"{name} has hooks or a forward patched on the instance")
    return Refusal(code, f"{name}: got {got}, expected {expected}")


@dataclass(frozen=True)
class BlockAdapter:
    """Fused forward of one block class, and its conditions.

    Args:
        forward: the fused forward, called with the block and its inputs; it runs shortcuts as the modules they are,
            each convolution and BN with `fastres.nn.conv_norm_act(x, block.conv, block.bn, block.relu, residual,
            block.fastres_backend, block.fastres_memory)`, and a BN without a convolution before it with
            `fastres.nn.norm_act(x, ...)`.
        norms: children that must be plain BatchNorm2d or FrozenBatchNorm2d for that (others make the block run its
            stock forward).
        acts: children that must be plain ReLU.
        absent: optional children that must be None or Identity.
        pattern: the name in the report; the class's name if empty.
        method: the method that is replaced.
        reads: children that the stock method reads; when given, a class whose method reads others is refused.

    Example:
        >>> import torch, fastres
        >>> from fastres.swap import BlockAdapter
        >>> class Unit(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv, self.norm, self.act = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.ReLU()
        ...     def forward(self, x):
        ...         return self.act(self.norm(self.conv(x)) + x)
        >>> def fused(block, x):
        ...     how = block.fastres_backend, block.fastres_memory
        ...     return fastres.nn.conv_norm_act(x, block.conv, block.norm, block.act, x, *how)
        >>> fastres.register_block(Unit, BlockAdapter(fused, norms=("norm",), acts=("act",)))
        >>> fastres.swap(torch.nn.Sequential(Unit())).rows[0].status
        'swapped'
    """

    forward: Callable[..., Any]
    norms: tuple[str, ...] = ()
    acts: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    pattern: str = ""
    method: str = "forward"
    reads: frozenset[str] = field(default=frozenset())

    def ready(self, block: nn.Module) -> bool:
        """Say whether the fused forward means what the stock one means now: a few microseconds, every call."""
        children = block._modules  # getattr on a Module costs ten times as much
        for name in self.norms:
            if not is_norm(children.get(name)):
                return False
        for name in self.acts:
            if not is_plain(children.get(name), nn.ReLU):
                return False
        for name in self.absent:
            child = children[name] if name in children else block.__dict__.get(name)
            if child is not None and not is_plain(child, nn.Identity):
                return False
        return True

    def refusal(self, block: nn.Module) -> Refusal | None:
        """Say why `block` would not run fused; None when it would."""
        for names, refuse in ((self.norms, refuse_norm), (self.acts, refuse_act), (self.absent, refuse_extra)):
            for name in names:
                if not hasattr(block, name):
                    return Refusal("SUBCLASS_FORWARD", f"the block has no child {name}")
                reason = refuse(name, getattr(block, name))
                if reason is not None:
                    return reason
        return None

    def knows(self, block: nn.Module) -> bool:
        """Say whether the block's class still reads exactly the children that the adapter was written for."""
        if not self.reads:
            return True
        code = getattr(getattr(type(block), self.method), "__code__", None)
        if code is None:
            return False
        return {name for name in code.co_names if name in block._modules or name in block.__dict__} == self.reads

    def probe(self, block: nn.Module) -> nn.Module:
        """The stock module that `verify=` records the inputs of and measures: `block` itself, unless it is a stem."""
        return block


_REGISTERED: dict[type[nn.Module], BlockAdapter] = {}
_LIBRARY: dict[str, BlockAdapter] = {}  # "module:qualname" of classes of libraries that may not be imported


def register_block(cls: type[nn.Module], adapter: BlockAdapter) -> None:
    """Teaches `swap` a block class of your own; a second registration replaces the first.

    Args:
        cls: the class. Its subclasses are swapped too as long as they leave the method alone.
        adapter: the fused forward and its conditions; see `fastres.swap.BlockAdapter`, where an example stands.

    Raises:
        TypeError: not a Module class, or not a BlockAdapter.
        ValueError: the class has no such method, or the method differs from the one replaced before.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls: got {cls!r}, expected a subclass of nn.Module")
    if not isinstance(adapter, BlockAdapter):
        raise TypeError(f"adapter: got {type(adapter).__name__}, expected a BlockAdapter")
    if not callable(getattr(cls, adapter.method, None)):
        raise ValueError(f"adapter.method: got {adapter.method!r}, which {cls.__name__} does not have")
    if stock_class(cls) is not cls:
        raise ValueError(f"cls: {cls.__name__} is a swapped class, expected {stock_class(cls).__name__}")
    known = _REGISTERED.get(cls)
    if known is not None and known.method != adapter.method:
        raise ValueError(f"adapter.method: got {adapter.method!r}, {cls.__name__} is registered with {known.method!r}")
    _REGISTERED[cls] = adapter


def register_library(module: str, qualname: str, adapter: BlockAdapter) -> None:
    """As `register_block`, for a class by name, so that its library is not imported."""
    _LIBRARY[f"{module}:{qualname}"] = adapter


def find_adapter(cls: type[nn.Module]) -> tuple[BlockAdapter, type[nn.Module]] | None:
    """The adapter for `cls` and the class of its ancestry that it was registered for."""
    for base in cls.__mro__:
        adapter = _REGISTERED.get(base) or _LIBRARY.get(f"{base.__module__}:{base.__qualname__}")
        if adapter is not None:
            return adapter, base
    return None


def inherits_method(cls: type[nn.Module], base: type[nn.Module], method: str) -> bool:
    """Say whether `cls` leaves `base`'s method alone."""
    return getattr(cls, method, None) is getattr(base, method)
