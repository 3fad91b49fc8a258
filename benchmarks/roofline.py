"""The roofline: no kernel is faster than its bytes over the bandwidth, nor than its flops over the flop rate.

    bytes   each operand read from memory once, the result written once; nothing stays in a cache between kernels
    flops   2 * N * out^2 * outputs * kernel^2 * inputs for a convolution, 0 for what only moves data
    bound   sum over kernels of max(bytes / bandwidth, flops / rate): kernels run one after another

A network's kernels are those of an engine that fuses each convolution with its bias, residual and ReLU, and nothing
wider: the stem's pooling, the average pooling and the classifier stand alone. An engine that fuses whole blocks may
beat this bound, and so may one whose activations stay in a large cache: more than 100 % is then no error.

The rates are measured in the same session (`measured`), so that "% of bound" says what this machine allowed today.
Source: Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model", CACM 2009.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from fastres.lab.timing import timer_for
from shapes import CONVS, Conv


@dataclass(frozen=True)
class Rates:
    """What the hardware can do: bytes/s, and flop/s by dtype ("fp32", "bf16", ...)."""

    bandwidth: float
    flops: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What one kernel has to do in one call."""

    name: str
    bytes: float
    flops: float = 0.0

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The bound on one kernel's time."""
        return max(self.bytes / bandwidth, self.flops / rate)


def conv(c: Conv, batch: int, itemsize: int) -> Work:
    """One convolution with bias, residual and ReLU in its epilogue. A strided 1x1 reads only the pixels it uses."""
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
    """Seconds that the kernels need at the least, one after another."""
    return sum(work.seconds(bandwidth, rate) for work in works)


def measured(device: torch.device, bandwidth: float, dtypes: dict[str, torch.dtype]) -> Rates:
    """The rates of this device, the flop rates by a matmul in each of the dtypes."""
    return Rates(bandwidth, {name: peak_flops(device, dtype) for name, dtype in sorted(dtypes.items())})


def peak_flops(device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 5) -> float:
    """Flop/s of a square matmul too large to be bound by memory; the best of a few."""
    n = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    timer = timer_for(device)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    timer(multiply)
    return 2 * n**3 / min(timer(multiply) for _ in range(repeats))
