"""What a call costs beside the arithmetic: bn_act and add_relu on tensors so small that only the call is left.

Seconds are of one call, on one thread; eager is F.batch_norm with an in-place ReLU, and an addition with one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import bench_add_relu
import bench_bn_act
from shapes import INNER, Activation

SMALL = Activation(8, 4, 4, INNER, 0, 0)  # [2, 8, 4, 4]: 1 KiB


@dataclass(frozen=True)
class BnActOverhead(bench_bn_act.BnActCase):
    what: ClassVar[str] = "overhead"
    threads: ClassVar[int | None] = 1

    @property
    def id(self) -> str:
        return f"bn_act-{self.kind}-{self.form}"

    def quick(self) -> bool:
        return False

    def bytes_moved(self) -> None:
        return None


@dataclass(frozen=True)
class AddReluOverhead(bench_add_relu.AddReluCase):
    what: ClassVar[str] = "overhead"
    threads: ClassVar[int | None] = 1

    @property
    def id(self) -> str:
        return f"add_relu-{self.kind}"

    def quick(self) -> bool:
        return False

    def bytes_moved(self) -> None:
        return None


CASES = [
    *(BnActOverhead(SMALL, kind, "relu", "channels_last", "fp32", batch=2) for kind in bench_bn_act.MODES),
    *(AddReluOverhead(SMALL, kind, "channels_last", "fp32", batch=2) for kind in bench_add_relu.MODES),
]


def test_overhead(case, peer, beside):
    beside(case, peer)
