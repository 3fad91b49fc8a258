"""The paper's preprocessing and augmentation as batched tensor operations, and its test-time views.

    cifar     pad 4 with zeros (the mean, which has been subtracted), crop at random, flip     (section 4.2)
    digits    shift by up to one pixel, repeating the edge
    imagenet  shift colors along the principal axes of RGB, as AlexNet does (section 3.4); the scale in [256, 480], the
              224 crop and the flip happen while an image is decoded, see :mod:`fastres.lab.folders`

`draw` runs first, on the CPU and for the global batch; then `augmented`, for a process's part of it, on any device. So
the images are the same on every device and for every number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.lab.recipes import Augment
from fastres.pipelines.images import DEVIATION

SCALES = (224, 256, 384, 480, 640)  # shorter sides of multi-scale testing

# Square roots of the eigenvalues, and the eigenvectors, of ImageNet's RGB covariance in 0..1 (as in fb.resnet.torch).
_SPREAD = (0.2175, 0.0188, 0.0045)
_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_SHIFT = {"cifar": 4, "digits": 1}


def draw(kind: Augment, count: int, rng: torch.Generator) -> Tensor:
    """Draw the random numbers that augment `count` images.

    [count, 3] int64 for "cifar" and "digits": rows and columns to shift by, flipped or not; [count, 3] floats, one per
    color axis, for "imagenet"; [count, 0] for "none".
    """
    if kind == "imagenet":
        return 0.1 * torch.randn(count, 3, generator=rng)
    if kind == "none":
        return torch.empty(count, 0)
    moves = torch.randint(0, 2 * _SHIFT[kind] + 1, (count, 2), generator=rng)
    flips = torch.randint(0, 2, (count, 1), generator=rng) if kind == "cifar" else torch.zeros(count, 1).long()
    return torch.cat((moves, flips), 1)  # [count, 3]


def augmented(images: Tensor, kind: Augment, drawn: Tensor) -> Tensor:
    """Augment `images` [n, C, H, W], floats whose mean has been subtracted, by the numbers `drawn` [n, ...].

    Keeps shape, dtype and device; the result is in channels_last order for "cifar" and "digits".
    """
    if kind == "none":
        return images
    if kind == "imagenet":
        tints = drawn * drawn.new_tensor(_SPREAD) @ drawn.new_tensor(_AXES).T / drawn.new_tensor(DEVIATION)  # [n, 3]
        return images + tints.to(images)[:, :, None, None]
    n, _, height, width = images.shape
    shift = _SHIFT[kind]
    padded = F.pad(images, (shift,) * 4, mode="constant" if kind == "cifar" else "replicate")  # [n, C, H+2s, W+2s]
    down, right, flip = drawn.to(images.device).unbind(1)  # [n] each
    rows = down[:, None] + torch.arange(height, device=images.device)  # [n, H]
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = right[:, None] + torch.where(flip[:, None] == 1, width - 1 - columns, columns)  # [n, W]
    image = torch.arange(n, device=images.device)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]  # [n, H, W, C]
    return shifted.permute(0, 3, 1, 2)  # [n, C, H, W]


def ten_crops(images: Tensor, size: int) -> Tensor:
    """AlexNet's ten views: four corners, the center, and their mirror images; their predictions are averaged.

    [N, C, H, W] -> [10, N, C, size, size]. Raises ValueError for an image smaller than `size`.

    >>> ten_crops(torch.zeros(2, 3, 256, 300), 224).shape
    torch.Size([10, 2, 3, 224, 224])
    """
    height, width = images.shape[2:]
    if size > min(height, width):
        raise ValueError(f"size: got {size}, expected at most the images' shorter side, {min(height, width)}")
    down, right = height - size, width - size
    corners = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))
    crops = [images[:, :, y : y + size, x : x + size] for y, x in corners]
    return torch.stack([*crops, *(crop.flip(3) for crop in crops)])


def multi_scale(images: Tensor, scales: Iterable[int] = SCALES) -> list[Tensor]:
    """The views of the paper's multi-scale test: `images` [N, C, H, W] with their shorter side at each of `scales`.

    A network that ends in global average pooling and one linear layer, as the paper's do, is fully convolutional: its
    answer for a larger view is the mean of the scores over all positions. The prediction is the mean over the views.

    >>> [tuple(view.shape[2:]) for view in multi_scale(torch.zeros(1, 3, 480, 640), (240, 480))]
    [(240, 320), (480, 640)]
    """
    height, width = images.shape[2:]
    sizes = [(round(height * s / min(height, width)), round(width * s / min(height, width))) for s in scales]
    return [
        images if size == (height, width) else F.interpolate(images, size, mode="bilinear", antialias=True)
        for size in sizes
    ]
