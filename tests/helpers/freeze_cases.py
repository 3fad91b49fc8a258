"""Bit-for-bit comparison of a model with itself before: what freeze must never change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_TABLES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]


def _tensor(t: Tensor) -> dict[str, Any]:
    if nn.parameter.is_lazy(t):
        return {"id": id(t), "class": type(t)}
    opaque = t.is_meta or t.is_quantized or t.layout is not torch.strided
    return {
        "id": id(t),
        "class": type(t),
        "version": None if t.is_inference() else t._version,
        "address": None if opaque else t.data_ptr(),
        "shape, strides, dtype, device": (tuple(t.shape), None if opaque else t.stride(), t.dtype, t.device),
        "requires_grad": t.requires_grad,
        "names": sorted(vars(t)) if hasattr(t, "__dict__") else [],
        "bits": None if opaque else t.detach().reshape(-1).view(torch.uint8).tolist(),
        "grad": None if t.grad is None else _tensor(t.grad),
    }


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a careless copy of `model` could move: identities and values of modules, tensors and hooks."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = {
            "id": id(module),
            "class": type(module),
            "training": module.training,
            "names": list(module.__dict__),
            "tables": {table: {k: id(v) for k, v in getattr(module, table).items()} for table in _TABLES},
            "values": {k: repr(v) for k, v in module.__dict__.items() if isinstance(v, int | float | str | list)},
            "tensors": {
                k: _tensor(v)
                for table in (module._parameters, module._buffers)
                for k, v in table.items()
                if v is not None
            },
        }
    return found


def tensors(tree: Any) -> list[dict[str, Any]]:
    """The same of every tensor in an example."""
    return [_tensor(t) for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _difference(before: Any, after: Any) -> str:
    """The innermost entries that differ, short."""
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        return "; ".join(f"{k}: {_difference(v, after[k])}" for k, v in before.items() if after[k] != v)
    return f"{str(before)[:80]} -> {str(after)[:80]}"


@contextmanager
def unchanged(model: Any, *others: Any) -> Iterator[None]:
    """Fails where the model, or a tensor of `others`, is not what it was to the bit; also when the body raises."""
    before = state(model) if isinstance(model, nn.Module) else None
    given = tensors(others)
    generator = torch.random.get_rng_state()
    try:
        yield
    finally:
        after = state(model) if isinstance(model, nn.Module) else None
        if before is not None and after is not None:
            assert before.keys() == after.keys()
            for name, entry in before.items():
                for what, value in entry.items():
                    now = after[name][what]
                    assert now == value, f"{name or 'the model'}: {what} changed: {_difference(value, now)}"
        assert tensors(others) == given, "an example changed"
        assert torch.equal(torch.random.get_rng_state(), generator), "the random state moved"
