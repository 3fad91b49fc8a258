"""bn_act beside eager's batch norm, addition and ReLU at the shapes of ResNet-18 and ResNet-50, batch 8.

torch.compile stands beside it at two block ends in channels_last, and with --peers all everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import fastres
from judge import BatchNormExact, judge_operator
from measure import Case, Prepared
from peers import DTYPES, LAYOUTS, backend_of, compiled, eager_bn_act, forward_only, fused_bn_act, with_gradients
from shapes import BATCH, BLOCK_END, INNER, PROJECTION, Activation, distinct, with_role

MODES = {
    "train": "training, forward+backward",
    "train-forward": "training, forward, grad on",
    "train-nograd": "training, forward, no grad",
    "eval": "eval, forward, no grad",
}
QUICK_COMPILE = ("256x56x56", "1024x14x14")


@dataclass(frozen=True)
class BnActCase(Case):
    what: ClassVar[str] = "bn_act"
    activation: Activation
    kind: str  # a key of MODES
    form: str  # "residual-relu", "relu" or "none"
    layout: str
    dtype: str
    batch: int = BATCH

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.form}-{self.activation.size}-{self.layout}-{self.dtype}"

    @property
    def mode(self) -> str:
        return MODES[self.kind]

    @property
    def residual(self) -> bool:
        return self.form == "residual-relu"

    @property
    def act(self) -> str:
        return "none" if self.form == "none" else "relu"

    def facts(self) -> dict[str, Any]:
        return {
            "shape": list(self.activation.shape(self.batch)),
            "layout": self.layout,
            "dtype": self.dtype,
            "form": self.form,
            "role": self.activation.role,
            "counts": self.activation.counts,
        }

    def quick(self) -> bool:
        at = self.layout == "channels_last" and self.dtype == "fp32" and self.activation.size in QUICK_COMPILE
        return at and self.residual and self.kind in ("train", "eval")

    def bytes_moved(self) -> int:
        x, r = 1, int(self.residual)  # tensors of x's size
        if self.kind == "eval":
            passes = x + r + 1  # -> y
        else:
            passes = x + (x + r + 1)  # statistics; -> y
        if self.kind == "train":
            read = 2 if self.act == "none" else 3  # dy, x [, y]
            passes += read + (read + 1 + r)  # the two sums; -> dx [, dresidual]
        n, c, h, w = self.activation.shape(self.batch)
        return passes * n * c * h * w * DTYPES[self.dtype].itemsize

    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared:
        dtype, layout = DTYPES[self.dtype], LAYOUTS[self.layout]
        shape, channels = self.activation.shape(self.batch), self.activation.channels

        def activation() -> torch.Tensor:
            return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)

        x, dy = activation().mul_(2).add_(0.5), activation()
        residual = activation() if self.residual else None
        weight = torch.rand(channels, device=device) + 0.5
        bias = torch.randn(channels, device=device) * 0.5
        mean, var = torch.randn(channels, device=device) * 0.1 + 0.5, torch.rand(channels, device=device) * 2 + 3
        inputs = tuple(t for t in (x, weight, bias, residual) if t is not None)
        for t in inputs if self.kind != "eval" else ():
            t.requires_grad_()
        training = self.kind != "eval"
        calls = {}
        for name in peers:
            backend, running = backend_of(name), (mean.clone(), var.clone())
            if backend is None:
                forward = eager_bn_act(running, training, self.act)
            else:
                forward = fused_bn_act(running, training, self.act, backend)
            if name == "compile":
                forward = compiled(forward)
            if self.kind == "train":
                calls[name] = with_gradients(forward, inputs, dy)
            else:
                calls[name] = forward_only(forward, inputs, grad=self.kind == "train-forward")
        backward = dy if self.kind == "train" else None
        names = ("y", "dx", "dweight", "dbias", "dresidual")

        def judge(results):
            exact = BatchNormExact(x, residual, (mean, var), (weight, bias), training, self.act)
            return judge_operator(exact, results, backward, names)

        return Prepared(calls, judge, backend=fastres.explain("bn_act", x).chosen)


def _cases() -> list[BnActCase]:
    cases = []
    for layout in ("channels_last", "nchw"):
        cases += [BnActCase(a, "train", "residual-relu", layout, "fp32") for a in distinct()]
        cases += [BnActCase(a, "train", "relu", layout, "fp32") for a in with_role(INNER)]
        cases += [BnActCase(a, "train", "none", layout, "fp32") for a in with_role(PROJECTION)]
        cases += [BnActCase(a, "eval", "residual-relu", layout, "fp32") for a in with_role(BLOCK_END)]
        cases += [BnActCase(a, "eval", "relu", layout, "fp32") for a in with_role(INNER)]
        cases += [BnActCase(a, "eval", "none", layout, "fp32") for a in with_role(PROJECTION)]
    cases += [BnActCase(a, "train", "residual-relu", "channels_last", "bf16") for a in with_role(BLOCK_END)]
    return cases + [BnActCase(a, "eval", "residual-relu", "channels_last", "bf16") for a in with_role(BLOCK_END)]


CASES = _cases()


def test_bn_act(case, peer, beside):
    beside(case, peer)
