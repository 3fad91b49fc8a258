"""A training step of torchvision's ResNet-18 and ResNet-50, swapped and eager: batch 8 at 224x224, fp32 and bf16.

The step is zero_grad, forward, cross-entropy, backward and SGD with momentum; bf16 is autocast. Swapped runs in both
layouts and with memory="min". The speed-up is over the faster of eager NCHW and eager channels_last; torch.compile runs
with --peers all (a network takes minutes to compile). The MB of a row are the peak of torch's allocator during a step,
minus what was in use before it.

The verdict is on the outputs and the statistics of a training-mode forward pass. Gradients are judged block by block,
in bench_blocks.py: over a whole network two correct answers differ wherever rounding decides a ReLU's mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fastres
from measure import Prepared
from peers import DTYPES, NetworkLike, judge_call, module_variants
from shapes import BATCH


@dataclass(frozen=True)
class TrainCase(NetworkLike):
    what: ClassVar[str] = "train"
    weight: ClassVar[float] = 40.0
    mode: ClassVar[str] = "training step"
    ours: ClassVar[tuple[str, ...]] = ("swapped", "swapped_channels_last", "swapped_min_channels_last")
    weighed: ClassVar[bool] = True
    compiled: ClassVar[tuple[str, ...]] = ("compile_channels_last",)
    network: str
    size: int = 224
    batch: int = BATCH
    judged: tuple[int, int] = (4, 128)  # images and their size for the referee, which runs in float64
    dtype: str = "fp32"  # bf16 is autocast, for every peer

    @property
    def id(self) -> str:
        dtype = "" if self.dtype == "fp32" else f"-{self.dtype}"
        return f"{self.network}-{self.batch}x3x{self.size}x{self.size}{dtype}"

    def shape(self) -> list[int]:
        return [self.batch, 3, self.size, self.size]

    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared:
        net = getattr(torchvision.models, self.network)(weights=None).to(device)
        images = torch.randn(self.shape(), device=device)
        labels = torch.randint(1000, (self.batch,), device=device)
        variants = module_variants(net, images, peers)
        calls = {name: _step(self._cast(module), x, labels) for name, (module, x) in variants.items()}
        few, size = self.judged

        def judge(results):
            ours = tuple(name for name in results if name in self.ours)
            fresh = module_variants(net, torch.randn(few, 3, size, size, device=device), ours)
            return {
                name: judge_call(self._cast(net), self._cast(module), x, training=True, backward=False)
                for name, (module, x) in fresh.items()
            }

        return Prepared(calls, judge, backend=fastres.explain("bn_act", images).chosen)

    def _cast(self, module: nn.Module) -> nn.Module:
        return module if self.dtype == "fp32" else Autocast(module, DTYPES[self.dtype])


class Autocast(nn.Module):
    """Runs a module under autocast with logits in float32; the referee's float64 passes through unchanged."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, self.dtype):
            y = self.module(x)
        return y if y.dtype == torch.float64 else y.float()


def _step(module: nn.Module, images: torch.Tensor, labels: torch.Tensor):
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def call() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(module(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


CASES = [TrainCase(network, dtype=dtype) for dtype in ("fp32", "bf16") for network in ("resnet18", "resnet50")]


def test_train(case, peer, run_peer):
    run_peer(case, peer)
