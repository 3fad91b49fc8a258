"""The one deep copy of a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

M = TypeVar("M", bound=nn.Module)


def deep_copy(model: M, memo: Mapping[int, Any] | None = None, argument: str = "model") -> M:
    """A deep copy, flags and hooks included.

    A tensor with a history that a module holds as an attribute, which PyTorch does not copy, is copied without it: an
    activation that a forward keeps, the weight that hooks of weight_norm, spectral_norm and pruning compute.

    Args:
        memo: what stands for objects of these ids, as for `copy.deepcopy`.
        argument: names the model in the error.

    Raises:
        TypeError: the model cannot be copied.
    """
    known = dict(memo or {})
    for module in model.modules():
        for t in tree_leaves(list(vars(module).values())):
            if isinstance(t, Tensor) and not t.is_leaf and id(t) not in known:
                known[id(t)] = t.detach().clone()
    try:
        return copy.deepcopy(model, known)
    except Exception as error:
        raise TypeError(f"{argument}: {type(model).__name__} cannot be deep-copied: {error}") from error
