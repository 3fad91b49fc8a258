"""The fate of each layer: the rows of freeze's report, which fusions write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

ACTS = ("relu", "relu6", "hardswish", "silu")


class Refusal(NamedTuple):
    """The reason why something stays as it is: a code and a sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class FreezeRow:
    """One convolution, one BN that stayed, another fused step, or (without a graph) one fused block.

    ``reason`` is a code where it could not become more: NO_NORM, NO_CONV, SHARED, OTHER_USE, NOT_CONSTANT, NO_BATCH,
    BATCH_STATISTICS, BAD_VARIANCE, OVERFLOW, UNDERFLOW, or one of swap's; ``message`` says it in words. ``took`` lists
    what it took in: "bn" ("scale": a product or sum that is none), "bias", "add" and the activation. ``flops``,
    ``bytes`` and ``weights`` are the least that the step takes; ``tile`` is the side of Winograd's tiles of outputs,
    where it runs by them on the example, else 0.
    """

    name: str
    kind: str  # "conv", "norm", "add", "pool_linear", "other" (operators that stay, together) or "block"
    became: str
    reason: str
    message: str
    took: tuple[str, ...] = ()
    flops: int = 0  # for one image; a multiply-add is two
    bytes: int = 0  # of activations, for one image
    weights: int = 0  # bytes
    tile: int = 0

    @property
    def products(self) -> int:
        """The flops that it takes by the way it runs: F(2x2, 3x3) has 2.25 times fewer, F(4x4, 3x3) 4 times."""
        return self.flops * (self.tile + 2) ** 2 // (9 * self.tile**2) if self.tile else self.flops
