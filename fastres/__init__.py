"""fastres: residual networks at the speed of the hardware, in training and inference, the answers proven the same."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastres import functional, nn
from fastres._dispatch import BackendError, explain
from fastres._log import configure_from_environment
from fastres.swap import BlockAdapter, SwapReport, SwapRow, register_block, swap, swapped, unswap
from fastres.verify import Verification, verify

if TYPE_CHECKING:
    from fastres import models
    from fastres._info import info
    from fastres.inference.file.values import FrozenFileError
    from fastres.inference.freeze import freeze
    from fastres.inference.frozen import FrozenModel
    from fastres.inference.load import load
    from fastres.pipelines.predict import predict

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BlockAdapter",
    "FrozenFileError",
    "FrozenModel",
    "SwapReport",
    "SwapRow",
    "Verification",
    "explain",
    "freeze",
    "functional",
    "info",
    "load",
    "models",
    "nn",
    "predict",
    "register_block",
    "swap",
    "swapped",
    "unswap",
    "verify",
]

# Loaded on first use: `import fastres` adds little to `import torch`. (Not swap and verify: their modules have their
# names, and importing one of them later would hide the function.)
_ON_USE = dict.fromkeys(("FrozenFileError", "FrozenModel", "freeze", "load"), "fastres.inference")
_ON_USE |= {"info": "fastres._info", "predict": "fastres.pipelines"}


def __getattr__(name: str) -> Any:
    if name == "models":
        return import_module("fastres.models")
    if name not in _ON_USE:
        raise AttributeError(f"module 'fastres' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ON_USE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


configure_from_environment()
