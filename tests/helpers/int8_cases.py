"""What the tests of int8 share: a ResNet-20 trained on the digits, recipes with planted faults."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.inference import int8

HOSTILE: dict[str, Any] = {"gate": lambda network: 0.0}  # every layer stays on integers


def images(count: int = 16, channels: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def digits() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A ResNet-20 after 110 steps on scikit-learn's digits; training images, test images and their labels."""
    pytest.importorskip("sklearn")
    from fastres.lab.datasets import load
    from fastres.lab.loop import RunSpec, run, trained
    from fastres.lab.recipes import recipe

    steps = replace(recipe("digits"), iterations=110, milestones=(80,), test_every=110, log_every=110)
    with tempfile.TemporaryDirectory() as folder:
        run(RunSpec("resnet20", "digits", steps), Path(folder) / "run", device="cpu")
        net = trained(Path(folder) / "run")
    data: Any = load("digits")
    return net, data.train()[0], *data.test()


def frozen_int8(net: nn.Module, images: Tensor, **how: Any) -> fastres.FrozenModel:
    """The network in int8, calibrated on `images`, nothing measured."""
    return fastres.freeze(net, images[:2], dtype="int8", calibrate=images, **{"tune": False, "verify": False, **how})


def plant(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    """Change what calibration finds: `fault(graph, ranges)` writes to the ranges, by slot. No argument can do that."""
    find = int8.observe

    def observe(runs: Any, *rest: Any) -> Any:
        recipe = find(runs, *rest)
        fault(runs.graph, recipe.ranges)
        return recipe

    monkeypatch.setattr(int8, "observe", observe)


def moved(frozen: fastres.FrozenModel) -> list[str]:
    """The names of the layers that are not int8."""
    found = frozen.report.quantization
    assert found is not None
    return [layer.name for layer in found.layers if layer.precision != "int8"]
