"""ImageNet, or any data set of its layout: ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG, decoded as needed.

    train   shorter side S in [256, 480], a 224 crop at random, flipped or not (section 3.4); colour: augment.py
    test    shorter side 256, the middle 224; or ten crops of it; or the whole image at each of the scales

A crop is cut out of the file and scaled in one step, and a JPEG is decoded no larger than that needs. The mean is one
for each channel, over ImageNet. What is cut out is a function of (seed, iteration, row).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres._info import usable_cores
from fastres.lab.augment import DEVIATION, MEAN, SCALES, augmented, draw, multi_scale, ten_crops
from fastres.lab.datasets import DataSet, Part, import_torchvision, order, stream
from fastres.lab.errors import DataError
from fastres.lab.recipes import TrainRecipe

SIZE, TEST_SIDE = 224, 256
TRAIN_SIDES = (256, 480)
_WHERE = (
    "download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org (with an account) and"
    " unpack them, a folder for each class"
)


@dataclass(frozen=True)
class _Wanted:
    """One image as it is wanted: which, and what is cut out of it."""

    index: int
    key: tuple[object, ...] | None = None  # of the random numbers of a training crop; None: the middle
    whole: int | None = None  # the whole image with its shorter side at this, instead of a crop


class Folders(DataSet):
    """Images in folders; see :func:`fastres.lab.datasets.load`.

    Args:
        root: holds train/ and val/, each with a folder for each class.
        workers: processes that decode; 0 decodes in this one, None takes as many as this process has cores.

    Raises:
        DataError: no such folders, no classes or other ones in val/.
        MissingExtra: torchvision is not installed.
    """

    name, channels, size = "imagenet", 3, SIZE

    def __init__(self, root: Path | None, workers: int | None = None) -> None:
        image_folder = import_torchvision("ImageNet").datasets.ImageFolder
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of the run on this machine
        self.workers = max(1, usable_cores() // beside) if workers is None else workers
        if root is None:
            raise DataError(f"data root: got none, expected a folder with train/ and val/ (--data-root); {_WHERE}")
        found = []
        for part in ("train", "val"):
            if not (root / part).is_dir():
                raise DataError(f"data root {root}: has no {part}/; {_WHERE}: {root / part}/<class>/*.JPEG")
            try:
                found.append(image_folder(root / part))
            except FileNotFoundError as error:  # no classes, or a class without an image
                reason = str(error).splitlines()[0]
                raise DataError(f"data folder {root / part}: {reason} Expected <class>/*.JPEG; {_WHERE}") from error
        train, test = found
        if train.classes != test.classes:
            other = sorted(set(train.classes) ^ set(test.classes))[0]
            raise DataError(f"data root {root}: train/ and val/ have other classes, such as {other!r}")
        self.classes = len(train.classes)
        self._train, self._test = train.samples, test.samples  # [(path, label)]
        self.train_size, self.test_size = len(self._train), len(self._test)

    def batches(
        self, recipe: TrainRecipe, seed: int, start: int, part: Part, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        rows = range(recipe.batch_size)[part.rows(recipe.batch_size)]

        def wanted() -> Iterator[list[_Wanted]]:
            for iteration in range(start, recipe.iterations):
                chosen = order(self.train_size, recipe.batch_size, seed, iteration).tolist()
                keys = [(seed, "crop", iteration, row) if recipe.augment == "imagenet" else None for row in rows]
                yield [_Wanted(chosen[row], key) for row, key in zip(rows, keys, strict=True)]

        for iteration, (images, labels) in enumerate(self._decoded(self._train, wanted(), device), start):
            rng = torch.Generator().manual_seed(stream(seed, "augment", iteration))
            drawn = draw(recipe.augment, recipe.batch_size, rng)[rows.start : rows.stop]
            yield augmented(_centred(images), recipe.augment, drawn), labels

    def test_batches(self, batch_size: int, part: Part, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        starts = range(part.rank * batch_size, self.test_size, part.of * batch_size)
        rows = (range(start, min(start + batch_size, self.test_size)) for start in starts)
        wanted = ([_Wanted(index) for index in each] for each in rows)
        for images, labels in self._decoded(self._test, wanted, device):
            yield _centred(images), labels

    def test_views(self, views: str, device: torch.device) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Every test image with its views.

        Args:
            views: "ten-crop": one tensor [10, 3, 224, 224]; "multi-scale": for each scale [2, 3, h, w], the image and
                its mirror image.

        Yields:
            the views; the label [1].
        """
        side = TEST_SIDE if views == "ten-crop" else max(SCALES)
        wanted = ([_Wanted(index, whole=side)] for index in range(self.test_size))
        for images, labels in self._decoded(self._test, wanted, device):
            image = _centred(images)  # [1, 3, h, w], shorter side `side`
            if views == "ten-crop":
                yield [ten_crops(image, SIZE).flatten(0, 1)], labels
            else:
                yield [torch.cat((view, view.flip(3))) for view in multi_scale(image)], labels

    def _decoded(
        self, samples: list[tuple[str, int]], wanted: Iterable[list[_Wanted]], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images [n, 3, h, w] and labels [n], on `device`, batch by batch in the order asked for."""
        loader: Any = torch.utils.data.DataLoader(
            _Decoder(samples),
            batch_sampler=wanted,
            num_workers=self.workers,
            collate_fn=_collated,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals,
        )
        for indices, images in loader:
            if isinstance(images, str):
                raise DataError(f"data file {samples[indices[0]][0]}: cannot be decoded: {images}; expected an image")
            labels = torch.tensor([samples[index][1] for index in indices])
            yield images.to(device, non_blocking=True), labels.to(device)


def _leave_signals(worker: int) -> None:
    """Ctrl-C is for the loop, which ends its iteration with the workers' help; the loop ends them by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _collated(batch: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | str]:
    """The images' indices and themselves, or the first that could not be decoded and why."""
    images = []
    for index, image in batch:
        if isinstance(image, str):
            return [index], image
        images.append(image)
    return [index for index, _ in batch], torch.stack(images)


class _Decoder(torch.utils.data.Dataset[Any]):
    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __getitem__(self, wanted: _Wanted) -> tuple[int, Tensor | str]:
        """The image, or why there is none: an exception would come out of a worker as a page of text."""
        try:
            return wanted.index, _cut(self.samples[wanted.index][0], wanted)
        except Exception as error:  # Pillow raises nearly anything for damaged bytes
            return wanted.index, next(iter(str(error).splitlines()), type(error).__name__)


def _cut(path: str, wanted: _Wanted) -> Tensor:
    """[3, h, w] uint8."""
    import numpy
    from PIL import Image

    side, across, down, flip = float(TEST_SIDE), 0.5, 0.5, False
    if wanted.whole is not None:
        side = float(wanted.whole)
    elif wanted.key is not None:
        drawn = torch.rand(4, generator=torch.Generator().manual_seed(stream(*wanted.key))).tolist()
        side = TRAIN_SIDES[0] + drawn[0] * (TRAIN_SIDES[1] - TRAIN_SIDES[0])
        across, down, flip = drawn[1], drawn[2], drawn[3] < 0.5
    with Image.open(path) as file:
        file.draft("RGB", (int(side), int(side)))  # a JPEG's decoder can give an eighth, a quarter or a half
        image = file.convert("RGB")
    width, height = image.size
    scale = min(width, height) / side
    if wanted.whole is not None:
        made = image.resize((round(width / scale), round(height / scale)), Image.Resampling.BILINEAR)
    else:
        x, y = across * (width - SIZE * scale), down * (height - SIZE * scale)
        box = (x, y, x + SIZE * scale, y + SIZE * scale)
        made = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    pixels = torch.from_numpy(numpy.array(made)).permute(2, 0, 1)  # [3, h, w]
    return (pixels.flip(2) if flip else pixels).contiguous()


def _centred(images: Tensor) -> Tensor:
    """[n, 3, h, w] uint8 -> fp32, the mean subtracted, unit deviation."""
    mean, deviation = (torch.tensor(t, device=images.device)[:, None, None] for t in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation
