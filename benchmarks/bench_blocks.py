"""torchvision's residual blocks, swapped and eager, in both layouts: the blocks of ResNet-18 and ResNet-50, batch 8.

The speed-up is over the faster of eager NCHW and eager channels_last. Training is forward and backward, with the
gradients of the input and of every parameter; torch.compile runs with --peers all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torchvision
from torch import nn

import fastres
from measure import Prepared
from peers import NetworkLike, forward_only, judge_call, module_variants, with_gradients
from shapes import BATCH

MODES = {"train": "training, forward+backward", "eval": "eval, forward, no grad"}
BLOCKS = ("layer1.1", "layer2.0", "layer2.1", "layer3.1", "layer4.1")  # one of each stage, and one with a projection
JUDGED = 2  # images of the batch that the referee sees


@cache
def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(torchvision.models, name)(weights=None)


@dataclass(frozen=True)
class BlockCase(NetworkLike):
    what: ClassVar[str] = "blocks"
    weight: ClassVar[float] = 2.0
    ours: ClassVar[tuple[str, ...]] = ("swapped", "swapped_channels_last")
    compiled: ClassVar[tuple[str, ...]] = ("compile_channels_last",)
    network: str
    block: str
    kind: str  # a key of MODES
    batch: int = BATCH
    dtype: str = "fp32"

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.network}-{self.block}"

    @property
    def mode(self) -> str:
        return MODES[self.kind]

    @property
    def size(self) -> int:
        """Height and width of the block's input."""
        stage, index = int(self.block[5]), int(self.block[7])
        return 56 >> (stage - 1 - (index == 0 and stage > 1))

    def shape(self) -> list[int]:
        channels = network(self.network).get_submodule(self.block).conv1.in_channels
        return [self.batch, channels, self.size, self.size]

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"block": self.block}

    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared:
        training = self.kind == "train"
        block = network(self.network).get_submodule(self.block).to(device).train(training)
        x = torch.randn(self.shape(), device=device)
        calls = {}
        for name, (module, images) in module_variants(block, x, peers).items():
            calls[name] = _training_call(module, images) if training else forward_only(module, (images,), grad=False)

        def judge(results):
            ours = tuple(name for name in results if name in self.ours)
            fresh = module_variants(block, x.detach()[:JUDGED], ours)  # the timed ones have updated their statistics
            return {
                name: judge_call(block, module, images, training=training, backward=training)
                for name, (module, images) in fresh.items()
            }

        return Prepared(calls, judge, backend=fastres.explain("bn_act", x).chosen)


def _training_call(module: nn.Module, x: torch.Tensor):
    with torch.no_grad():
        dy = torch.randn_like(module(x))  # [N, C, H/s, W/s], in the layout of the output
    return with_gradients(module, (x.requires_grad_(),), dy, tuple(module.parameters()))


CASES = [BlockCase(name, block, kind) for kind in MODES for name in ("resnet18", "resnet50") for block in BLOCKS]


def test_blocks(case, peer, run_peer):
    run_peer(case, peer)
