"""Measure the figures of a GPU, the most important first: rates, operators, whole networks, training.

    rates       the bandwidth, and a matmul's rate by dtype: what the bounds of this run are made of
    operators   fastres against eager and each of its own backends by name, with the L2 cache flushed before every call
    networks    frozen inference and swapped training against the peers, from an idle GPU as a user calls them

A case starts only if there is time for it; if the time still runs out, the case is lost and the file has everything
finished before. A case that is measured again with more peers replaces the earlier one.

    python -m gpu_run.bench --out bench.json --seconds 200
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import report
import roofline
from bench_add_relu import AddReluCase
from bench_bn_act import BnActCase
from bench_conv_act import ConvActCase
from fastres.lab.errors import LabError
from fastres.lab.results import write_json
from fastres.lab.timing import Timer
from fastres.ops._conv_backends import tf32_allowed
from gpu_run.program import Clocks, Program, cold_timer, memory
from measure import TINY, Case, Effort, Result, measure, one_line
from pages import load
from peers import DTYPES
from plot import draw
from roofline import Rates
from shapes import BLOCK_END, CONVS, Activation, Conv, distinct, with_role

OPERATORS = Effort(0.15, 25, min_rounds=9, sample_s=0.0)
NETWORKS = Effort(0.4, 25, min_rounds=7, sample_s=0.0)  # times the case's weight, 5
TRAINING = Effort(0.06, 15, min_rounds=7, sample_s=0.0)  # times 40
OURS = ("triton", "cuda")  # backends measured in addition to the chosen one


@dataclass(frozen=True)
class Item:
    """A case with its peers, how long to time it, and roughly how long it takes at most."""

    case: Case
    peers: tuple[str, ...]
    effort: Effort
    seconds: float
    cold: bool = False  # flush the L2 cache


def operator(case: Case, compiled: bool = False) -> Item:
    backends = ("cudnn", *OURS) if case.what == "conv_act" else OURS
    peers = (*case.baselines, *case.ours, *backends, *case.alone, *(case.compiled if compiled else ()))
    return Item(case, peers, OPERATORS, 25.0 if compiled else 4.0, cold=True)


LAST = "channels_last"
ENDS = [a for a in with_role(BLOCK_END) if a.resnet50]
CONVS50 = sorted((c for c in CONVS if c.resnet50), key=lambda c: -c.resnet50)  # the most frequent first


def bn_act(a: Activation, batch: int, kind: str = "train", layout: str = LAST, dtype: str = "fp16") -> BnActCase:
    return BnActCase(a, kind, "residual-relu", layout, dtype, batch)


def first_operators(batch: int) -> Iterator[Item]:
    """The block ends of ResNet-50, and its most frequent convolutions."""
    for a in ENDS:
        yield operator(bn_act(a, batch))
        yield operator(bn_act(a, batch, "eval"))
        yield operator(AddReluCase(a, "train", LAST, "fp16", batch))
    for c in CONVS50[:8]:
        yield operator(ConvActCase(c, "fp16", batch))


def other_operators(batch: int) -> Iterator[Item]:
    """The other shapes, layouts and dtypes; torch.compile at the largest block end."""
    for c in CONVS50[8:]:
        yield operator(ConvActCase(c, "fp16", batch))
    for a in distinct():
        if a not in ENDS:
            yield operator(bn_act(a, batch))
    for layout, dtype in (("nchw", "fp16"), (LAST, "fp32"), (LAST, "bf16")):
        for a in ENDS:
            yield operator(bn_act(a, batch, layout=layout, dtype=dtype))
    yield operator(bn_act(ENDS[0], batch), compiled=True)
    yield operator(AddReluCase(ENDS[0], "train", LAST, "fp16", batch), compiled=True)
    for dtype, n in (("fp16", 1), ("bf16", batch), ("fp32", batch)):
        for c in CONVS50:
            yield operator(ConvActCase(c, dtype, n))


def networks(batch: int) -> tuple[list[Item], list[Item], list[Item]]:
    """Inference and training: the first figures, the others, and those with engines that take long to compile."""
    from bench_networks import NetworkCase
    from bench_train import TrainCase

    quick, slow = ("torchscript", "cudagraph"), ("jax", "onnxruntime", "compile", "compile_freezing")

    def inference(name: str, dtype: str, n: int, *peers: str, seconds: float = 12.0) -> Item:
        case = NetworkCase(name, dtype, n)
        return Item(case, (*case.baselines, *case.ours, *quick, *peers), NETWORKS, seconds)

    def training(name: str, dtype: str, n: int, *peers: str, seconds: float = 15.0) -> Item:
        case = TrainCase(name, batch=n, dtype=dtype)
        return Item(case, (*case.baselines, *case.ours, *peers), TRAINING, seconds)

    first = [
        inference("resnet50", "fp16", 2 * batch),
        training("resnet50", "bf16", 2 * batch),
        inference("resnet50", "fp16", 1),
        inference("resnet18", "fp16", 2 * batch),
    ]
    others = [
        training("resnet50", "fp32", batch),
        inference("resnet50", "fp16", 32),
        inference("resnet18", "fp16", 1),
        training("resnet18", "bf16", batch),
        inference("resnet50", "fp32", 2 * batch),
        inference("resnet50", "bf16", 2 * batch),
    ]
    long = [
        inference("resnet50", "fp16", 2 * batch, *slow, seconds=80.0),
        inference("resnet50", "fp16", 1, *slow, seconds=80.0),
        training("resnet50", "bf16", 2 * batch, "compile_channels_last", seconds=70.0),
        inference("resnet50", "fp16", 2 * batch, *slow, "compile_max_autotune", seconds=200.0),
    ]
    return first, others, long


def dry() -> Iterator[Item]:
    """One operator of each kind, as small as possible, on a CPU."""
    a = Activation(8, 6, 6, BLOCK_END, 1, 1)
    c = Conv(8, 8, 3, 1, 6, BLOCK_END, 1, 1)
    for case in (bn_act(a, 2, dtype="fp32"), AddReluCase(a, "eval", "nchw", "fp32", 2), ConvActCase(c, "fp32", 2)):
        yield Item(case, (*case.baselines, *case.ours, "reference", "cpu", "triton"), TINY, 4.0, cold=True)


def dry_networks() -> tuple[list[Item], list[Item], list[Item]]:
    from bench_networks import NetworkCase
    from bench_train import TrainCase

    network, train = NetworkCase("resnet18", "fp32", 2), TrainCase("resnet18", 32, 2, (2, 32), "bf16")
    first = [Item(network, (*network.baselines, *network.ours, "torchscript"), TINY, 15.0)]
    return first, [Item(train, (*train.baselines, *train.ours), TINY, 15.0)], []


def items(device: torch.device) -> list[Item]:
    """Everything, in the order of measurement; without torchvision, all but the networks."""
    gpu = device.type == "cuda"
    batch = 128 if gpu and memory(device) >= 60 << 30 else 32
    try:
        first, others, long = networks(batch) if gpu else dry_networks()
    except ImportError as error:
        if error.name != "torchvision":
            raise
        first, others, long = [], [], []
    if not gpu:
        return [*dry(), *first, *others]
    return [*first_operators(batch), *first, *others, *long[:1], *other_operators(batch), *long[1:]]


def measured_rates(device: torch.device, small: bool) -> Rates:
    """The rates of this device, with matmuls of fp32 in TF32 wherever convolutions are."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32_allowed()
    try:
        return roofline.measured(device, {"fp32": torch.float32} if small else DTYPES)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Session:
    """The measurements so far, and the file that has them."""

    def __init__(self, out: Path, device: torch.device, dry_run: bool, planned: list[Item]) -> None:
        self.out, self.device, self.dry_run = out, device, dry_run
        self.results: dict[str, Result] = {}
        self.failed: dict[str, str] = {}
        self.pending = [item.case.title for item in planned]
        self.clocks = Clocks()
        self.rates = measured_rates(device, dry_run)

    def save(self) -> None:
        effort = TINY if self.dry_run else OPERATORS
        data = report.document(list(self.results.values()), self.device, effort, "gpu", self.rates)
        data["environment"]["command"] = "make gpu" + (" (dry run)" if self.dry_run else "")
        data["environment"]["clocks"] = self.clocks.read()
        data["settings"]["fp32_products"] = "tf32" if tf32_allowed() else "ieee"
        data["run"] = {
            "dry_run": self.dry_run,
            "measured": list(self.results),
            "failed": self.failed,
            "not_measured": [title for title in self.pending if title not in self.results],
            "headlines": headlines(data),
        }
        report.validate(data)
        write_json(self.out, data)

    def add(self, item: Item, timer: Timer) -> None:
        case = item.case
        self.pending.remove(case.title)
        try:
            result = measure(case, self.device, item.effort, item.peers, timer if item.cold else None)
        except Exception as error:
            # a case that ran with fewer peers keeps that result when more do not fit
            if not (isinstance(error, torch.cuda.OutOfMemoryError) and case.title in self.results):
                self.failed[case.title] = one_line(error)[:200]
            return
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.results[case.title] = result
        for peer, verdict in result.verdicts.items():
            if peer in (*case.ours, "cudnn", *OURS) and not verdict.passed:
                self.failed[case.title] = f"{peer} gives wrong answers: {verdict.message}"


def headlines(data: dict[str, Any]) -> list[str]:
    """One line per network, and one per operator for all of its cases."""
    lines = []
    for case in data["cases"]:
        if case["what"] in ("networks", "train"):
            name, other, ratio = report.ours_over(case)
            rate = f"{case['peers'][name]['images_per_s']:,.0f} images/s"
            share = case["peers"][name]["of_bound"]
            bound = "" if share is None else f", {100 * share:.0f} % of the bound"
            lines.append(f"{case['id']}: {name} {rate}{bound}, {ratio['median']:.2f}x {other}")
    for what in ("bn_act", "add_relu", "conv_act"):
        mine = [case for case in data["cases"] if case["what"] == what]
        if mine:
            ours = [[(case, case["peers"][name]) for name in case["ours"]] for case in mine]
            ratios = sorted(max(p["speedup"][case["baseline"]]["median"] for case, p in peers) for peers in ours)
            shares = sorted(max(p["of_bound"] for _, p in peers) for peers in ours)
            half = len(mine) // 2
            text = f"{ratios[half]:.2f}x eager ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            lines.append(f"{what}, {len(mine)} cases: median {text}, {100 * shares[half]:.0f} % of the bound")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    program = Program("bench", __doc__, arguments)
    planned = items(program.device)
    session = Session(program.out, program.device, program.dry_run, planned)
    session.save()
    timer = cold_timer(program.device)
    for item in planned:
        begun = time.monotonic()
        if begun + item.seconds > program.end:
            continue  # a shorter one may still fit
        session.add(item, timer)
        session.save()
        print(f"{item.case.title}: {', '.join(item.peers)}: {time.monotonic() - begun:.1f} s", flush=True)
    try:
        draw(load(program.out), program.out.with_suffix(".png"))
    except (LabError, ValueError) as error:  # nothing was measured, or matplotlib is not installed
        print(f"no plot: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
