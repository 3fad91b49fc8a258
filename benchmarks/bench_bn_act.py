"""bn_act against eager's batch norm, addition and ReLU at the shapes of ResNet-18 and ResNet-50, batch 8.

torch.compile runs at two block ends in channels_last, and with --peers all everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fastres.functional import bn_act
from peers import ActivationCase, Forward, backend_of
from shapes import BATCH, BLOCK_END, INNER, PROJECTION, Activation, distinct, with_role

MODES = {
    "train": "training, forward+backward",
    "train-forward": "training, forward, grad on",
    "train-nograd": "training, forward, no grad",
    "eval": "eval, forward, no grad",
}
MOMENTUM, EPS = 0.1, 1e-5


@dataclass(frozen=True)
class BnActCase(ActivationCase):
    what: ClassVar[str] = "bn_act"
    operator: ClassVar[str] = "bn_act"
    modes: ClassVar[dict[str, str]] = MODES
    quick_compile: ClassVar[tuple[str, ...]] = ("256x56x56", "1024x14x14")
    activation: Activation
    kind: str
    form: str  # "residual-relu", "relu" or "none"
    layout: str
    dtype: str
    batch: int = BATCH

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.form}-{self.activation.size}-{self.layout}-{self.dtype}"

    @property
    def residual(self) -> bool:
        return self.form == "residual-relu"

    @property
    def act(self) -> str:
        return "none" if self.form == "none" else "relu"

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"form": self.form}

    def quick(self) -> bool:
        return super().quick() and self.residual and self.kind in ("train", "eval")

    def passes(self) -> int:
        x, r = 1, int(self.residual)
        if self.kind == "eval":
            return x + r + 1  # -> y
        passes = x + (x + r + 1)  # statistics; -> y
        if self.kind == "train":
            read = 2 if self.act == "none" else 3  # dy, x [, y]
            passes += read + (read + 1 + r)  # the two sums; -> dx [, dresidual]
        return passes

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """x, running mean and variance, weight, bias [, residual]."""
        shape, grad = (self.activation.channels,), self.kind != "eval"
        mean, var = torch.randn(shape, device=device) * 0.1 + 0.5, torch.rand(shape, device=device) * 2 + 3  # [C]
        weight, bias = torch.rand(shape, device=device) + 0.5, torch.randn(shape, device=device) * 0.5  # [C]
        leaves = [self.tensor(device).mul_(2).add_(0.5), weight, bias]
        leaves += [self.tensor(device)] if self.residual else []
        x, *others = (t.requires_grad_(grad) for t in leaves)
        return x, mean, var, *others

    def forward_of(self, peer: str) -> Forward:
        act, training, backend = self.act, self.kind != "eval", backend_of(peer)

        def eager(x, mean, var, weight, bias, residual=None):
            out = F.batch_norm(x, mean, var, weight, bias, training, MOMENTUM, EPS)
            if residual is not None:
                out += residual
            return out.relu_() if act == "relu" else out

        def fused(x, mean, var, weight, bias, residual=None):
            how = {"act": act, "training": training, "momentum": MOMENTUM, "eps": EPS, "backend": backend}
            return bn_act(x, mean, var, weight, bias, residual, **how)

        return eager if backend is None else fused


def _cases() -> list[BnActCase]:
    forms = (("residual-relu", BLOCK_END), ("relu", INNER), ("none", PROJECTION))
    cases = []
    for layout in ("channels_last", "nchw"):
        for kind in ("train", "eval"):
            for form, role in forms:
                shapes = distinct() if (kind, form) == ("train", "residual-relu") else with_role(role)
                cases += [BnActCase(a, kind, form, layout, "fp32") for a in shapes]
    for kind in ("train", "eval"):
        cases += [BnActCase(a, kind, "residual-relu", "channels_last", "bf16") for a in with_role(BLOCK_END)]
    return cases


CASES = _cases()


def test_bn_act(case, peer, run_peer):
    run_peer(case, peer)
