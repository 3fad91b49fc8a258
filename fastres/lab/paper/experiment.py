"""What an experiment is: the runs that it needs, and what it makes of their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastres.lab.loop_state import RunResult, RunSpec
from fastres.lab.paper.presets import Preset
from fastres.lab.paper.runs import Place
from fastres.lab.paper.tables import Outcome


@dataclass(frozen=True)
class Evaluation:
    """What experiment 6 evaluates, and how."""

    network: str | None = None
    weights: Path | None = None
    shortcut: str | None = None
    views: tuple[str, ...] = ("1-crop", "10-crop", "multi-scale")


@dataclass(frozen=True)
class Context:
    """What an experiment is given once its runs are made."""

    preset: Preset
    place: Place
    results: dict[RunSpec, RunResult] = field(default_factory=dict)
    evaluation: Evaluation = Evaluation()
    tell: Callable[[str], None] = lambda text: None

    def of(self, network: str, **options: object) -> list[RunResult]:
        """The results of one network, seed by seed."""
        return [self.results[self.preset.spec(network, seed, **options)] for seed in self.preset.seeds]


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Args:
        number, name, title: "1", "degradation", ...
        source: tables and figures of the paper.
        specs: the runs it needs under a preset; none for experiments that train nothing.
        outcome: tables and plot of the results.
        presets: those that it can be run with.
    """

    number: int
    name: str
    title: str
    source: str
    specs: Callable[[Preset], Sequence[RunSpec]]
    outcome: Callable[[Context], Outcome]
    presets: tuple[str, ...] = ("ci", "digits", "cifar10")
    note: str = ""
