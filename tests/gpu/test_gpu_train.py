"""The training loop on a GPU: mixed precision, resumed runs, gradients beside the CPU's. The data are made here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastres.lab import loop
from fastres.lab.datasets import InMemory, Part
from fastres.lab.loop import RunSpec, run, trained
from fastres.lab.recipes import TrainRecipe
from gpu_device import DEVICE, DRY, needs_device

pytestmark = [pytest.mark.gpu, needs_device]
RECIPE = TrainRecipe("made", 16, 12, 0.05, (8,), augment="cifar", test_every=6, log_every=3)
SPEC = RunSpec("resnet8", "cifar10", RECIPE)


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """Two classes of 16x16 images that differ in brightness."""
    labels = torch.arange(200) % 2
    pixels = torch.randint(0, 128, (200, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = (pixels + 100 * labels[:, None, None, None]).to(torch.uint8)
    data = InMemory("cifar10", 2, (images, labels), (images[:50], labels[:50]))
    monkeypatch.setattr(loop.datasets, "load", lambda *arguments: data)
    return data


def test_batches_are_those_of_the_cpu(made):
    for number, (here, there) in enumerate(
        zip(*(made.batches(RECIPE, 0, 0, Part(), torch.device(d)) for d in (DEVICE, "cpu")), strict=True)
    ):
        assert here[0].device.type == DEVICE.type and torch.equal(here[1].cpu(), there[1]), number
        assert torch.allclose(here[0].cpu(), there[0], atol=1e-5), number


@pytest.mark.parametrize("dtype", ["fp32"] if DRY else ["fp32", "bf16", "fp16"])
def test_it_learns_and_resumes(tmp_path, dtype):
    spec = replace(SPEC, dtype=dtype)
    stopped = run(spec, tmp_path, device=DEVICE.type, stop_after=5)
    assert stopped.iterations == 5 and [point.iteration for point in stopped.history] == [3]
    result = run(spec, tmp_path, device=DEVICE.type)
    assert result.history[-1].train_loss < 0.8 * result.history[0].train_loss and result.test_error <= 0.5
    assert [point.iteration for point in result.history] == [3, 6, 9, 12]
    assert next(trained(tmp_path).parameters()).device.type == "cpu"


@pytest.mark.parametrize("swap", [True, False])
def test_the_first_gradients_are_the_cpus(tmp_path, swap):
    spec = replace(SPEC, swap=swap, recipe=replace(RECIPE, log_every=1))
    first, wanted = (
        run(spec, tmp_path / name, device=device, stop_after=1).history[0]
        for name, device in (("here", DEVICE.type), ("cpu", "cpu"))
    )
    assert first.train_loss == pytest.approx(wanted.train_loss, rel=1e-3)
    assert first.gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-2)
