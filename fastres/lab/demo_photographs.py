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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres._info import cpu, load_average, native_bf16
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


@dataclass
class Row:
    """One configuration of the network; a call is one forward pass of the whole batch."""

    name: str
    model: nn.Module
    x: Tensor  # [batch, 3, size, size]
    plan: dict[str, str]  # the memory layout; for a frozen network also the rest of its plan
    dtype: str = "fp32"
    verdict: Verification | None = None  # None for eager, the referee's own yardstick
    seconds: list[float] = field(default_factory=list)  # one sample per round, for the whole batch
    ratio: Ratio | None = None  # to the baseline; None for the baseline itself

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model(self.x)  # [batch, 1000]
            return logits

    @property
    def ours(self) -> bool:
        return not self.name.startswith("eager")

    @property
    def ms(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def images_per_s(self) -> float:
        return len(self.x) / statistics.median(self.seconds)

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


def compare_configurations(
    model: nn.Module,
    photographs: Tensor,  # [2, 3, size, size]
    device: torch.device,
    weights: Path | None,
    effort: Effort,
    on_progress: Callable[[int, int, str], None],
) -> Table:
    """Build, judge and time every configuration of `model` on the photographs.

    Args:
        model: torchvision's ResNet-50 in eval mode; calibrated in place if its weights are random.
        on_progress: called with (done, total, current activity).
    """
    total = 4 + effort.rounds
    model = model.to(device)
    images = photographs.to(device)
    on_progress(0, total, "preparing")
    calibrated = weights is None and bool(calibrate(model, images))
    batch = images if device.type == "cpu" else images.repeat(GPU_BATCH // len(images), 1, 1, 1)
    nhwc = batch.contiguous(memory_format=torch.channels_last)  # the shape stays [batch, 3, size, size]
    eager = [
        Row("eager NCHW", model, batch, {"layout": "NCHW"}),
        Row("eager channels_last", channels_last(copy.deepcopy(model)), nhwc, {"layout": "channels_last"}),
    ]
    timer = timer_for(device)
    best = _fastest(
        eager, interleave({row.name: row for row in eager}, min(3, effort.rounds), effort.warmup, timer=timer)
    )

    on_progress(1, total, "swapping")
    swapped = copy.deepcopy(best.model)
    blocks = sum(row.status == "swapped" for row in fastres.swap(swapped).rows)
    verdict = fastres.verify(best.model, swapped, best.x, backward=False, training=False)
    rows = [*eager, Row("swapped", swapped, best.x, best.plan, verdict=verdict)]
    for done, (short, dtype) in enumerate({"fp32": torch.float32, "bf16": torch.bfloat16}.items(), start=2):
        on_progress(done, total, f"freezing to {short}")
        frozen = fastres.freeze(best.model, best.x, dtype=dtype, verify="warn")  # the table shows a rejection
        rows.append(Row(f"frozen {short}", frozen, best.x, _plan(frozen), short, frozen.report.verification))

    samples = interleave(
        {row.name: row for row in rows},
        effort.rounds,
        effort.warmup,
        effort.budget_s,
        min_rounds=effort.min_rounds,
        timer=timer,
        on_round=lambda done: on_progress(4 + done, total, "timing in rounds"),
    )
    on_progress(total, total, "timed")
    baseline = _fastest(eager, samples)
    for row in rows:
        row.seconds = samples[row.name]
        row.ratio = None if row is baseline else paired_ratio(samples[baseline.name], row.seconds)
    source = str(weights) if weights else "random (seed 0)"
    notes = _notes(device, calibrated, effort, rows)
    return Table(rows, baseline.name, len(batch), effort.size, blocks, source, {}, notes)


def _fastest(rows: list[Row], samples: dict[str, list[float]]) -> Row:
    return min(rows, key=lambda row: statistics.median(samples[row.name]))


def _plan(frozen: fastres.FrozenModel) -> dict[str, str]:
    report = frozen.report
    layout = {"contiguous": "NCHW"}.get(report.memory_format, report.memory_format)
    return {"layout": layout, "cuda_graph": report.cuda_graph, "folded": str(report.folded)}


def answers(table: Table, names: list[str]) -> dict[str, str]:
    """The class that the frozen network names for each photograph."""
    logits = next(row for row in table.rows if row.name == "frozen fp32")()
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
