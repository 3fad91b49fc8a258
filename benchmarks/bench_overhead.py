"""The cost of a call without its arithmetic: bn_act and add_relu on tensors of 1 KiB.

Seconds are of one call, on one thread. Eager is F.batch_norm with an in-place ReLU, or an addition with one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import bench_add_relu
import bench_bn_act
from shapes import INNER, Activation

SMALL = Activation(8, 4, 4, INNER, 0, 0)  # [2, 8, 4, 4]: 1 KiB


class Overhead:
    """The changes that the cases below make to an operator's case."""

    what: ClassVar[str] = "overhead"
    threads: ClassVar[int | None] = 1
    quick_compile: ClassVar[tuple[str, ...]] = ()

    def bytes_moved(self) -> None:
        return None


@dataclass(frozen=True)
class BnActOverhead(Overhead, bench_bn_act.BnActCase):
    @property
    def id(self) -> str:
        return f"bn_act-{self.kind}-{self.form}"


@dataclass(frozen=True)
class AddReluOverhead(Overhead, bench_add_relu.AddReluCase):
    @property
    def id(self) -> str:
        return f"add_relu-{self.kind}"


CASES = [
    *(BnActOverhead(SMALL, kind, "relu", "channels_last", "fp32", batch=2) for kind in bench_bn_act.MODES),
    *(AddReluOverhead(SMALL, kind, "channels_last", "fp32", batch=2) for kind in bench_add_relu.MODES),
]


def test_overhead(case, peer, run_peer):
    run_peer(case, peer)
