"""The data sets of the experiments: digits (bundled with scikit-learn), CIFAR-10 and ImageNet (from a folder).

Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastres.lab.batches import DataSet, InMemory, Part, order, stream
from fastres.lab.data import digits
from fastres.lab.errors import DataError, require
from fastres.lab.folders import Folders

__all__ = ["NAMES", "DataSet", "Folders", "InMemory", "Part", "load", "order", "stream"]

NAMES = ("digits", "digits8", "cifar10", "imagenet")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


def load(name: str, root: Path | None = None, workers: int | None = None) -> DataSet:
    """The data set called `name`.

    Args:
        name: "digits" (upsampled to 16x16), "digits8" (the original 8x8), "cifar10" or "imagenet".
        root: the folder that holds cifar-10-batches-py/, or train/ and val/; needed for all but the digits.
        workers: processes that decode ImageNet's files, by default one per core; the other data sets use none.

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
        return Folders(root, workers)
    raise DataError(f"data: got {name!r}, expected one of {', '.join(NAMES)}")


def _cifar10(root: Path | None) -> InMemory:
    found = require("torchvision.datasets", "CIFAR-10", "train")
    cifar, check = found.CIFAR10, found.utils.check_integrity
    where = f"download {CIFAR10_URL} and unpack it there: tar -xzf cifar-10-python.tar.gz -C {root or 'FOLDER'}"
    if root is None:
        raise DataError(f"data root: got none, expected the folder of CIFAR-10 (--data-root); {where}")
    folder = root / cifar.base_folder
    for file, md5 in [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]:
        if not (folder / file).is_file():
            raise DataError(f"data root {root}: has no {cifar.base_folder}/{file}; {where}")
        if not check(str(folder / file), md5):
            raise DataError(f"data file {folder / file}: is corrupt: its MD5 is not {md5}; {where}")
    train, test = (cifar(root, train=part, download=False) for part in (True, False))
    pairs = [
        (torch.from_numpy(each.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(each.targets))
        for each in (train, test)
    ]  # [N, 3, 32, 32] uint8, [N] int64
    return InMemory("cifar10", 10, pairs[0], pairs[1])
