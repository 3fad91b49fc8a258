"""The common part of the cases of bn_act and add_relu: a memory-bound operator at one activation of ResNet."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastres
from judge import judge_call
from measure import Case, Prepared
from peers import DTYPES, LAYOUTS, Forward, compiled, forward_only, with_gradients
from shapes import Activation

# Images that the referee sees: on a GPU enough for the kernels of large tensors, on a CPU few, as float64 takes long.
JUDGED = {"cuda": 16, "cpu": 4}


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
