"""The data sets of the experiments: digits (bundled with scikit-learn), CIFAR-10 and ImageNet (from a folder).

The batch of an iteration is a function of (seed, iteration): the training images in one endless row of permutations,
cut into batches; nothing is left out at the end of an epoch, and a resumed run goes on exactly. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.lab.augment import augmented, draw
from fastres.lab.data import digits
from fastres.lab.errors import DataError, MissingExtra, RecipeError
from fastres.lab.recipes import TrainRecipe

NAMES = ("digits", "digits8", "cifar10", "imagenet")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


@dataclass(frozen=True)
class Part:
    """Which part of every joined batch is this process's: the `rank`-th of `of` equal ones."""

    rank: int = 0
    of: int = 1

    def rows(self, count: int) -> slice:
        each = count // self.of
        return slice(self.rank * each, (self.rank + 1) * each)


class DataSet(ABC):
    """Images and labels to train and to test on.

    Attributes:
        name: as for :func:`load`; classes, channels: of the network; size: pixels a side; train_size, test_size: how
            many images.
    """

    name: str
    classes: int
    channels: int
    size: int
    train_size: int
    test_size: int

    @abstractmethod
    def batches(
        self, recipe: TrainRecipe, seed: int, start: int, part: Part, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the batches of iterations `start` to `recipe.iterations` - 1.

        Yields:
            images [n, channels, size, size] fp32, augmented; labels [n] int64; both on `device`.
        """

    @abstractmethod
    def test_batches(self, batch_size: int, part: Part, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Every test image once over all parts, unaugmented, as `batches` yields them."""


def stream(*key: object) -> int:
    """A seed for the stream of random numbers called `key`: another key, other numbers.

    >>> stream(0, "order", 1) == stream(0, "order", 1) != stream(0, "order", 2)
    True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def order(count: int, batch_size: int, seed: int, iteration: int) -> Tensor:
    """Which of `count` training images are the batch of `iteration`: [batch_size] int64.

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
    """Images that fit in memory, uint8 or floats; moved to the device once, centred and augmented there batch by batch.

    Centred: (image - mean) / deviation, the mean per pixel over the training images as in the paper, the deviation one
    number. (The paper does not divide; every network here has a BN after its first convolution, which undoes it.)

    Args:
        name: of the data set.
        classes: how many.
        train, test: (images [N, C, S, S], labels [N] int64) each.
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
        """(images [N, C, S, S], centred, fp32; labels [N]) of the training set."""
        return self._centred(self._train[0]), self._train[1]

    def test(self) -> tuple[Tensor, Tensor]:
        """(images [N, C, S, S], centred, fp32; labels [N]) of the test set."""
        return self._centred(self._test[0]), self._test[1]

    def batches(
        self, recipe: TrainRecipe, seed: int, start: int, part: Part, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if recipe.augment == "imagenet" and self.channels != 3:
            raise RecipeError(f"augment: got 'imagenet', expected another one for {self.channels}-channel images")
        images, labels = (t.to(device) for t in self._train)
        rows = part.rows(recipe.batch_size)
        for iteration in range(start, recipe.iterations):
            rng = torch.Generator().manual_seed(stream(seed, "augment", iteration))
            drawn = draw(recipe.augment, recipe.batch_size, rng)[rows]
            chosen = order(len(labels), recipe.batch_size, seed, iteration)[rows].to(device)
            yield augmented(self._centred(images[chosen]), recipe.augment, drawn), labels[chosen]

    def test_batches(self, batch_size: int, part: Part, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self._test
        for start in range(part.rank * batch_size, len(labels), part.of * batch_size):
            rows = slice(start, start + batch_size)
            yield self._centred(images[rows].to(device)), labels[rows].to(device)

    def _centred(self, images: Tensor) -> Tensor:
        centred: Tensor = (images.float() - self.mean.to(images.device)) / self.deviation
        return centred


def load(name: str, root: Path | None = None, workers: int | None = None) -> DataSet:
    """The data set called `name`.

    Args:
        name: "digits" (16x16), "digits8" (the 8x8 that they come in), "cifar10" or "imagenet".
        root: the folder that holds cifar-10-batches-py/, or train/ and val/; needed for all but the digits.
        workers: processes that decode images, a core each without it; the digits and CIFAR-10 need none.

    Raises:
        DataError: an unknown name; a folder without the data set, with what to download and where to put it; a corrupt
            file, by name.
        MissingExtra: a package that is not installed.

    Example:
        >>> data = load("digits")
        >>> data.train_size, data.test_size, data.channels, data.size
        (1437, 360, 1, 16)
    """
    if name in ("digits", "digits8"):
        split = digits(8 if name == "digits8" else 16)
        return InMemory(name, 10, (split.train_images, split.train_labels), (split.test_images, split.test_labels))
    if name == "cifar10":
        return _cifar10(root)
    if name == "imagenet":
        from fastres.lab.folders import Folders

        return Folders(root, workers)
    raise DataError(f"data: got {name!r}, expected one of {', '.join(NAMES)}")


def _cifar10(root: Path | None) -> InMemory:
    torchvision = import_torchvision("CIFAR-10")
    made: Any = torchvision.datasets.CIFAR10
    check = torchvision.datasets.utils.check_integrity
    where = f"download {CIFAR10_URL} and unpack it there: tar -xzf cifar-10-python.tar.gz -C {root or 'FOLDER'}"
    if root is None:
        raise DataError(f"data root: got none, expected the folder of CIFAR-10 (--data-root); {where}")
    folder = root / made.base_folder
    files = [*made.train_list, *made.test_list, (made.meta["filename"], made.meta["md5"])]
    for file, md5 in files:
        if not (folder / file).is_file():
            raise DataError(f"data root {root}: has no {made.base_folder}/{file}; {where}")
        if not check(str(folder / file), md5):
            raise DataError(f"data file {folder / file}: is corrupt: its MD5 is not {md5}; {where}")
    train, test = (made(root, train=train, download=False) for train in (True, False))
    pairs = [
        (torch.from_numpy(each.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(each.targets))
        for each in (train, test)
    ]  # [N, 3, 32, 32] uint8, [N] int64
    return InMemory("cifar10", 10, pairs[0], pairs[1])


def import_torchvision(what: str) -> Any:
    """torchvision with its data sets; raises MissingExtra, saying that `what` needs it."""
    try:
        import torchvision.datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        extra = 'pip install "fastres[train]"'
        raise MissingExtra(f"{what} needs torchvision, which cannot be imported ({error}): {extra}") from error
    return torchvision
