"""add_relu against eager's addition and in-place ReLU at the block ends of ResNet-18 and ResNet-50, batch 8.

torch.compile runs at one block end in channels_last, and with --peers all everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from fastres.functional import add_relu
from peers import ActivationCase, Forward, backend_of
from shapes import BATCH, BLOCK_END, Activation, with_role

MODES = {"train": "forward+backward", "train-forward": "forward, grad on", "eval": "forward, no grad"}


def eager(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return (x + residual).relu_()  # a leaf does not allow torchvision's `out += residual`; one allocation, as ours


@dataclass(frozen=True)
class AddReluCase(ActivationCase):
    what: ClassVar[str] = "add_relu"
    operator: ClassVar[str] = "add_relu"
    modes: ClassVar[dict[str, str]] = MODES
    quick_compile: ClassVar[tuple[str, ...]] = ("256x56x56",)
    activation: Activation
    kind: str
    layout: str
    dtype: str
    batch: int = BATCH

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.activation.size}-{self.layout}-{self.dtype}"

    def passes(self) -> int:
        return 6 if self.kind == "train" else 3  # x, residual -> y; dy, y -> dx, which is also dresidual

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        return tuple(self.tensor(device).requires_grad_(self.kind != "eval") for _ in range(2))

    def forward_of(self, peer: str) -> Forward:
        backend = backend_of(peer)
        return eager if backend is None else partial(add_relu, backend=backend)


CASES = [
    *(
        AddReluCase(a, kind, layout, "fp32")
        for layout in ("channels_last", "nchw")
        for kind in ("train", "eval")
        for a in with_role(BLOCK_END)
    ),
    *(AddReluCase(a, "train", "channels_last", "bf16") for a in with_role(BLOCK_END)),
]


def test_add_relu(case, peer, run_peer):
    run_peer(case, peer)
