"""Inference of torchvision's ResNet-50 and ResNet-18 at 224x224: frozen by fastres, against every installed engine.

Batch 1, 8 and 32, fp32 and bf16. The weights are random and the BN statistics come from images, so activations have the
scale that training gives them. The speed-up is over the faster of eager NCHW and eager channels_last; the row of every
other engine also shows the speed-up of fastres over it. A peer that is not installed or cannot run is listed with the
reason and the command that installs it.

torch.compile takes minutes per network: it runs at ResNet-50, batch 8, and with --peers all everywhere.

The verdict is on the logits of the timed calls, for the first images of the batch, against float64.

    pytest benchmarks/bench_networks.py -k resnet50-inference-fp32-batch8
    pytest benchmarks/bench_networks.py -k "bf16 and batch1-" --peers all
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import roofline
from fastres.verify import calibrate
from measure import Prepared
from peers import DTYPES, NetworkLike, judge_outputs
from roofline import Work
from runtimes import BUILDERS

JUDGED = 4  # images of the batch that the referee sees
GPU_COMPILED = ("compile_max_autotune",) if torch.cuda.is_available() else ()
GPU_RUNTIMES = ("cudagraph", "jax") if torch.cuda.is_available() else ()


@cache
def network(name: str, device: torch.device) -> nn.Module:
    """The network in eval mode, with the same weights and statistics in every case."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None).eval().requires_grad_(False)
    calibrate(net, torch.randn(8, 3, 224, 224))
    return net.to(device)


@dataclass(frozen=True)
class NetworkCase(NetworkLike):
    what: ClassVar[str] = "networks"
    weight: ClassVar[float] = 5.0
    mode: ClassVar[str] = "inference"
    ours: ClassVar[tuple[str, ...]] = ("frozen",)
    compiled: ClassVar[tuple[str, ...]] = ("compile", "compile_freezing", *GPU_COMPILED)
    network: str
    dtype: str
    batch: int

    @property
    def runtimes(self) -> tuple[str, ...]:
        parallel = ("openvino_throughput",) if self.batch > 1 else ()
        return ("torchscript", "onnxruntime", "openvino", *parallel, *GPU_RUNTIMES)

    @property
    def id(self) -> str:
        return f"{self.network}-inference-{self.dtype}-batch{self.batch}"

    def quick(self) -> bool:
        return self.network == "resnet50" and self.batch == 8

    def absent(self, level: str) -> dict[str, str]:
        here = self.peers(level)
        return {name: "not run without --peers all" for name in self.optional if name not in here}

    def work(self) -> list[Work]:
        return roofline.network(self.network, self.batch, DTYPES[self.dtype].itemsize)

    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared:
        net = network(self.network, device)
        images = torch.randn(self.batch, 3, 224, 224, device=device).to(DTYPES[self.dtype])

        def judge(results):
            logits = {name: self.logits(y, images)[:JUDGED] for name, y in results.items()}
            return judge_outputs(net, (images[:JUDGED],), {n: y for n, y in logits.items() if n not in self.baselines})

        return Prepared({}, judge, build={name: partial(BUILDERS[name], net, images) for name in peers})

    @staticmethod
    def logits(result: Any, images: Tensor) -> Tensor:
        """An engine's answer as a tensor in eager's dtype. [N, classes]"""
        result = result if isinstance(result, Tensor) else torch.from_numpy(np.array(result))
        return result.to(images.device, images.dtype)


CASES = [
    NetworkCase(network, dtype, batch)
    for network in ("resnet50", "resnet18")
    for dtype in ("fp32", "bf16")
    for batch in (1, 8, 32)
]


def test_networks(case, peer, run_peer):
    run_peer(case, peer)
