"""The training loop of the experiments: one run, one folder, resumable at any moment.

    folder/spec.json       the RunSpec
    folder/checkpoint.pt   network, optimizer, log and everything else the run needs to resume exactly
    folder/log.csv         a row every `log_every` iterations; events.out.* for TensorBoard where it is installed
    folder/result.json     at the end: the result with its history, versions and machine

Order, augmentation and every other random number are functions of (seed, iteration), so a run that is killed and
resumed ends in the same weights: bit for bit on one CPU process with the same number of threads. Under torchrun each
process takes its part of the global batch, and BN takes its statistics over that part: with two processes the result
is, bit for bit on CPUs, that of one process that splits its batch by `bn_batch`. Running statistics are the first
part's.
"""

from __future__ import annotations

import math
import shlex
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastres
from fastres.lab import datasets, networks
from fastres.lab import loop_state as state
from fastres.lab.batches import DataSet, stream
from fastres.lab.devices import Place, channels_last, interrupts, place
from fastres.lab.errors import DivergedError, RunError
from fastres.lab.loop_state import Point, RunResult, RunSpec, Step
from fastres.lab.recipes import TrainRecipe
from fastres.lab.results import environment, write_json

__all__ = ["Point", "RunResult", "RunSpec", "Step", "run", "trained"]

_CHECKPOINT_S = 30.0  # between two checkpoints


class _StockBatchNorm2d(nn.BatchNorm2d):
    """A BN that no block takes for a plain one, so BN, addition and ReLU each run on their own."""


def run(
    spec: RunSpec,
    folder: Path,
    *,
    data_root: Path | None = None,
    device: str = "auto",
    on_step: Callable[[Step], None] | None = None,
    stop_after: int | None = None,
    checkpoint_every: int | None = None,
    workers: int | None = None,
    command: str | None = None,
) -> RunResult:
    """Train as `spec` says; called again on the same folder, resume from the checkpoint or return the result.

    Args:
        folder: of this run only; created where it does not exist.
        data_root, workers: as in :func:`fastres.lab.datasets.load`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        on_step: called by the first process after every iteration (every tenth on a GPU).
        stop_after: stop after this many iterations, counted from the start of the run, with a checkpoint and no result.
        checkpoint_every: iterations between two checkpoints; None writes one every 30 s.
        command: for the result file; None takes the process's own.

    Raises LabError for bad input (RunError for a folder that holds another run or is in use) and for a loss that is no
    longer a number; KeyboardInterrupt after Ctrl-C, once the iteration is done and the checkpoint written (a second
    one interrupts immediately).

    >>> import tempfile
    >>> from fastres.lab.recipes import recipe
    >>> spec = RunSpec("resnet8", "digits", recipe("digits-quick"))
    >>> run(spec, Path(tempfile.mkdtemp()), device="cpu", stop_after=2).iterations
    2
    """
    finished = state.result_in(folder, spec)
    if finished is not None:
        return finished
    data = datasets.load(spec.data, data_root, workers)
    with place(device) as here, state.lock_run_folder(folder, spec, here):
        cuda = [here.device] if here.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), interrupts(here) as interrupted:
            training = _Training(spec, folder, data, here, checkpoint_every)
            try:
                training.train(on_step, stop_after or spec.recipe.iterations, interrupted)
                result = training.result()
            finally:
                if training.log is not None:
                    training.log.close()
            if interrupted.is_set():
                raise KeyboardInterrupt
        if here.first and result.iterations == spec.recipe.iterations:
            about = environment(here.device, command or shlex.join(sys.argv))
            write_json(
                folder / "result.json", {"schema": state.RUN, **about, "processes": here.part.of, **result.to_dict()}
            )
        return result


def trained(folder: Path, data_root: Path | None = None) -> nn.Module:
    """The network of the run in `folder`, with its checkpoint's weights, on the CPU in eval mode.

    Raises LabError for a folder without a run or with a damaged one.
    """
    spec = RunSpec.from_dict(state.read_json(folder / "spec.json"))
    model = network(spec, datasets.load(spec.data, data_root))
    state.read_checkpoint(folder / "checkpoint.pt", spec, {"model": model})
    return model.eval()


class _Training:
    def __init__(self, spec: RunSpec, folder: Path, data: DataSet, here: Place, checkpoint_every: int | None) -> None:
        self.spec, self.folder, self.data, self.here = spec, folder, data, here
        recipe = spec.recipe
        each, rest = divmod(recipe.batch_size, here.part.of)
        if rest or (recipe.bn_batch is not None and each % recipe.bn_batch):
            expected = f"a multiple of {here.part.of} processes times bn_batch, {recipe.bn_batch or 1}"
            raise RunError(f"batch_size: got {recipe.batch_size}, expected {expected}")
        self.parts = each // (recipe.bn_batch or each)
        self.checkpoint_every, self.last_checkpoint = checkpoint_every, time.perf_counter()

        self.model = network(spec, data).to(here.device)
        self.norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.optimizer = torch.optim.SGD(_groups(self.model, recipe), recipe.lr, recipe.momentum)
        self.scaler = torch.amp.grad_scaler.GradScaler(here.device.type, enabled=spec.dtype == "fp16")
        self.saved: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        self.progress = state.Progress(warmed_up=recipe.warmup_lr is None)
        if (folder / "checkpoint.pt").exists():
            self.progress = state.read_checkpoint(folder / "checkpoint.pt", spec, self.saved)
        self.log = state.Log(folder, self.progress.history, self.progress.iteration) if here.first else None
        # the checkpoint holds the first process's sums: the others' share of one point is lost
        sums = self.progress.sums if here.first else [0.0] * 3
        self.sums = torch.tensor(sums, dtype=torch.float64, device=here.device)
        here.wait()  # until every process has read, and before the first one writes
        self.parallel: nn.Module = self.model
        if here.part.of > 1:  # running statistics are the first process's, sent before a test
            self.parallel = DistributedDataParallel(self.model, broadcast_buffers=False)

    def train(self, on_step: Callable[[Step], None] | None, stop: int, interrupted: threading.Event) -> None:
        recipe, progress, here = self.spec.recipe, self.progress, self.here
        start = time.perf_counter() - progress.seconds
        every = 1 if here.device.type == "cpu" else 10
        batches = self.data.batches(recipe, self.spec.seed, progress.iteration, here.part, here.device)
        self.model.train()
        while progress.iteration < min(stop, recipe.iterations) and not interrupted.is_set():
            lr = recipe.lr_at(progress.iteration, progress.warmed_up)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(stream(self.spec.seed, "network", progress.iteration, here.part.rank))
            loss = self._gradients(*next(batches))
            done = progress.iteration + 1
            logs = done % recipe.log_every == 0 or done % recipe.test_every == 0 or done == recipe.iterations
            norms = self._gradient_norms() if logs else {}
            self.scaler.step(self.optimizer)
            self.scaler.update()
            progress.iteration = done
            if logs:
                self._add_point(lr, norms, start)
            progress.seconds = time.perf_counter() - start
            if on_step is not None and here.first and (done % every == 0 or logs):
                on_step(self._step(float(loss)))
            if here.first and self._checkpoint_is_due(done):
                self._write_checkpoint()
        if here.first:
            self._write_checkpoint()
        here.wait()

    def _gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Leave the global batch's mean gradients in the parameters; return this process's mean loss."""
        images = self._laid_out(images)
        self.optimizer.zero_grad(set_to_none=True)
        mean = torch.zeros((), device=images.device)
        for k, (x, y) in enumerate(zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True)):
            for norm in self.norms:
                norm.track_running_stats = k == 0
            local = isinstance(self.parallel, DistributedDataParallel) and k < self.parts - 1
            with self.parallel.no_sync() if local else nullcontext():  # type: ignore[operator]
                with self._autocast():
                    logits = self.parallel(x)
                loss = F.cross_entropy(logits.float(), y)
                self.scaler.scale(loss / self.parts).backward()
            with torch.no_grad():
                wrong = (logits.argmax(1) != y).sum()
                self.sums += torch.stack([loss.double() * len(y), wrong.double(), torch.full_like(wrong, len(y))])
                mean += loss / self.parts
        for norm in self.norms:
            norm.track_running_stats = True
        return mean

    def _gradient_norms(self) -> dict[str, float]:
        """The norm of each parameter's gradient, unscaled."""
        self.scaler.unscale_(self.optimizer)
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(named.values())))
        return dict(zip(named, norms.tolist(), strict=True))

    def _add_point(self, lr: float, norms: dict[str, float], start: float) -> None:
        progress, recipe, here = self.progress, self.spec.recipe, self.here
        loss, wrong, images = here.total(self.sums.clone()).tolist()
        if not math.isfinite(loss):
            raise DivergedError(
                f"iteration {progress.iteration}: the training loss is {loss / images}; the last checkpoint is kept"
            )
        self.sums.zero_()
        last = progress.iteration == recipe.iterations
        error = self._test() if last or progress.iteration % recipe.test_every == 0 else None
        progress.warmed_up = progress.warmed_up or wrong / images < recipe.warmup_until_error
        norm = math.sqrt(sum(value * value for value in norms.values()))
        seconds = time.perf_counter() - start
        known = norm if math.isfinite(norm) else None
        point = Point(progress.iteration, lr, loss / images, wrong / images, error, known, seconds)
        progress.history.append(point)
        if self.log is not None:
            self.log.add(point, norms)

    @torch.no_grad()
    def _test(self) -> float:
        """The fraction of the test images that are misclassified, from a single view."""
        self.here.take_buffers(self.model)
        self.model.eval()
        wrong = torch.zeros((), dtype=torch.float64, device=self.here.device)
        batch_size = 500 if self.data.size <= 64 else 100
        for images, labels in self.data.test_batches(batch_size, self.here.part, self.here.device):
            with self._autocast():
                wrong += (self.model(self._laid_out(images)).argmax(1) != labels).sum()
        self.model.train()
        return float(self.here.total(wrong)) / self.data.test_size

    def _laid_out(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.spec.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout)

    def _autocast(self) -> torch.autocast:
        on = self.spec.dtype != "fp32"
        return torch.autocast(self.here.device.type, state.DTYPES[self.spec.dtype] if on else None, enabled=on)

    def _step(self, loss: float) -> Step:
        recipe, done, size = self.spec.recipe, self.progress.iteration, self.data.train_size
        images, epochs = done * recipe.batch_size, math.ceil(recipe.iterations * recipe.batch_size / size)
        return Step((images - 1) // size + 1, epochs, done, recipe.iterations, images, loss, self.progress.seconds)

    def _checkpoint_is_due(self, done: int) -> bool:
        if self.checkpoint_every is not None:
            return done % self.checkpoint_every == 0
        return time.perf_counter() - self.last_checkpoint > _CHECKPOINT_S

    def _write_checkpoint(self) -> None:
        self.progress.sums = self.sums.tolist()
        if self.log is not None:
            self.log.flush()
        state.write_checkpoint(self.folder / "checkpoint.pt", self.spec, self.progress, self.saved)
        self.last_checkpoint = time.perf_counter()

    def result(self) -> RunResult:
        done, history = self.progress.iteration, self.progress.history
        tests = [point.test_error for point in history if point.test_error is not None]
        return RunResult(
            spec=self.spec,
            iterations=done,
            images=done * self.spec.recipe.batch_size,
            seconds=self.progress.seconds,
            parameters=sum(p.numel() for p in self.model.parameters()),
            test_error=tests[-1] if tests else None,
            train_error=history[-1].train_error if history else None,
            best_test_error=min(tests, default=None),
            history=list(history),
        )


def network(spec: RunSpec, data: DataSet) -> nn.Module:
    """The network on the CPU, initialized from the seed; fused or stock, in the layout asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(spec.seed, "weights"))
        model = networks.build(spec.network, data.classes, data.channels, **dict(spec.options))
    if not spec.swap:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = _StockBatchNorm2d
    elif not type(model).__module__.startswith("fastres."):  # ours are fused already
        fastres.swap(model)
    return channels_last(model) if spec.channels_last else model


def _groups(model: nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """The parameters with weight decay, and those without."""
    groups: dict[float, list[nn.Parameter]] = {}
    for p in model.parameters():
        groups.setdefault(recipe.weight_decay if recipe.decay == "all" or p.dim() == 4 else 0.0, []).append(p)
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items()]
