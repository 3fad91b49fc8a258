"""Data sets as streams of batches, and the one that is held in memory.

A batch is a function of (seed, iteration): the training images form one endless row of permutations, cut into batches.
No image is skipped at the end of an epoch, and a resumed run sees exactly the batches it would have seen.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.lab.augment import augmented, draw
from fastres.lab.errors import RecipeError
from fastres.lab.recipes import TrainRecipe

Batches = Iterator[tuple[Tensor, Tensor]]  # images, labels


@dataclass(frozen=True)
class Part:
    """One process's share of every global batch: the `rank`-th of `of` equal parts."""

    rank: int = 0
    of: int = 1

    def rows(self, count: int) -> slice:
        each = count // self.of
        return slice(self.rank * each, (self.rank + 1) * each)

    def test_rows(self, count: int, batch_size: int) -> Iterator[slice]:
        """The batches of `count` test images that are this process's: every `of`-th."""
        for start in range(self.rank * batch_size, count, self.of * batch_size):
            yield slice(start, min(start + batch_size, count))


class DataSet(ABC):
    """Images and labels to train and to test on."""

    name: str
    classes: int
    channels: int
    size: int  # height and width in pixels
    train_size: int  # images
    test_size: int

    def batches(self, recipe: TrainRecipe, seed: int, start: int, part: Part, device: torch.device) -> Batches:
        """This process's part of the batches of iterations `start` to `recipe.iterations` - 1.

        Yields images [n, channels, size, size] fp32, augmented, and labels [n] int64, both on `device`.
        """
        rows = part.rows(recipe.batch_size)
        for iteration, (images, labels) in enumerate(self._training(recipe, seed, start, rows, device), start):
            rng = torch.Generator().manual_seed(stream(seed, "augment", iteration))
            drawn = draw(recipe.augment, recipe.batch_size, rng)[rows]
            yield augmented(images, recipe.augment, drawn), labels

    @abstractmethod
    def _training(self, recipe: TrainRecipe, seed: int, start: int, rows: slice, device: torch.device) -> Batches:
        """Rows `rows` of each batch from iteration `start` on, centered and not yet augmented."""

    @abstractmethod
    def test_batches(self, batch_size: int, part: Part, device: torch.device) -> Batches:
        """Every test image once over all parts, unaugmented, as `batches` yields them."""


def stream(*key: object) -> int:
    """The seed of the stream of random numbers called `key`: another key, other numbers.

    >>> stream(0, "order", 1) == stream(0, "order", 1) != stream(0, "order", 2)
    True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def order(count: int, batch_size: int, seed: int, iteration: int) -> Tensor:
    """The indices, out of `count` training images, of the batch of `iteration`: [batch_size] int64.

    >>> sorted(torch.cat([order(6, 4, seed=0, iteration=i) for i in range(3)]).tolist())
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    """
    first, parts, missing = iteration * batch_size, [], batch_size
    while missing:
        epoch, at = divmod(first, count)
        found = _permutation(count, seed, epoch)[at : at + missing]
        parts.append(found)
        first, missing = first + len(found), missing - len(found)
    return torch.cat(parts)


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(stream(seed, "order", epoch)))


class InMemory(DataSet):
    """Images that fit in memory, uint8 or floats; moved to the device once, centered and augmented there per batch.

    `train` and `test` are (images [N, C, S, S], labels [N] int64) each. Centered: (image - mean) / deviation, the mean
    per pixel over the training images as in the paper, the deviation one number. (The paper does not divide; every
    network here has a BN after its first convolution, which undoes it.)
    """

    def __init__(self, name: str, classes: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
        self.name, self.classes = name, classes
        self._train, self._test = train, test
        self.channels, self.size = train[0].shape[1], train[0].shape[2]
        self.train_size, self.test_size = len(train[1]), len(test[1])
        parts: Any = train[0].split(4096)  # a part at a time: CIFAR-10 in float64 is 1.2 GB
        mean = sum(part.double().sum(0) for part in parts) / self.train_size  # [C, S, S]
        variance = sum(float((part.double() - mean).square().sum()) for part in parts) / train[0].numel()
        self.mean, self.deviation = mean.float(), variance**0.5

    def train(self) -> tuple[Tensor, Tensor]:
        """(images [N, C, S, S], centered, fp32; labels [N]) of the training set."""
        return self._centered(self._train[0]), self._train[1]

    def test(self) -> tuple[Tensor, Tensor]:
        """(images [N, C, S, S], centered, fp32; labels [N]) of the test set."""
        return self._centered(self._test[0]), self._test[1]

    def _training(self, recipe: TrainRecipe, seed: int, start: int, rows: slice, device: torch.device) -> Batches:
        if recipe.augment == "imagenet" and self.channels != 3:
            raise RecipeError(f"augment: got 'imagenet', expected another one for {self.channels}-channel images")
        images, labels = (t.to(device) for t in self._train)
        for iteration in range(start, recipe.iterations):
            chosen = order(len(labels), recipe.batch_size, seed, iteration)[rows].to(device)
            yield self._centered(images[chosen]), labels[chosen]

    def test_batches(self, batch_size: int, part: Part, device: torch.device) -> Batches:
        images, labels = self._test
        for rows in part.test_rows(len(labels), batch_size):
            yield self._centered(images[rows].to(device)), labels[rows].to(device)

    def _centered(self, images: Tensor) -> Tensor:
        centered: Tensor = (images.float() - self.mean.to(images.device)) / self.deviation
        return centered
