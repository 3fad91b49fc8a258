"""conv_act beside eager's convolution, in-place addition and in-place ReLU, at every convolution of ResNet-18 and -50.

Inference, channels_last, batch 1 and 8 in fp32 and 8 in bf16, with batch normalisation's bias folded in. torch.compile
stands beside it at two shapes, and with --peers all everywhere; on a GPU each backend by name, the convolution with its
bias alone (conv_bias) and, where there is a residual, with one reading of that (conv_bias_read).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import fastres
import fastres.functional
import roofline
from judge import ConvActExact, judge_operator
from measure import Case, Prepared
from peers import DTYPES, Forward, backend_of, compiled, conv_bias, eager_conv_act, forward_only
from roofline import Work
from shapes import BATCH, BLOCK_END, CONVS, INNER, Conv

PLAIN = ("conv_bias", "conv_bias_read")  # of other values than conv_act's: timed beside it
QUICK_COMPILE = ((3, 64, 56, INNER), (1, 512, 28, BLOCK_END))  # kernel, outputs, size, role
pytestmark = pytest.mark.skipif(
    not hasattr(fastres.functional, "conv_act"), reason="this fastres has no fastres.functional.conv_act"
)


def fused_conv_act(stride: int, padding: int, act: str, backend: str = "auto") -> Forward:
    def forward(x, weight, bias, residual=None):
        where = {"stride": stride, "padding": padding}
        return fastres.functional.conv_act(x, weight, bias, residual, **where, act=act, backend=backend)

    return forward


@dataclass(frozen=True)
class ConvActCase(Case):
    what: ClassVar[str] = "conv_act"
    weight: ClassVar[float] = 0.5
    backends: ClassVar[tuple[str, ...]] = ("cudnn", "triton", "cuda") if torch.cuda.is_available() else ()
    conv: Conv
    dtype: str
    batch: int = BATCH

    @property
    def alone(self) -> tuple[str, ...]:
        return PLAIN[: 1 + self.conv.residual] if self.backends else ()

    @property
    def id(self) -> str:
        return f"{self.conv.id}-{self.dtype}-batch{self.batch}"

    @property
    def mode(self) -> str:
        return "inference"

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

    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared:
        c, dtype = self.conv, DTYPES[self.dtype]

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

        x = tensor(self.batch, c.inputs, c.size, c.size)
        scale = (c.inputs * c.kernel**2) ** -0.5  # the sum keeps the size of x
        weight = tensor(c.outputs, c.inputs, c.kernel, c.kernel).mul_(scale)
        bias = torch.randn(c.outputs, device=device).to(dtype)
        residual = tensor(self.batch, c.outputs, c.out, c.out) if c.residual else None
        inputs = tuple(t for t in (x, weight, bias, residual) if t is not None)
        calls = {}
        for name in peers:
            backend, how = backend_of(name), (c.stride, c.padding, c.act)
            forward = eager_conv_act(*how) if backend is None else fused_conv_act(*how, backend)
            if name in PLAIN:
                forward = conv_bias(c.stride, c.padding, read=name == "conv_bias_read")
            calls[name] = forward_only(compiled(forward) if name == "compile" else forward, inputs, grad=False)

        def judge(results):
            exact = ConvActExact(x, weight, bias, residual, c.stride, c.padding, c.act)
            return judge_operator(exact, {n: r for n, r in results.items() if n not in PLAIN}, None, ("y",))

        arguments = (x, weight, bias, residual, c.stride, c.padding)
        return Prepared(calls, judge, backend=fastres.explain("conv_act", *arguments).chosen)


CASES = [
    *(ConvActCase(conv, "fp32", batch) for batch in (1, BATCH) for conv in CONVS),
    *(ConvActCase(conv, "bf16") for conv in CONVS),
]


def test_conv_act(case, peer, beside):
    beside(case, peer)
