"""An experiment: the runs it needs, and the function that turns their results into tables and a plot."""

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
    """The network, weights and views of experiment 6."""

    network: str | None = None
    weights: Path | None = None
    shortcut: str | None = None
    views: tuple[str, ...] = ("1-crop", "10-crop", "multi-scale")


@dataclass(frozen=True)
class Context:
    """The input of an experiment's `outcome`: its preset and its finished runs."""

    preset: Preset
    place: Place
    results: dict[RunSpec, RunResult] = field(default_factory=dict)
    evaluation: Evaluation = Evaluation()
    tell: Callable[[str], None] = lambda text: None

    def of(self, network: str, **options: object) -> list[RunResult]:
        """The results of one network, one per seed."""
        return [self.results[self.preset.spec(network, seed, **options)] for seed in self.preset.seeds]


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    Args:
        number, name, title: "1", "degradation", ...
        source: tables and figures of the paper.
        specs: the runs it needs under a preset; none for experiments that train nothing.
        outcome: makes tables and plot of the results.
        presets: the presets it can run with.
        note: on its cost, for the list.
    """

    number: int
    name: str
    title: str
    source: str
    specs: Callable[[Preset], Sequence[RunSpec]]
    outcome: Callable[[Context], Outcome]
    presets: tuple[str, ...] = ("ci", "digits", "cifar10")
    note: str = ""
