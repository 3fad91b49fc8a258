"""The cost of a frozen network's executor without its operators: ResNet at batch 1, many calls with little work each.

`frozen` is a whole call. `operators` is the time spent inside the operators of one call, `beside_operators` the rest of
the same call: the signature, the checks, the Python between two operators, with the caches as cold as a network leaves
them, and the two clock readings around each operator. So it is an upper bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import sub
from typing import Any, ClassVar

import torch
import torchvision

import fastres
from fastres.verify import calibrate
from measure import Case, Prepared, Verdict


class Clocked:
    """A frozen network whose plan adds up the time inside its operators."""

    def __init__(self, frozen: fastres.FrozenModel, x: torch.Tensor) -> None:
        self.frozen, self.x, self.inside = frozen, x, 0.0
        frozen(x)
        prepared = frozen.prepared(x)
        assert prepared is not None
        self.executor = prepared[0]
        ((self.key, self.plan),) = self.executor._plans.items()
        self.timed = self.plan._replace(calls=[c._replace(function=self.clocked(c.function)) for c in self.plan.calls])

    def clocked(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            begin = time.perf_counter()
            output = operator(*args)
            self.inside += time.perf_counter() - begin
            return output

        return run

    def call(self) -> tuple[float, float, torch.Tensor]:
        """(seconds of a call, of them inside the operators, the output)."""
        self.inside = 0.0
        self.executor._plans = {self.key: self.timed}
        try:
            begin = time.perf_counter()
            output = self.frozen(self.x)
            return time.perf_counter() - begin, self.inside, output
        finally:
            self.executor._plans = {self.key: self.plan}

    def plain(self) -> float:
        begin = time.perf_counter()
        self.frozen(self.x)
        return time.perf_counter() - begin


@dataclass(frozen=True)
class ExecutorCase(Case):
    network: str

    what: ClassVar[str] = "executor"
    mode: ClassVar[str] = "inference"
    baselines: ClassVar[tuple[str, ...]] = ("operators",)
    ours: ClassVar[tuple[str, ...]] = ("frozen",)
    compiled: ClassVar[tuple[str, ...]] = ()
    alone: ClassVar[tuple[str, ...]] = ("beside_operators",)

    @property
    def id(self) -> str:
        return f"{self.network}-batch1"

    def facts(self) -> dict[str, Any]:
        return {"network": self.network, "layout": "as measured", "dtype": "fp32", "batch": 1}

    def images(self) -> int | None:
        return 1

    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared:
        if device.type != "cpu":
            raise RuntimeError("measured on a CPU; a GPU replays CUDA graphs")
        torch.manual_seed(0)
        x = torch.randn(1, 3, 224, 224)
        net = getattr(torchvision.models, self.network)().eval()
        calibrate(net, torch.randn(4, 3, 64, 64))
        clocked = Clocked(fastres.freeze(net, x, verify=False), x)

        spent: list[float] = []
        seconds = {
            "operators": lambda: clocked.call()[1],
            "frozen": clocked.plain,
            "beside_operators": lambda: sub(*clocked.call()[:2]),
        }
        calls = {name: lambda one=one: spent.append(one()) for name, one in seconds.items()}

        def timer(call: Callable[[], Any]) -> float:
            spent.clear()
            call()
            return sum(spent)

        def judge(results: Any) -> dict[str, Verdict]:
            same = torch.equal(clocked.call()[2], clocked.frozen(x))
            return {"frozen": Verdict(same, None, "" if same else "the clocked plan answers otherwise")}

        return Prepared(calls, judge, timer=timer)


CASES = [ExecutorCase("resnet18"), ExecutorCase("resnet50")]


def test_executor(case, peer, run_peer):
    run_peer(case, peer)
