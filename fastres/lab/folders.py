"""ImageNet, or any data set in its layout: ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG, decoded on the fly.

    train   shorter side S in [256, 480], a random 224 crop, flipped or not (section 3.4); color: augment.py
    test    shorter side 256, the middle 224; or ten crops of it; or the whole image at each of the scales

A crop is cut out of the file and scaled in one step, and a JPEG is decoded no larger than that needs. The mean is one
number per channel, over ImageNet. The crop is a function of (seed, iteration, row).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres._info import usable_cores
from fastres.lab.augment import SCALES, multi_scale, ten_crops
from fastres.lab.batches import Batches, DataSet, Part, order, stream
from fastres.lab.errors import DataError, first_line, require
from fastres.lab.recipes import TrainRecipe
from fastres.pipelines.images import centered, cut, ignore_interrupts, opened

SIZE, TEST_SIDE = 224, 256
TRAIN_SIDES = (256, 480)
_WHERE = (
    "download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org (with an account) and"
    " unpack them, a folder for each class"
)


@dataclass(frozen=True)
class _Request:
    """One image to decode, and what to cut out of it."""

    index: int
    key: tuple[object, ...] | None = None  # of the random numbers of a training crop; None: the middle
    whole: int | None = None  # the whole image with its shorter side at this, instead of a crop


class Folders(DataSet):
    """Images in folders. `workers` processes decode; 0 decodes in this one, None takes as many as there are cores.

    Raises DataError: no train/ and val/ in `root`, no classes, or different ones in val/; MissingExtra.
    """

    name, channels, size = "imagenet", 3, SIZE

    def __init__(self, root: Path | None, workers: int | None = None) -> None:
        image_folder = require("torchvision.datasets", "ImageNet", "train").ImageFolder
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of the run on this machine
        self.workers = max(1, usable_cores() // sharing) if workers is None else workers
        if root is None:
            raise DataError(f"data root: got none, expected a folder with train/ and val/ (--data-root); {_WHERE}")
        found = []
        for part in ("train", "val"):
            if not (root / part).is_dir():
                raise DataError(f"data root {root}: has no {part}/; {_WHERE}: {root / part}/<class>/*.JPEG")
            try:
                found.append(image_folder(root / part))
            except FileNotFoundError as error:  # no classes, or a class without an image
                reason = f"{first_line(error)} Expected <class>/*.JPEG"
                raise DataError(f"data folder {root / part}: {reason}; {_WHERE}") from error
        train, test = found
        if train.classes != test.classes:
            other = sorted(set(train.classes) ^ set(test.classes))[0]
            raise DataError(f"data root {root}: train/ and val/ have different classes, such as {other!r}")
        self.classes = len(train.classes)
        self._train, self._test = train.samples, test.samples  # [(path, label)]
        self.train_size, self.test_size = len(self._train), len(self._test)

    def _training(self, recipe: TrainRecipe, seed: int, start: int, rows: slice, device: torch.device) -> Batches:
        def requests() -> Iterator[list[_Request]]:
            for iteration in range(start, recipe.iterations):
                chosen = order(self.train_size, recipe.batch_size, seed, iteration)[rows].tolist()
                keys = ((seed, "crop", iteration, row) for row in range(rows.start, rows.stop))
                crops = recipe.augment == "imagenet"
                yield [_Request(index, key if crops else None) for index, key in zip(chosen, keys, strict=True)]

        return self._decoded(self._train, requests(), device)

    def test_batches(self, batch_size: int, part: Part, device: torch.device) -> Batches:
        rows = part.test_rows(self.test_size, batch_size)
        requests = ([_Request(index) for index in range(each.start, each.stop)] for each in rows)
        return self._decoded(self._test, requests, device)

    def test_views(self, views: str, device: torch.device) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Every test image with its views, and its label [1].

        "ten-crop" has one tensor [10, 3, 224, 224]; "multi-scale" for each scale [2, 3, h, w], the image and its mirror
        image.
        """
        side = TEST_SIDE if views == "ten-crop" else max(SCALES)
        requests = ([_Request(index, whole=side)] for index in range(self.test_size))
        for image, labels in self._decoded(self._test, requests, device):  # [1, 3, h, w], shorter side `side`
            if views == "ten-crop":
                yield [ten_crops(image, SIZE).flatten(0, 1)], labels
            else:
                yield [torch.cat((view, view.flip(3))) for view in multi_scale(image)], labels

    def _decoded(
        self, samples: list[tuple[str, int]], requests: Iterable[list[_Request]], device: torch.device
    ) -> Batches:
        """Centered fp32 images [n, 3, h, w] and labels [n], on `device`, batch by batch in the order of `requests`."""
        loader: Any = torch.utils.data.DataLoader(
            _Decoder(samples),
            batch_sampler=requests,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=ignore_interrupts,
        )
        for indices, images in loader:
            if isinstance(images, str):
                raise DataError(f"data file {samples[indices[0]][0]}: cannot be decoded: {images}; expected an image")
            labels = torch.tensor([samples[index][1] for index in indices])
            yield centered(images.to(device, non_blocking=True)), labels.to(device)


def _collate(batch: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | str]:
    """The images and their indices, or the index of the first that could not be decoded and the reason."""
    for index, image in batch:
        if isinstance(image, str):
            return [index], image
    return [index for index, _ in batch], torch.stack([image for _, image in batch])  # type: ignore[misc]


class _Decoder(torch.utils.data.Dataset[Any]):
    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __getitem__(self, request: _Request) -> tuple[int, Tensor | str]:
        """The image, or the reason there is none: an exception in a worker would arrive as a page of text."""
        try:
            return request.index, _cut(self.samples[request.index][0], request)
        except Exception as error:  # Pillow raises nearly anything for damaged bytes
            return request.index, first_line(error)


def _cut(path: str, request: _Request) -> Tensor:
    """Decode the file and cut the requested view out of it: [3, h, w] uint8."""
    side, across, down, flip = float(request.whole or TEST_SIDE), 0.5, 0.5, False
    if request.key is not None:
        drawn = torch.rand(4, generator=torch.Generator().manual_seed(stream(*request.key))).tolist()
        side = TRAIN_SIDES[0] + drawn[0] * (TRAIN_SIDES[1] - TRAIN_SIDES[0])
        across, down, flip = drawn[1], drawn[2], drawn[3] < 0.5
    size = SIZE if request.whole is None else None
    pixels = cut(opened(path, int(side), upright=False), side, size, across, down).permute(2, 0, 1)
    return (pixels.flip(2) if flip else pixels).contiguous()  # [3, h, w]
