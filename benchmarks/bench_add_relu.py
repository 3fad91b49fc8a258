"""add_relu beside eager's addition and in-place ReLU at the block ends of ResNet-18 and ResNet-50, batch 8.

torch.compile stands beside it at one block end in channels_last, and with --peers all everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import fastres
from judge import AddReluExact, judge_operator
from measure import Case, Prepared
from peers import DTYPES, LAYOUTS, backend_of, compiled, eager_add_relu, forward_only, fused_add_relu, with_gradients
from shapes import BATCH, BLOCK_END, Activation, with_role

MODES = {
    "train": "forward+backward",
    "train-forward": "forward, grad on",
    "eval": "forward, no grad",
}
QUICK_COMPILE = ("256x56x56",)


@dataclass(frozen=True)
class AddReluCase(Case):
    what: ClassVar[str] = "add_relu"
    activation: Activation
    kind: str  # a key of MODES
    layout: str
    dtype: str
    batch: int = BATCH

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.activation.size}-{self.layout}-{self.dtype}"

    @property
    def mode(self) -> str:
        return MODES[self.kind]

    def facts(self) -> dict[str, Any]:
        return {
            "shape": list(self.activation.shape(self.batch)),
            "layout": self.layout,
            "dtype": self.dtype,
            "role": self.activation.role,
            "counts": self.activation.counts,
        }

    def quick(self) -> bool:
        return self.layout == "channels_last" and self.dtype == "fp32" and self.activation.size in QUICK_COMPILE

    def bytes_moved(self) -> int:
        passes = 6 if self.kind == "train" else 3  # x, residual -> y; dy, y -> dx, which is dresidual too
        n, c, h, w = self.activation.shape(self.batch)
        return passes * n * c * h * w * DTYPES[self.dtype].itemsize

    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared:
        x, residual, dy = (
            torch.randn(self.activation.shape(self.batch), device=device)
            .to(DTYPES[self.dtype])
            .contiguous(memory_format=LAYOUTS[self.layout])
            .requires_grad_(self.kind != "eval" and not last)
            for last in (False, False, True)
        )
        calls = {}
        for name in peers:
            backend = backend_of(name)
            forward = eager_add_relu if backend is None else fused_add_relu(backend)
            if name == "compile":
                forward = compiled(forward)
            if self.kind == "train":
                calls[name] = with_gradients(forward, (x, residual), dy)
            else:
                calls[name] = forward_only(forward, (x, residual), grad=self.kind == "train-forward")
        backward = dy if self.kind == "train" else None

        def judge(results):
            return judge_operator(AddReluExact(x, residual), results, backward, ("y", "dx", "dresidual"))

        return Prepared(calls, judge, backend=fastres.explain("add_relu", x).chosen)


CASES = [
    *(
        AddReluCase(a, kind, layout, "fp32")
        for layout in ("channels_last", "nchw")
        for kind in ("train", "eval")
        for a in with_role(BLOCK_END)
    ),
    *(AddReluCase(a, "train", "channels_last", "bf16") for a in with_role(BLOCK_END)),
]


def test_add_relu(case, peer, beside):
    beside(case, peer)
