"""The roofline: no kernel is faster than its bytes over the bandwidth, or than its flops over the flop rate.

    bytes   each operand read from memory once, the result written once; nothing stays in a cache between kernels
    flops   2 * N * out^2 * outputs * kernel^2 * inputs for a convolution, 0 for what only moves data
    bound   sum over kernels of max(bytes / bandwidth, flops / rate): kernels run one after another

The kernels of a network are those of an engine that fuses each convolution with its bias, residual and ReLU and nothing
wider: the stem's pooling, the average pooling and the classifier are kernels of their own. An engine that fuses whole
blocks can beat this bound, and so can one whose activations stay in a large cache, so more than 100 % is no error.

The rates are measured in the same session (`measured`), so "% of bound" is relative to what this machine does today.
Source: Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model", CACM 2009.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from fastres.lab.timing import timer_for
from shapes import CONVS, Conv


@dataclass(frozen=True)
class Rates:
    """The rates of the hardware: bytes/s, and flop/s by dtype ("fp32", "bf16", ...)."""

    bandwidth: float
    flops: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """The work of one kernel in one call."""

    name: str
    bytes: float
    flops: float = 0.0

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The shortest time the kernel can take."""
        return max(self.bytes / bandwidth, self.flops / rate)


def conv(c: Conv, batch: int, itemsize: int) -> Work:
    """One convolution with bias, residual and ReLU in its epilogue. A strided 1x1 reads only pixels that it uses."""
    read = c.out if c.kernel == 1 else c.size  # height and width of what is read
    x = batch * c.inputs * read**2
    y = batch * c.outputs * c.out**2
    weight = c.outputs * c.inputs * c.kernel**2
    flops = 2 * y * c.inputs * c.kernel**2
    return Work(c.id, (x + weight + y * (2 if c.residual else 1)) * itemsize, flops)


def network(name: str, batch: int, itemsize: int) -> list[Work]:
    """The kernels of torchvision's `name` at 224x224, one entry each."""
    works = [conv(c, batch, itemsize) for c in CONVS for _ in range(c.counts[name])]
    stem = next(c for c in CONVS if c.kernel == 7)
    stem_out, pooled = stem.outputs * stem.out**2, stem.outputs * (stem.out // 2) ** 2
    last = max(c.outputs for c in CONVS if c.counts[name])  # channels at the end
    works.append(Work("maxpool", batch * (stem_out + pooled) * itemsize))
    works.append(Work("avgpool", batch * (last * 7 * 7 + last) * itemsize))
    works.append(Work("fc", (batch * (last + 1000) + last * 1000) * itemsize, 2 * batch * last * 1000))
    return works


def bound(works: Iterable[Work], bandwidth: float, rate: float) -> float:
    """The shortest time in which the kernels can run one after another, in seconds."""
    return sum(work.seconds(bandwidth, rate) for work in works)


def measured(device: torch.device, dtypes: dict[str, torch.dtype]) -> Rates:
    """Measure this device: the bandwidth, and the flop rate of a matmul in each dtype."""
    return Rates(bandwidth(device), {name: peak_flops(device, dtype) for name, dtype in sorted(dtypes.items())})


def bandwidth(device: torch.device) -> float:
    """Bytes/s of torch.add over fp32 tensors too large for any cache: two are read, one is written."""
    elements = 1 << (28 if device.type == "cuda" else 25)
    a, b, c = (torch.ones(elements, device=device) for _ in range(3))
    return 3 * 4 * elements / _fastest(lambda: torch.add(a, b, out=c), device, 7)


def peak_flops(device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 5) -> float:
    """Flop/s of a square matmul too large to be bound by memory."""
    n = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _fastest(lambda: torch.mm(a, b, out=out), device, repeats)


def _fastest(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The shortest of a few calls after a warm-up, in seconds."""
    timer = timer_for(device)
    timer(call)
    return min(timer(call) for _ in range(repeats))
