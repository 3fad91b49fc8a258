"""A short training loop: SGD with Nesterov momentum, a warm-up and cosine schedule, one seed.

    lr(t) = lr * min(t / warm-up, (1 + cos(pi * (t - warm-up) / (T - warm-up))) / 2),  t = 1 .. T steps

Weight decay leaves biases and BN parameters alone. The loop prints nothing: it calls `on_step`, and a front end draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    epochs: int = 12
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_fraction: float = 0.15
    shift: int = 1  # random translation by up to so many pixels, the only augmentation
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """What `on_step` is told after every optimizer step."""

    epoch: int  # from 1
    epochs: int
    step: int  # from 1
    steps: int
    images: int  # trained on so far
    loss: float  # exponential moving average
    seconds: float  # since the loop began


@dataclass(frozen=True)
class Trained:
    steps: int
    images: int
    seconds: float
    losses: list[float]  # mean training loss of each epoch


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe | None = None,
    *,
    max_steps: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Trained:
    """Trains `model` in place, on the device it is on, and leaves it in training mode.

    Args:
        images: [N, C, H, W], on the model's device or moved there a batch at a time.
        labels: [N] int64.
        max_steps: ends earlier, for smoke tests.

    Raises ValueError where images and labels differ in length, or hold less than one batch of two images.
    """
    recipe = recipe or Recipe()
    if len(images) != len(labels):
        raise ValueError(f"labels: got {len(labels)}, expected as many as images, {len(images)}")
    per_epoch = len(images) // recipe.batch_size
    if per_epoch == 0 or recipe.batch_size < 2:
        raise ValueError(f"batch_size: got {recipe.batch_size}, expected 2 to the number of images, {len(images)}")
    device = next(model.parameters()).device
    total = min(recipe.epochs * per_epoch, max_steps or recipe.epochs * per_epoch)
    warmup = max(1, round(total * recipe.warmup_fraction))
    optimizer = torch.optim.SGD(
        _parameter_groups(model, recipe.weight_decay), lr=recipe.lr, momentum=recipe.momentum, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: _lr_factor(t + 1, warmup, total))
    rng = torch.Generator().manual_seed(recipe.seed)

    model.train()
    losses: list[float] = []
    step, smooth, start = 0, 0.0, time.perf_counter()
    for epoch in range(1, recipe.epochs + 1):
        order = torch.randperm(len(images), generator=rng)
        epoch_loss, in_epoch = 0.0, 0
        for batch in order.split(recipe.batch_size)[:per_epoch]:
            if step == total:
                break
            x = _shifted(images[batch], recipe.shift, rng).to(device)  # [batch, C, H, W]
            loss = F.cross_entropy(model(x), labels[batch].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            value = float(loss.detach())
            step, in_epoch, epoch_loss = step + 1, in_epoch + 1, epoch_loss + value
            smooth = value if step == 1 else 0.9 * smooth + 0.1 * value
            if on_step is not None:
                seconds = time.perf_counter() - start
                on_step(Step(epoch, recipe.epochs, step, total, step * recipe.batch_size, smooth, seconds))
        if in_epoch:
            losses.append(epoch_loss / in_epoch)
    return Trained(step, step * recipe.batch_size, time.perf_counter() - start, losses)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Logits [N, classes] in fp32 on the CPU, in eval mode; the model's mode is put back afterwards."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        logits = [model(batch.to(device)).float().cpu() for batch in images.split(batch_size)]
    finally:
        model.train(was_training)
    return torch.cat(logits)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows of logits [N, classes] whose largest entry is the label [N]."""
    return float((logits.argmax(1) == labels).double().mean())


def _lr_factor(t: int, warmup: int, total: int) -> float:
    if t <= warmup:
        return t / warmup
    return (1 + math.cos(math.pi * (t - warmup) / max(1, total - warmup))) / 2


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _shifted(images: Tensor, shift: int, rng: torch.Generator) -> Tensor:
    """Translates every image of [N, C, H, W] by up to `shift` pixels; what comes in at the edge repeats the edge."""
    if shift == 0:
        return images
    n, _, height, width = images.shape
    padded = F.pad(images, (shift, shift, shift, shift), mode="replicate")  # [N, C, H+2s, W+2s]
    dy, dx = torch.randint(0, 2 * shift + 1, (2, n), generator=rng)
    rows = dy[:, None] + torch.arange(height)  # [N, H]
    columns = dx[:, None] + torch.arange(width)  # [N, W]
    image = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
