"""The paper's recipes as data (He et al. 2016, sections 3.4 and 4.2), and small ones for the digits.

    v <- momentum * v + gradient + weight_decay * w        w <- w - lr(t) * v        t = 0 .. iterations - 1
    lr(t) = warmup_lr until the training error is below warmup_until_error, then lr / 10^(milestones <= t)

Batches are global: under torchrun each process takes its part. Errors are fractions, schedules count iterations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from fastres.lab.errors import RecipeError

Augment = Literal["cifar", "imagenet", "digits", "none"]
Decay = Literal["all", "convolutions"]


@dataclass(frozen=True)
class TrainRecipe:
    """The schedule and hyperparameters of a training run. `dataclasses.replace` makes variants.

    Raises RecipeError: a value out of range, naming it.

    >>> TrainRecipe("mine", batch_size=64, iterations=100, lr=0.1, milestones=(50,), augment="none").lr_at(50)
    0.01
    """

    name: str
    batch_size: int  # images per iteration, over all processes
    iterations: int
    lr: float  # divided by 10 at each of `milestones`
    milestones: tuple[int, ...]
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay: Decay = "all"  # weight decay on all parameters, as in fb.resnet.torch; "convolutions": another reading
    warmup_lr: float | None = None  # until the training error is below `warmup_until_error`; None: no warm-up
    warmup_until_error: float = 0.8
    augment: Augment = "none"  # see augment.py
    test_every: int = 1000  # iterations; there is always a test after the last one
    log_every: int = 100  # iterations between two rows of the log; losses and training errors are means over them
    # Images that share BN statistics; None: one process's part. The paper trained its CIFAR networks on two GPUs, so 64
    # of 128. The running statistics are the first part's.
    bn_batch: int | None = None

    def __post_init__(self) -> None:
        for argument in ("batch_size", "iterations", "test_every", "log_every", "bn_batch"):
            value = getattr(self, argument)
            if value is not None and (type(value) is not int or value < 1):
                raise RecipeError(f"{argument}: got {value!r}, expected an integer of at least 1")
        for argument in ("lr", "momentum", "weight_decay", "warmup_lr", "warmup_until_error"):
            value = getattr(self, argument)
            if value is not None and not 0 <= value < float("inf"):
                raise RecipeError(f"{argument}: got {value!r}, expected a number of at least 0")
        if list(self.milestones) != sorted(set(self.milestones)) or min(self.milestones, default=1) < 1:
            raise RecipeError(f"milestones: got {self.milestones}, expected iterations from 1, in order")
        for argument, allowed in (("augment", Augment), ("decay", Decay)):
            if getattr(self, argument) not in get_args(allowed):
                wanted = ", ".join(get_args(allowed))
                raise RecipeError(f"{argument}: got {getattr(self, argument)!r}, expected one of {wanted}")
        if self.bn_batch is not None and self.batch_size % self.bn_batch:
            raise RecipeError(f"bn_batch: got {self.bn_batch}, expected a divisor of batch_size, {self.batch_size}")

    def lr_at(self, iteration: int, warmed_up: bool = True) -> float:
        """The learning rate at `iteration`, from 0; `warmed_up` once the training error has been low enough."""
        if self.warmup_lr is not None and not warmed_up:
            return self.warmup_lr
        return self.lr / 10.0 ** sum(milestone <= iteration for milestone in self.milestones)


_CIFAR10 = TrainRecipe("cifar10", 128, 64_000, 0.1, (32_000, 48_000), augment="cifar", test_every=1000)
RECIPES: dict[str, TrainRecipe] = {
    each.name: each
    for each in (
        _CIFAR10,
        replace(_CIFAR10, name="cifar10-110", warmup_lr=0.01),
        # "divided by 10 when the error plateaus", up to 60e4 iterations: every 30 epochs of 5004, as fb.resnet.torch
        TrainRecipe("imagenet", 256, 600_000, 0.1, (150_000, 300_000), augment="imagenet", test_every=5000),
        TrainRecipe("digits", 64, 600, 0.1, (300, 450), augment="digits", test_every=50, log_every=10),
        TrainRecipe("digits-quick", 64, 24, 0.1, (12, 18), augment="digits", test_every=12, log_every=4),
    )
}


def recipe(name: str) -> TrainRecipe:
    """The recipe called `name`; raises RecipeError, which lists them.

    >>> recipe("cifar10-110").warmup_lr
    0.01
    """
    if name not in RECIPES:
        raise RecipeError(f"recipe: got {name!r}, expected one of {', '.join(RECIPES)}")
    return RECIPES[name]
