"""Flop formulas of our operators for torch.utils.flop_counter, registered when somebody loads it: it imports Triton."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

_COUNTER = "torch.utils.flop_counter"


class _WhenLoaded(importlib.abc.MetaPathFinder):
    """Lets the other finders find the module, and calls `then` once it has run. Leaves sys.meta_path after that."""

    def __init__(self, then: Callable[[Any], None]) -> None:
        self.then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_flops(op: Any, formula: Callable[..., int]) -> None:
    """Makes FlopCounterMode count `op` (an OpOverloadPacket) by `formula(*args, out_shape=...)`, tensors as shapes."""

    def register(counter: Any) -> None:
        counter.register_flop_formula(op)(formula)

    if _COUNTER in sys.modules:
        register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenLoaded(register))
