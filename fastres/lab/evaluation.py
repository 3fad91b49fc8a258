"""Test errors as the paper reports them: one view, ten crops (Tables 2 and 3), or multi-scale (Table 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastres.lab.batches import DataSet, Part
from fastres.lab.errors import DataError
from fastres.lab.folders import Folders

Views = Literal["single", "ten-crop", "multi-scale"]


@dataclass(frozen=True)
class TestErrors:
    """Fractions of the test images."""

    top1: float
    top5: float
    images: int
    views: Views


@torch.no_grad()
def test_errors(model: nn.Module, data: DataSet, views: Views = "single", batch_size: int = 100) -> TestErrors:
    """The errors of `model` on the test images, in eval mode; its mode is restored afterwards.

    With several views a prediction is the mean of the softmax over them.

    Args:
        model: on the device to run on.
        data: from :func:`fastres.lab.datasets.load`; views other than "single" need images in folders.
        views: "single", "ten-crop" or "multi-scale".
        batch_size: for single views.

    Raises DataError: views that the data set does not offer.

    >>> from fastres.lab import datasets, networks
    >>> test_errors(networks.build("resnet8", 10, 1), datasets.load("digits")).images
    360
    """
    if views not in get_args(Views) or (views != "single" and not isinstance(data, Folders)):
        raise DataError(f"views: got {views!r}, expected {'single' if views in get_args(Views) else get_args(Views)}")
    device = next(model.parameters()).device
    was_training, wrong = model.training, torch.zeros(2, dtype=torch.int64)
    model.eval()
    try:
        if views == "single" or not isinstance(data, Folders):
            for images, labels in data.test_batches(batch_size, Part(), device):
                wrong += _wrong(model(images), labels)
        else:
            for tensors, labels in data.test_views(views, device):
                chances = torch.cat([model(view).float().softmax(1) for view in tensors])  # [views, classes]
                wrong += _wrong(chances.mean(0, keepdim=True), labels)
    finally:
        model.train(was_training)
    top1, top5 = (wrong.double() / data.test_size).tolist()
    return TestErrors(top1, top5, data.test_size, views)


def _wrong(scores: Tensor, labels: Tensor) -> Tensor:
    """The number of rows of scores [n, classes] whose best, and whose best five, miss the label [n]: [2]."""
    best = scores.topk(min(5, scores.shape[1]), 1).indices == labels[:, None]  # [n, 5]
    return torch.stack([(~best[:, 0]).sum(), (~best.any(1)).sum()]).cpu()
