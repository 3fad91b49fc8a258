"""Convergence of swapped networks against eager ones: two networks, fp32 and bf16, three seeds, against float64.

    python benchmarks/convergence.py                    # 200 steps, three seeds: about half an hour on one core
    python benchmarks/convergence.py --resume           # resumes after the last finished run

Every seed trains float64, eager and swapped networks side by side, from the same initial weights on the same batches.

Two correct fp32 runs diverge after a few steps: one ReLU whose input rounds to the other side of 0 changes a gradient
by far more than rounding does, and training amplifies it. Chance decides which of two runs meets such a ReLU first, so
how far a whole run is from float64 says little by itself. Hence three questions, each with its bound:

(a) One step. At the first 20 steps and at every fifth one after that, all networks start from the state of the eager
    fp32 run (parameters and statistics) and compute one step: loss, logits, gradients, statistics. The error is the
    relative L2 distance to float64's. Nothing has accumulated, at any time of the training. Over all states and seeds
    swapped has at most twice eager's error, in the median and, for what is continuous (loss, logits, statistics), in
    RMS; no floor is added. In some states a ReLU flips as above (a gradient's error is more than 10 times eager's
    median): at most twice as many as in eager, plus one.
(b) Many steps. Left to themselves, the parameters and statistics of the swapped runs end at most twice as far from
    float64's as those of the eager runs, in RMS over the seeds. The number of steps for which a run's parameters stay
    within 1e-3 (relative L2) is recorded.
(c) The result. The mean final loss (the last 20 steps) and the mean accuracy on held-out digits differ by no more than
    the seeds do: as many standard errors of the difference as Student's t allows, so that if nothing differs, none of
    the differences in a result exceeds its limit in 19 of 20 cases. An accuracy may always differ by one image.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

import fastres
from fastres.lab.datasets import Digits, digits
from fastres.lab.errors import LabError
from fastres.lab.results import environment, prepare_folder, write_json
from fastres.lab.terminal import progress

# ---- networks and data -----------------------------------------------------------------------------------------------


class StockCifarResNet(nn.Module):
    """``x [N, 3, H, W] -> logits [N, 10]``: the paper's ResNet of 6n + 2 layers, made of torchvision's blocks alone.

    Its shortcuts between stages are projections (B); fastres.models.cifar_resnet has the paper's A, and is fused.
    """

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.layer1 = self._stage(16, 16, n, 1)
        self.layer2 = self._stage(16, 32, n, 2)
        self.layer3 = self._stage(32, 64, n, 2)
        self.fc = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(inplanes: int, planes: int, n: int, stride: int) -> nn.Sequential:
        projection = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        first = BasicBlock(inplanes, planes, stride, projection if stride != 1 else None)
        return nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem(x))  # [N, 16, H, W]
        x = self.layer3(self.layer2(x))  # [N, 64, H / 4, W / 4]
        return self.fc(x.mean((2, 3)))  # [N, 10]


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    size: int  # of its images
    batch: int
    lr: float

    def recipe(self, steps: int) -> Recipe:
        return Recipe(steps, self.batch, self.lr)


NETWORKS = {
    "resnet18": Network(lambda: resnet18(num_classes=10), 32, 16, 0.01),
    "cifar-resnet20": Network(StockCifarResNet, 16, 32, 0.1),
}


def images(size: int) -> Digits:
    """The digits at size x size in three equal channels. [N, 3, size, size]"""
    split = digits(size)
    train, test = (x.expand(-1, 3, -1, -1).contiguous() for x in (split.train_images, split.test_images))
    return Digits(train, split.train_labels, test, split.test_labels)


# ---- training side by side -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    steps: int
    batch: int
    lr: float  # the peak, after a warm-up over a tenth of the steps and before a cosine
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def looks(self) -> list[int]:
        """The steps, from 0, at which errors and distances are measured."""
        return [step for step in range(self.steps) if step < 20 or step % 5 == 4 or step == self.steps - 1]


@dataclass(frozen=True)
class Way:
    """A way to train the network: the dtype, and a change made to the stock network before the first step."""

    dtype: str  # fp64, fp32, or bf16: autocast over fp32 parameters
    prepare: Callable[[nn.Module], object] = lambda net: None


EXACT, GUIDE = "float64", "eager fp32"  # the referee; the run whose states start the steps of (a)
DTYPES = ("fp32", "bf16")


def swapped(dtype: str, **options: str) -> Way:
    return Way(dtype, lambda net: fastres.swap(net, strict=True, **options))


WAYS: dict[str, Way] = {EXACT: Way("fp64")}
for _dtype in DTYPES:
    WAYS |= {f"eager {_dtype}": Way(_dtype), f"swapped {_dtype}": swapped(_dtype)}


class Learner:
    """A network trained in one way."""

    def __init__(self, start: nn.Module, way: Way) -> None:
        self.net = copy.deepcopy(start).to(torch.float64 if way.dtype == "fp64" else torch.float32)
        way.prepare(self.net)
        self.dtype = next(self.net.parameters()).dtype
        self.autocast = way.dtype == "bf16"

    def logits(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] -> [N, 10], in fp32 or fp64."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.net(x.to(self.dtype))
        return logits.to(self.dtype)

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the parameters' gradients for x [N, 3, H, W] and labels y [N]; returns the loss [] and the logits."""
        self.net.train()
        self.net.zero_grad(set_to_none=True)
        logits = self.logits(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        return loss.detach(), logits.detach()

    def parameters(self) -> list[Tensor]:
        return [p.detach() for p in self.net.parameters()]

    def statistics(self) -> list[Tensor]:
        return [b for name, b in self.net.named_buffers() if "running" in name]

    @torch.no_grad()
    def test(self, data: Digits) -> dict[str, float]:
        self.net.eval()
        logits = torch.cat([self.logits(x) for x in data.test_images.split(120)])  # [360, 10]
        right = logits.argmax(1) == data.test_labels
        return {
            "test_loss": float(F.cross_entropy(logits, data.test_labels)),
            "test_accuracy": float(right.double().mean()),
        }


def distance(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The relative L2 distance of two lists of tensors, each taken as one vector, in float64."""
    apart = sum(float((a.double() - b).square_().sum()) for a, b in zip(ours, exact, strict=True))
    return math.sqrt(apart / sum(float(torch.linalg.vector_norm(b)) ** 2 for b in exact))


def one_step(learners: Mapping[str, Learner], state: Mapping[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Any]:
    """The errors of one step against float64's, by way, from the same state on the same batch; see (a)."""
    found: dict[str, Any] = {}
    for name, learner in learners.items():  # float64 first
        learner.net.load_state_dict(state)
        loss, logits = learner.gradients(x, y)
        vectors = {
            "loss": [loss[None]],
            "logits": [logits],
            "gradients": [p.grad for p in learner.net.parameters()],
            "statistics": learner.statistics(),
        }
        if name == EXACT:
            exact = vectors
        else:
            found[name] = {kind: distance(vector, exact[kind]) for kind, vector in vectors.items()}
    return found


def train_together(
    network: Callable[[], nn.Module],
    data: Digits,
    seed: int,
    recipe: Recipe,
    ways: Mapping[str, Way] = WAYS,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train `network` in every way, side by side, from the same initial weights on the same batches.

    Args:
        ways: EXACT first, GUIDE among them.
        on_step: called after each step with its number, from 1, and float64's loss.

    Returns:
        "looks": the steps measured, from 0. "ways": by way "loss" at each step, "test_loss", "test_accuracy"; and at
        each look "errors" (of one step from the guide's state: loss, logits, gradients, statistics) and "distances" (of
        the run itself from the float64 run, after the step: parameters, statistics).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = network()
    rng = torch.Generator().manual_seed(seed)
    runs = {name: Learner(start, way) for name, way in ways.items()}
    judged = {name: Learner(start, way) for name, way in ways.items()}
    optimizers = {
        name: torch.optim.SGD(run.net.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
        for name, run in runs.items()
    }
    one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, pct_start=0.1, cycle_momentum=False)
    schedules = [one_cycle(optimizer, recipe.lr, recipe.steps) for optimizer in optimizers.values()]
    found: dict[str, Any] = {name: {"loss": []} for name in ways}

    def record(name: str, group: str, values: Mapping[str, float]) -> None:
        for kind, value in values.items():
            found[name].setdefault(group, {}).setdefault(kind, []).append(value)

    exact, looks = runs[EXACT], recipe.looks()
    for step in range(recipe.steps):
        chosen = torch.randperm(len(data.train_labels), generator=rng)[: recipe.batch]
        x, y = data.train_images[chosen], data.train_labels[chosen]  # [batch, 3, size, size], [batch]
        if step in looks:
            for name, errors in one_step(judged, runs[GUIDE].net.state_dict(), x, y).items():
                record(name, "errors", errors)
        for name, run in runs.items():
            loss, _ = run.gradients(x, y)
            optimizers[name].step()
            found[name]["loss"].append(float(loss))
        for schedule in schedules:
            schedule.step()
        for name, run in runs.items() if step in looks else ():
            if run is not exact:
                parameters = distance(run.parameters(), exact.parameters())
                statistics = distance(run.statistics(), exact.statistics())
                record(name, "distances", {"parameters": parameters, "statistics": statistics})
        if on_step is not None:
            on_step(step + 1, found[EXACT]["loss"][-1])
    for name, run in runs.items():
        found[name] |= run.test(data)
    return {"seed": seed, "looks": looks, "ways": found}


# ---- the program -----------------------------------------------------------------------------------------------------


def settings(name: str, steps: int) -> dict[str, Any]:
    """Everything that a run of network `name` depends on, except its seed."""
    network = NETWORKS[name]
    versions = {"torch": torch.__version__, "fastres": fastres.__version__}
    facts = {"network": name, "size": network.size, **asdict(network.recipe(steps))}
    return facts | {"threads": torch.get_num_threads(), "versions": versions}


def cached(path: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The run that an earlier call left at `path`, if it had these settings."""
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return kept["run"] if kept["settings"] == wanted else None


def rounded(value: Any) -> Any:
    """Round every float to six significant digits; more would mean nothing."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.6g}"))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--results", type=Path, default=Path("out/bench"), help="output folder, created if missing")
    parser.add_argument("--resume", action="store_true", help="reuse the runs that an earlier call finished")
    options = parser.parse_args(arguments)
    if options.steps < 20 or options.seeds < 2:
        parser.error(f"got --steps {options.steps} --seeds {options.seeds}, expected at least 20 and 2")
    from rich.console import Console

    from convergence_report import document, text, write

    console, cache = Console(), options.results / "convergence-runs"
    try:
        prepare_folder(options.results, [])
        prepare_folder(cache, [])
        where = environment(torch.device("cpu"), " ".join(["python", "benchmarks/convergence.py", *arguments]))
        runs: dict[str, list[dict[str, Any]]] = {}
        for name in options.networks:
            data = images(NETWORKS[name].size)
            for seed in range(options.seeds):
                path, wanted = cache / f"{name}-{options.steps}-seed{seed}.json", settings(name, options.steps)
                run = cached(path, wanted) if options.resume else None
                if run is None:
                    with progress(console, f"{name} seed {seed}") as report:
                        run = train_together(
                            NETWORKS[name].make,
                            data,
                            seed,
                            NETWORKS[name].recipe(options.steps),
                            on_step=lambda step, loss, report=report: report(step, options.steps, f"loss {loss:.3f}"),
                        )
                    run = rounded(run)
                    write_json(path, {"settings": wanted, "run": run})
                runs.setdefault(name, []).append(run)
        data = document(runs, {name: settings(name, options.steps) for name in runs}, where)
        paths = write(data, options.results)
    except LabError as error:
        print(f"convergence: {error}", file=sys.stderr)
        return 1
    for line in [*text(data), *map(str, paths)]:
        print(line)
    return 0 if all(verdict["passed"] for verdict in data["verdicts"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
