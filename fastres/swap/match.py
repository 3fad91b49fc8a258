"""Blocks of a model, and which of them can be swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils import parametrize

from fastres import nn as fused_nn
from fastres.swap.adapters import BlockAdapter, Refusal, find_adapter, inherits_method, stock_class
from fastres.swap.fused import options_of
from fastres.swap.library import SequenceAdapter

Filter: TypeAlias = "str | Sequence[str] | Callable[[str, nn.Module], bool] | None"

_OURS = (
    fused_nn.BNReLU,
    fused_nn.BNAddReLU,
    fused_nn.AddReLU,
    fused_nn.ConvBNReLU,
    fused_nn.BasicBlock,
    fused_nn.Bottleneck,
)


@dataclass(frozen=True)
class Match:
    """A block: its name, the module, its adapter if known, and why it stays as it is (None: it can be swapped)."""

    name: str
    block: nn.Module
    pattern: str
    adapter: BlockAdapter | None
    refusal: Refusal | None


def selector(argument: str, value: Filter) -> Callable[[str, nn.Module], bool] | None:
    """A predicate from a glob, a list of globs or a callable. A glob that matches a module matches all inside it.

    Raises:
        TypeError: anything else.
    """
    if value is None:
        return None
    if callable(value):
        return value
    globs = [value] if isinstance(value, str) else value
    if not isinstance(globs, Iterable) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"{argument}: got {value!r}, expected a glob, a list of globs or a callable(name, module)")
    globs = list(globs)

    def select(name: str, module: nn.Module) -> bool:
        parts = name.split(".")
        names = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatchcase(candidate, glob) for candidate in names for glob in globs)

    return select


def find_blocks(model: nn.Module, include: Filter = None, exclude: Filter = None) -> list[Match]:
    """Every block of `model`, once, in the order of `named_modules`; one that appears twice matches by any name."""
    wanted, unwanted = selector("include", include), selector("exclude", exclude)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    matches = []
    for block, aliases in names.items():
        match = _match(aliases[0], block)
        if match is None:
            continue
        if match.refusal is None and (
            (wanted is not None and not any(wanted(name, block) for name in aliases))
            or (unwanted is not None and any(unwanted(name, block) for name in aliases))
        ):
            match = Match(match.name, block, match.pattern, match.adapter, Refusal("FILTERED", "by include or exclude"))
        matches.append(match)
    return matches


def _match(name: str, block: nn.Module) -> Match | None:
    cls = type(block)
    if stock_class(cls) is not cls:
        fused: Any = block
        pattern = fused.fastres_adapter.pattern or stock_class(cls).__name__
        asked = ", ".join(f"{option} {value!r}" for option, value in options_of(fused)._asdict().items())
        return Match(name, block, pattern, None, Refusal("ALREADY", f"swapped before, {asked}"))
    if isinstance(block, _OURS):
        said = f"calls the fused operators itself, backend {block.backend!r}"
        if hasattr(block, "memory"):  # its own attribute: swap changes no class here
            said += f", memory {block.memory!r}"
        return Match(name, block, cls.__name__, None, Refusal("ALREADY", said))
    found = find_adapter(cls)
    if found is None:
        if not _norms(block):
            return None
        return Match(name, block, "", None, Refusal("NOT_MATCHED", f"{cls.__name__}: see fastres.register_block"))
    adapter, base = found
    if isinstance(adapter, SequenceAdapter) and not _norms(block):
        return None  # a chain of other things
    refusal = _refusal(block, adapter, base)
    return Match(name, block, adapter.pattern or base.__name__, adapter, refusal)


def _norms(block: nn.Module) -> list[str]:
    """The block's own norms that a ResNet-like block could have fused."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    return [
        name
        for name, child in block._modules.items()
        if isinstance(child, kinds) or (child is not None and "BatchNorm" in type(child).__name__)
    ]


def _refusal(block: nn.Module, adapter: BlockAdapter, base: type[nn.Module]) -> Refusal | None:
    cls = type(block)
    if any(c.__name__ == "FSDPModule" and c.__module__.startswith("torch.distributed") for c in cls.__mro__):
        return Refusal("FSDP", "fully_shard changed its class: swap before fully_shard")
    if parametrize.is_parametrized(block):
        return Refusal("HAS_PARAMETRIZATION", "the block is parametrized")
    if not inherits_method(cls, base, adapter.method):
        return Refusal("SUBCLASS_FORWARD", f"{cls.__name__} has its own {adapter.method}")
    if adapter.method in block.__dict__ or "forward" in block.__dict__:
        return Refusal("HAS_HOOKS", "a forward is patched on the instance")
    if not adapter.knows(block):
        return Refusal("SUBCLASS_FORWARD", f"{cls.__name__}.{adapter.method} is not the one that the adapter knows")
    return adapter.refusal(block)
