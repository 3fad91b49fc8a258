"""Real images that need no download: the digits and the photographs that scikit-learn bundles.

Digits: 1797 handwritten digits, 8x8, 16 gray levels (Alpaydin and Kaynak, UCI, 1998). Photographs: china.jpg and
flower.jpg, 427x640 (CC BY).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.lab.errors import require


@dataclass(frozen=True)
class Digits:
    """The digits in a fixed split: same seed, same split."""

    train_images: Tensor  # [n_train, 1, size, size] fp32, zero mean and unit deviation over the training images
    train_labels: Tensor  # [n_train] int64
    test_images: Tensor  # [n_test, 1, size, size], scaled with the training images' statistics
    test_labels: Tensor  # [n_test]


@dataclass(frozen=True)
class Photographs:
    """The two photographs, preprocessed."""

    names: list[str]
    images: Tensor  # [2, 3, size, size] fp32, normalized as torchvision's ImageNet networks expect


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


def photographs(size: int = 224) -> Photographs:
    """scikit-learn's two photographs through torchvision's ImageNet preprocessing.

    Resized to 256 at size 224 (in proportion at other sizes), center-cropped, normalized.

    Raises MissingExtra where scikit-learn, Pillow or torchvision is not installed.

    >>> photographs().images.shape
    torch.Size([2, 3, 224, 224])
    """
    bundle = require("sklearn.datasets", "the photographs", "train").load_sample_images()
    open_array = require("PIL.Image", "the photographs", "train").fromarray
    weights = require("torchvision.models", "the photographs", "train").ResNet50_Weights.IMAGENET1K_V1
    preprocess = weights.transforms(crop_size=size, resize_size=size * 256 // 224)
    images = [preprocess(open_array(pixels)) for pixels in bundle.images]  # 2 x [3, size, size]
    return Photographs([name.rsplit("/", 1)[-1] for name in bundle.filenames], torch.stack(images))
