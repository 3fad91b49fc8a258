"""The calls that a benchmark compares, their correctness verdicts, and what the cases of bn_act and add_relu share.

Eager is what torchvision's blocks do: the addition and the ReLU are in place where autograd allows it. A peer passes
when its error against float64 is at most twice eager's in RMS and four times eager's at the maximum, per output,
gradient and running statistic, above the floor of fastres.verify.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fastres
from fastres.verify import Row
from measure import Case, Prepared, Verdict
from shapes import Activation

LEVELS = ("eager", "quick", "all")  # eager; also the engines, torch.compile in a few cases; torch.compile everywhere
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Images that the referee sees: on a GPU enough for the kernels of large tensors, on a CPU few, as float64 takes long.
JUDGED = {"cuda": 16, "cpu": 4}

Forward = Callable[..., Tensor]
Call = Callable[[], tuple[Tensor, ...]]


def backend_of(peer: str) -> str | None:
    """The backend of ours that a peer of an operator asks for; None for eager and torch.compile."""
    return {"fastres": "auto", "eager": None, "compile": None}.get(peer, peer)


def words(t: Tensor) -> Tensor:
    """View a dense channels_last tensor as 4-byte integers in memory order, to read it at full bandwidth."""
    return t.permute(0, 2, 3, 1).reshape(-1).view(torch.int32)


def compiled(forward: Any) -> Any:
    """torch.compile in its default mode; it compiles at the first call, and in a training call for backward too."""
    return torch.compile(forward, dynamic=False, fullgraph=True)


def with_gradients(forward: Forward, inputs: tuple[Tensor, ...], dy: Tensor, parameters: Any = ()) -> Call:
    """A call that returns y and its gradients for the inputs that require one and the parameters."""
    leaves = (*(t for t in inputs if t.requires_grad), *parameters)

    def call() -> tuple[Tensor, ...]:
        y = forward(*inputs)
        return y, *torch.autograd.grad(y, leaves, dy)

    return call


def forward_only(forward: Forward, inputs: tuple[Tensor, ...], grad: bool) -> Call:
    """A call that returns (y,), with gradients enabled or not."""

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(grad):
            return (forward(*inputs),)

    return call


def conv_tensors(
    c: Any, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random x, weight, bias and residual of a shapes.Conv in one dtype, images and weights in channels_last.

    The weights are scaled so that the output has the size of x; the residual is None unless the convolution ends a
    block.
    """

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device).mul_(scale).to(dtype).contiguous(memory_format=torch.channels_last)

    x = tensor(batch, c.inputs, c.size, c.size)
    weight = tensor(c.outputs, c.inputs, c.kernel, c.kernel, scale=(c.inputs * c.kernel**2) ** -0.5)
    bias = torch.randn(c.outputs, device=device).to(dtype)
    return x, weight, bias, tensor(batch, c.outputs, c.out, c.out) if c.residual else None


def module_variants(module: nn.Module, x: Tensor, names: tuple[str, ...]) -> dict[str, tuple[nn.Module, Tensor]]:
    """Copies of a module by name, each with the input in its layout.

    Names: eager, swapped, swapped_min (memory="min") or compile; NCHW, or with the suffix _channels_last in that
    layout.
    """
    variants = {}
    for name in names:
        layout = LAYOUTS["channels_last" if name.endswith("channels_last") else "nchw"]
        variant: Any = copy.deepcopy(module)
        variant = variant.to(memory_format=layout)
        if name.startswith("swapped"):
            fastres.swap(variant, strict=True, memory="min" if name.startswith("swapped_min") else "default")
        if name.startswith("compile"):
            variant = compiled(variant)
        variants[name] = variant, x.contiguous(memory_format=layout)
    return variants


# ---- verdicts --------------------------------------------------------------------------------------------------------


def judge_call(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    inputs: Any,
    *,
    backward: bool,
    training: bool | None = None,
) -> Verdict:
    """Run a module or an operator on the inputs, forward and, on request, backward, and judge its worst tensor.

    `training` puts two modules into training or eval mode; it is None for functions.
    """
    found = fastres.verify(reference, candidate, inputs, training=training, backward=backward)
    worst = found.worst
    message = "" if found.passed or worst is None else f"{worst.name}: {_reason(worst)}"
    return Verdict(found.passed, found.error_ratio, message)


def _reason(row: Row) -> str:
    return f"{row.message}, ratio {row.ratio:.3g}, at most 2"


class _Same(nn.Module):
    """Returns one output under several names, so that a single run of the reference serves every peer."""

    def __init__(self, function: Callable[..., Any], names: tuple[str, ...]) -> None:
        super().__init__()
        self.function, self.names = function, names

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(self.names, self.function(*inputs))


def judge_outputs(
    reference: Callable[..., Any], inputs: tuple[Tensor, ...], outputs: Mapping[str, Tensor]
) -> dict[str, Verdict]:
    """Judge what several peers have returned for the same inputs; verdicts by name.

    Args:
        reference: the network in eval mode, in float32 or finer; or a function of the inputs.
        inputs: what all the peers were given, in the working dtype. The first decides that dtype.
        outputs: one tensor of each peer, in the working dtype.
    """
    if not outputs:
        return {}
    how = {"backward": False, "training": False, "dtype": inputs[0].dtype, "calibrate_bn": False}
    found = fastres.verify(_Same(reference, tuple(outputs)), lambda *_: dict(outputs), inputs, **how)
    return {
        row.name.removeprefix("output."): Verdict(row.passed, row.ratio, "" if row.passed else _reason(row))
        for row in found.rows
    }


# ---- what cases share ------------------------------------------------------------------------------------------------


class NetworkLike(Case):
    """A case of a network of torchvision or a part of one, against eager in both layouts."""

    baselines: ClassVar[tuple[str, ...]] = ("eager", "eager_channels_last")
    network: str
    batch: int
    dtype: str

    def shape(self) -> list[int]:
        """Of the input. [N, C, H, W]"""
        return [self.batch, 3, 224, 224]

    def facts(self) -> dict[str, Any]:
        return {"network": self.network, "shape": self.shape(), "layout": "both", "dtype": self.dtype}

    def images(self) -> int:
        return self.batch


# ---- a memory-bound operator at one activation of ResNet -------------------------------------------------------------


class ActivationCase(Case):
    """One operator, activation, mode, layout and dtype. A dataclass derived from it declares the fields below."""

    operator: ClassVar[str]
    modes: ClassVar[dict[str, str]]
    quick_compile: ClassVar[tuple[str, ...]]  # activations that torch.compile runs at with --peers quick
    activation: Activation
    kind: str  # a key of modes
    layout: str
    dtype: str
    batch: int

    @property
    def mode(self) -> str:
        return self.modes[self.kind]

    def facts(self) -> dict[str, Any]:
        return {
            "shape": list(self.activation.shape(self.batch)),
            "layout": self.layout,
            "dtype": self.dtype,
            "role": self.activation.role,
            "counts": self.activation.counts,
        }

    def quick(self) -> bool:
        return self.layout == "channels_last" and self.dtype == "fp32" and self.activation.size in self.quick_compile

    @abstractmethod
    def passes(self) -> int:
        """Count how often the fused kernels read or write a tensor of the activation's size in one call."""

    def bytes_moved(self) -> int | None:
        return self.passes() * math.prod(self.activation.shape(self.batch)) * DTYPES[self.dtype].itemsize

    def tensor(self, device: torch.device) -> Tensor:
        """A random activation in the case's dtype and layout. [N, C, H, W]"""
        x = torch.randn(self.activation.shape(self.batch), device=device)
        return x.to(DTYPES[self.dtype]).contiguous(memory_format=LAYOUTS[self.layout])

    @abstractmethod
    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """The operator's tensors, x first; those with a gradient require it."""

    @abstractmethod
    def forward_of(self, peer: str) -> Forward:
        """A peer's function of the inputs: eager's, also for torch.compile, or ours with the backend it names."""

    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared:
        inputs, backward, grad = self.inputs(device), self.kind == "train", self.kind == "train-forward"
        dy = self.tensor(device)
        forwards = {peer: self.forward_of(peer) for peer in peers}
        if "compile" in forwards:
            forwards["compile"] = compiled(forwards["compile"])
        calls = {
            peer: with_gradients(forward, inputs, dy) if backward else forward_only(forward, inputs, grad)
            for peer, forward in forwards.items()
        }

        def judge(results):
            count = self.batch if "compile" in results else JUDGED[device.type]  # another shape would compile again
            few = [t.detach()[:count] if t.ndim == 4 else t.detach() for t in inputs]
            few = tuple(f.requires_grad_(t.requires_grad) for f, t in zip(few, inputs, strict=True))
            ours = [peer for peer in results if peer not in self.baselines]
            return {peer: judge_call(forwards["eager"], forwards[peer], few, backward=backward) for peer in ours}

        return Prepared(calls, judge, backend=fastres.explain(self.operator, inputs[0]).chosen)
