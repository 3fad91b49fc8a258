"""fastres: residual networks at the speed of the hardware, in training and inference, the answers proven the same."""

from fastres import functional, models, nn
from fastres._dispatch import BackendError, explain
from fastres._info import info
from fastres._log import configure_from_environment
from fastres.inference import FrozenModel, freeze
from fastres.swap import BlockAdapter, SwapReport, SwapRow, register_block, swap, swapped, unswap
from fastres.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BlockAdapter",
    "FrozenModel",
    "SwapReport",
    "SwapRow",
    "Verification",
    "explain",
    "freeze",
    "functional",
    "info",
    "models",
    "nn",
    "register_block",
    "swap",
    "swapped",
    "unswap",
    "verify",
]

configure_from_environment()
