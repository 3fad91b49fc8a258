"""Second half of the demo: torchvision's ResNet-50 on two photographs, eager, swapped and frozen, in one table.

All rows are timed in the same interleaved rounds, so that each row's ratio to eager is paired, and judged by the fp64
referee on the same images. Eager is timed in both memory layouts, and the faster one is the baseline. Random weights
say nothing about photographs but cost the same arithmetic; such a network explodes in eval mode because its BN
statistics come from no data, so they are first taken from the photographs.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres._info import cpu, load_average, native_bf16
from fastres.lab.checkpoints import load_checkpoint
from fastres.lab.data import Photographs
from fastres.lab.devices import channels_last
from fastres.lab.errors import require
from fastres.lab.timing import Ratio, interleave, paired_ratio, timer_for
from fastres.verify import Verification, calibrate
from fastres.verify.verdict import RMS_RATIO

GPU_BATCH = 64  # the two photographs, repeated: two images leave a GPU idle between launches


@dataclass(frozen=True)
class Effort:
    """The size of the images and the length of the measurement."""

    size: int = 224
    rounds: int = 25
    min_rounds: int = 6  # what a 95 % interval needs
    warmup: int = 2
    budget_s: float = 10.0  # per row


QUICK = Effort(size=64, rounds=2, min_rounds=1, warmup=1, budget_s=1.0)


@dataclass(frozen=True)
class Row:
    """One configuration of the network. `ratio` is None for the baseline."""

    name: str
    dtype: str
    plan: dict[str, str]  # the memory layout; for a frozen network also the rest of its plan
    ours: bool
    seconds: list[float]  # one sample per round, for the whole batch
    batch: int
    ratio: Ratio | None
    verdict: Verification | None  # None for eager, the referee's own yardstick

    @property
    def ms(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def images_per_s(self) -> float:
        return self.batch / statistics.median(self.seconds)

    @property
    def failed(self) -> bool:
        return self.verdict is not None and not self.verdict

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("name", "dtype", "plan", "images_per_s", "ms")},
            "ratio_to_eager": self.ratio.to_dict() if self.ratio else None,
            "verdict": verdict_dict(self.verdict),
            "samples_ms": [s * 1e3 for s in self.seconds],
        }


@dataclass(frozen=True)
class Table:
    """All rows, and the facts common to them."""

    rows: list[Row]
    baseline: str  # the name of the row that the ratios are to
    batch: int
    size: int
    swapped_blocks: int
    weights: str  # the file, or "random (seed 0)"
    answers: dict[str, str]  # photograph -> the class the network names; empty for random weights
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"network": "torchvision resnet50", **vars(self), "rows": [row.to_dict() for row in self.rows]}


def verdict_dict(verdict: Verification | None) -> dict[str, Any] | None:
    """A summary of the verdict: passed, the worst error ratio (None if infinite) and its limit."""
    if verdict is None:
        return None
    return {"passed": bool(verdict), "error_ratio": verdict.to_dict()["error_ratio"], "at_most": RMS_RATIO}


def resnet50(weights: Path | None) -> nn.Module:
    """torchvision's ResNet-50 in eval mode, with the weights of a checkpoint or random ones (seed 0).

    Raises CheckpointError for a file that does not fit, MissingExtra where torchvision cannot be imported.
    """
    make = require("torchvision.models", "ResNet-50", "train").resnet50
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = make(weights=None)
    if weights is not None:
        load_checkpoint(weights, model, "torchvision resnet50")
    return model.eval()


@dataclass(frozen=True)
class _Candidate:
    """A model and its input; a call is one forward pass of the whole batch."""

    model: nn.Module
    x: Tensor  # [batch, 3, size, size]
    plan: dict[str, str]
    dtype: str = "fp32"
    verdict: Verification | None = None

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model(self.x)  # [batch, 1000]
            return logits


def compare_configurations(
    model: nn.Module,
    photographs: Photographs,
    device: torch.device,
    weights: Path | None,
    effort: Effort,
    on_progress: Callable[[int, int, str], None],
) -> Table:
    """Build, judge and time every configuration of `model` on the photographs.

    Args:
        model: from `resnet50`; calibrated in place if its weights are random.
        on_progress: called with (done, total, current activity).
    """
    total = 4 + effort.rounds
    model = model.to(device)
    images = photographs.images.to(device)  # [2, 3, size, size]
    on_progress(0, total, "preparing")
    calibrated = weights is None and bool(calibrate(model, images))
    batch = images if device.type == "cpu" else images.repeat(GPU_BATCH // len(images), 1, 1, 1)
    nhwc = batch.contiguous(memory_format=torch.channels_last)  # the shape stays [batch, 3, size, size]
    candidates = {
        "eager NCHW": _Candidate(model, batch, {"layout": "NCHW"}),
        "eager channels_last": _Candidate(channels_last(copy.deepcopy(model)), nhwc, {"layout": "channels_last"}),
    }
    timer = timer_for(device)
    pilot = interleave(candidates, min(3, effort.rounds), effort.warmup, timer=timer)
    eager = candidates[_fastest(pilot)]

    on_progress(1, total, "swapping")
    swapped = copy.deepcopy(eager.model)
    blocks = sum(row.status == "swapped" for row in fastres.swap(swapped).rows)
    verdict = fastres.verify(eager.model, swapped, eager.x, backward=False, training=False)
    candidates["swapped"] = _Candidate(swapped, eager.x, eager.plan, verdict=verdict)
    for done, (short, dtype) in enumerate({"fp32": torch.float32, "bf16": torch.bfloat16}.items(), start=2):
        on_progress(done, total, f"freezing to {short}")
        frozen = fastres.freeze(eager.model, eager.x, dtype=dtype, verify="warn")  # the table shows a rejection
        candidates[f"frozen {short}"] = _Candidate(frozen, eager.x, _plan(frozen), short, frozen.report.verification)

    samples = interleave(
        candidates,
        effort.rounds,
        effort.warmup,
        effort.budget_s,
        min_rounds=effort.min_rounds,
        timer=timer,
        on_round=lambda done: on_progress(4 + done, total, "timing in rounds"),
    )
    on_progress(total, total, "timed")
    baseline = _fastest({name: samples[name] for name in pilot})
    rows = [
        Row(
            name=name,
            dtype=candidate.dtype,
            plan=candidate.plan,
            ours=name not in pilot,
            seconds=samples[name],
            batch=len(batch),
            ratio=None if name == baseline else paired_ratio(samples[baseline], samples[name]),
            verdict=candidate.verdict,
        )
        for name, candidate in candidates.items()
    ]
    source = str(weights) if weights else "random (seed 0)"
    answers = _answers(candidates["frozen fp32"](), photographs.names) if weights else {}
    notes = _notes(device, calibrated, effort, rows)
    return Table(rows, baseline, len(batch), effort.size, blocks, source, answers, notes)


def _fastest(samples: dict[str, list[float]]) -> str:
    return min(samples, key=lambda name: statistics.median(samples[name]))


def _plan(frozen: fastres.FrozenModel) -> dict[str, str]:
    report = frozen.report
    layout = {"contiguous": "NCHW"}.get(report.memory_format, report.memory_format)
    return {"layout": layout, "cuda_graph": report.cuda_graph, "folded": str(report.folded)}


def _answers(logits: Tensor, names: list[str]) -> dict[str, str]:
    categories = require("torchvision.models", "ResNet-50", "train").ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    probability, index = logits.float().softmax(1).max(1)  # [batch]
    return {name: f"{categories[int(index[i])]} ({float(probability[i]):.0%})" for i, name in enumerate(names)}


def _notes(device: torch.device, calibrated: bool, effort: Effort, rows: list[Row]) -> list[str]:
    notes = []
    if calibrated:
        notes.append(
            "The weights are random: BN statistics were first calibrated on the photographs, because a randomly"
            " initialized network explodes in eval mode. Trained weights, which --weights FILE loads, run at the same"
            " speed."
        )
    if device.type == "cpu" and not native_bf16():
        notes.append("This CPU has no bf16 instructions and oneDNN emulates them: the bf16 row is slow here.")
    load, cores = load_average(), cpu()["cores"]
    if load is not None and load > cores + 1:  # the demo itself causes a load of at most `cores`
        notes.append(f"Other programs were running (load average {load:.1f} on {cores} cores) and slowed these times.")
    most = max(len(row.seconds) for row in rows)
    short = [f"{row.name} {len(row.seconds)}" for row in rows if len(row.seconds) < most]
    if short:
        notes.append(f"Rows that used up their {effort.budget_s:.0f} s ran fewer rounds: {', '.join(short)}.")
    return notes
