"""The convolutions that convs.py measures, and what it times at each: backends, kernels, and what they compete with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.functional import conv_act
from fastres.ops import _conv_tiles
from gpu_run.program import memory
from peers import DTYPES, conv_tensors, words
from shapes import BLOCK_END, CONVS, INNER, Conv

BACKENDS = ("cudnn", "triton")
ON_CPU = ("reference", "cpu", "triton")

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Layer:
    """A convolution to measure, with bias and ReLU, and with a residual if it ends a block."""

    conv: Conv
    dtype: str
    batch: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the form of _conv_tiles.Problem."""
        c = self.conv
        tail = (c.stride, c.stride, c.padding, c.padding, 1, 1)
        return self.batch, c.size, c.size, c.inputs, c.outputs, c.kernel, c.kernel, c.out, c.out, *tail

    @property
    def key(self) -> tuple[Any, ...]:
        return self.shape, self.dtype, self.conv.residual

    def problem(self, device: torch.device) -> _conv_tiles.Problem:
        return _conv_tiles.Problem(capability(device), DTYPES[self.dtype], self.shape, self.conv.residual)

    @property
    def title(self) -> str:
        return f"{self.conv.id}-{self.dtype}-batch{self.batch}"

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x, weight, bias and residual, as conv_act passes them on."""
        torch.manual_seed(0)
        return conv_tensors(self.conv, self.batch, DTYPES[self.dtype], device)


def planned(batch: int) -> list[Layer]:
    """The layers to measure, ResNet-50's most frequent first; all but the stem, whose 3 channels no kernel supports."""
    convs = sorted((c for c in CONVS if c.inputs % 8 == 0), key=lambda c: (-c.resnet50, -c.resnet18))
    found: dict[Any, Layer] = {}
    for dtype, n in itertools.product(("fp16", "bf16", "fp32"), (batch, 32, 1)):
        for c in convs:
            layer = Layer(c, dtype, n)
            found.setdefault(layer.key, layer)
    return list(found.values())


def tiny() -> list[Layer]:
    conv, end = Conv(16, 8, 3, 2, 6, INNER, 0, 1), Conv(8, 16, 1, 1, 4, BLOCK_END, 1, 1)
    return [Layer(conv, "fp32", 2), Layer(end, "fp16", 2)]


def batch_for(device: torch.device) -> int:
    gib = memory(device) >> 30
    return 256 if gib >= 60 else 128 if gib >= 30 else 32


# ---- candidates ------------------------------------------------------------------------------------------------------


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def own_kernels(layer: Layer, device: torch.device) -> Sequence[_conv_tiles.Kernel]:
    return _conv_tiles.taken_by(layer.problem(device))[0] if device.type == "cuda" else ()


def native(kernel: _conv_tiles.Kernel, layer: Layer, tensors: Sequence[Tensor | None], y: Tensor) -> None:
    y.set_(torch.ops.fastres._conv_act_native.default(*tensors, *layer.shape[9:], "relu", kernel.index))  # no copy


def candidates(layer: Layer, tensors: Sequence[Any], y: Tensor, device: torch.device) -> dict[str, Call]:
    """The backends by name, and each kernel of ours, which writes y."""
    where = {"stride": layer.conv.stride, "padding": layer.conv.padding}
    found: dict[str, Call] = {}
    for name in BACKENDS if device.type == "cuda" else ON_CPU:
        found[name] = lambda name=name: conv_act(*tensors, **where, act="relu", backend=name)

    def launch(kernel: _conv_tiles.Kernel) -> Tensor:
        native(kernel, layer, tensors, y)
        return y

    for kernel in own_kernels(layer, device):
        found[kernel.name] = lambda kernel=kernel: launch(kernel)
    return found


def yardsticks(layer: Layer, tensors: Sequence[Any], device: torch.device, tuned: bool) -> dict[str, Call]:
    """Calls of cuDNN to compare with, see convs.py; none on a CPU."""
    if device.type != "cuda":
        return {}
    (x, weight, bias, residual), c = tensors, layer.conv
    where = (c.padding,) * 2, (c.stride,) * 2, (1, 1), 1
    plain = torch.ops.aten.cudnn_convolution.default
    found: dict[str, Call] = {
        "conv": lambda: plain(x, weight, *where, False, False, True),
        "conv_bias": lambda: F.conv2d(x, weight, bias, c.stride, c.padding),
    }
    if tuned:  # allow_tf32 has no effect on 16 bits, but keeps its plans apart from the others'
        row = bias.view(1, -1, 1, 1)
        found["conv_bias_tuned"] = lambda: plain(x, weight, *where, True, False, False).add_(row)
    if residual is not None:
        to_read = words(residual)
        found["read"] = lambda: to_read.max()
    return found


def reference(layer: Layer, tensors: Sequence[Any]) -> Tensor:
    """The layer's answer in IEEE fp32, rounded once."""
    x, weight, bias, residual = (None if t is None else t.float() for t in tensors)
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        z = F.conv2d(x, weight, bias, layer.conv.stride, layer.conv.padding)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    return torch.relu_(z if residual is None else z.add_(residual)).to(tensors[0].dtype)
