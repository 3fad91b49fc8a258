"""The data sets of the experiments: digits (bundled with scikit-learn), CIFAR-10 and ImageNet (from a folder).

Nothing is downloaded. Digits: 1797 handwritten digits, 8x8, 16 gray levels (Alpaydin and Kaynak, UCI, 1998); the demo's
photographs, china.jpg and flower.jpg, 427x640 (CC BY), come with scikit-learn too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.lab.batches import DataSet, InMemory, Part, order, stream
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

    Raises DataError for an unknown name, a folder without the data set, a corrupt file; MissingExtra.

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


@dataclass(frozen=True)
class Digits:
    """The digits in a fixed split: same seed, same split."""

    train_images: Tensor  # [n_train, 1, size, size] fp32, zero mean and unit deviation over the training images
    train_labels: Tensor  # [n_train] int64
    test_images: Tensor  # [n_test, 1, size, size], scaled with the training images' statistics
    test_labels: Tensor  # [n_test]


def digits(size: int = 16, test_fraction: float = 0.2, seed: int = 0) -> Digits:
    """scikit-learn's handwritten digits in a stratified split, upsampled from 8x8 to size x size.

    Raises MissingExtra where scikit-learn is not installed.

    >>> split = digits()
    >>> split.train_images.shape, split.test_images.shape
    (torch.Size([1437, 1, 16, 16]), torch.Size([360, 1, 16, 16]))
    """
    bundle = require("sklearn.datasets", "the digits data set", "train").load_digits()
    split = require("sklearn.model_selection", "the digits data set", "train").train_test_split
    rows = range(len(bundle.target))
    train, test = split(rows, test_size=test_fraction, stratify=bundle.target, random_state=seed)
    labels = torch.from_numpy(bundle.target).long()  # [1797]
    images = torch.from_numpy(bundle.images).float()[:, None]  # [1797, 1, 8, 8]
    if size != 8:
        images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)  # [1797, 1, size, size]
    deviation, mean = torch.std_mean(images[train])
    images = (images - mean) / deviation
    return Digits(images[train], labels[train], images[test], labels[test])


def photographs(size: int = 224) -> tuple[list[str], Tensor]:
    """scikit-learn's two photographs through torchvision's ImageNet preprocessing: names, images [2, 3, size, size].

    Raises MissingExtra where scikit-learn, Pillow or torchvision is not installed.

    >>> photographs()[1].shape
    torch.Size([2, 3, 224, 224])
    """
    bundle = require("sklearn.datasets", "the photographs", "train").load_sample_images()
    open_array = require("PIL.Image", "the photographs", "train").fromarray
    weights = require("torchvision.models", "the photographs", "train").ResNet50_Weights.IMAGENET1K_V1
    preprocess = weights.transforms(crop_size=size, resize_size=size * 256 // 224)
    images = [preprocess(open_array(pixels)) for pixels in bundle.images]  # 2 x [3, size, size]
    return [name.rsplit("/", 1)[-1] for name in bundle.filenames], torch.stack(images)
