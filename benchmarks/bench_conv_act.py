"""conv_act against eager's convolution, in-place addition and in-place ReLU, at every convolution of ResNet-18 and -50.

Inference in channels_last with batch normalization folded into the bias, batch 1 and 8 in fp32 and 8 in bf16.
torch.compile runs at two shapes, and with --peers all everywhere. On a GPU each backend is also timed by name, and so
are the convolution with its bias alone (conv_bias) and, where there is a residual, the same plus one pass over the
residual (conv_bias_read).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastres
import roofline
from fastres.functional import conv_act
from measure import Case, Prepared
from peers import DTYPES, Forward, backend_of, compiled, conv_tensors, forward_only, judge_outputs, words
from roofline import Work
from shapes import BATCH, BLOCK_END, CONVS, INNER, Conv

JUDGED = 16  # images, at most, that the referee sees
PLAIN = ("conv_bias", "conv_bias_read")  # they compute less than conv_act: timed, not judged
QUICK_COMPILE = ((3, 64, 56, INNER), (1, 512, 28, BLOCK_END))  # kernel, outputs, size, role


@dataclass(frozen=True)
class ConvActCase(Case):
    what: ClassVar[str] = "conv_act"
    weight: ClassVar[float] = 0.5
    mode: ClassVar[str] = "inference"
    backends: ClassVar[tuple[str, ...]] = ("cudnn", "triton", "cuda") if torch.cuda.is_available() else ()
    conv: Conv
    dtype: str
    batch: int = BATCH

    @property
    def alone(self) -> tuple[str, ...]:
        return PLAIN[: 1 + self.conv.residual]

    def peers(self, level: str) -> tuple[str, ...]:
        found = super().peers(level)
        return found if self.backends else tuple(peer for peer in found if peer not in PLAIN)

    @property
    def id(self) -> str:
        return f"{self.conv.id}-{self.dtype}-batch{self.batch}"

    def facts(self) -> dict[str, Any]:
        c = self.conv
        return {
            "shape": [self.batch, c.inputs, c.size, c.size],
            "weight": [c.outputs, c.inputs, c.kernel, c.kernel],
            "stride": c.stride,
            "layout": "channels_last",
            "dtype": self.dtype,
            "role": c.role,
            "counts": c.counts,
        }

    def quick(self) -> bool:
        c = self.conv
        here = (c.kernel, c.outputs, c.size, c.role) in QUICK_COMPILE
        return here and c.stride == 1 and self.dtype == "fp32" and self.batch == BATCH

    def work(self) -> list[Work]:
        return [roofline.conv(self.conv, self.batch, DTYPES[self.dtype].itemsize)]

    def forward_of(self, peer: str) -> Forward:
        c, backend = self.conv, backend_of(peer)

        def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
            out = F.conv2d(x, weight, bias, c.stride, c.padding)
            if residual is not None:
                out += residual
            return out.relu_() if c.act == "relu" else out

        def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
            if peer == "conv_bias_read":
                words(residual).max()
            return F.conv2d(x, weight, bias, c.stride, c.padding)

        if peer in PLAIN:
            return plain
        if backend is None:
            return compiled(eager) if peer == "compile" else eager
        return partial(conv_act, stride=c.stride, padding=c.padding, act=c.act, backend=backend)

    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared:
        c = self.conv
        tensors = conv_tensors(c, self.batch, DTYPES[self.dtype], device)
        inputs = tensors[: 3 + c.residual]
        calls = {peer: forward_only(self.forward_of(peer), inputs, grad=False) for peer in peers}

        def judge(results):
            few = tuple(t[:JUDGED] if i in (0, 3) else t for i, t in enumerate(inputs))  # of x and of the residual
            ours = {peer: y[:JUDGED] for peer, (y,) in results.items() if peer not in (*self.baselines, *PLAIN)}
            return judge_outputs(self.forward_of("eager"), few, ours)

        return Prepared(
            calls, judge, backend=fastres.explain("conv_act", *tensors, stride=c.stride, padding=c.padding).chosen
        )


CASES = [
    *(ConvActCase(conv, "fp32", batch) for batch in (1, BATCH) for conv in CONVS),
    *(ConvActCase(conv, "bf16") for conv in CONVS),
]


def test_conv_act(case, peer, run_peer):
    run_peer(case, peer)
