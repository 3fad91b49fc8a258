"""Decoding: an image as what a network takes, or the reason there is none; damaged bytes raise nothing.

Every image becomes RGB: gray is repeated, CMYK, palettes and 16 bits are converted, transparency is dropped, an
animation is its first frame. One that its camera marked as rotated is turned upright. Without a transform of the
caller's, the shorter side is scaled to 256/224 of the size and the middle is cut out, in one step (bilinear); a JPEG is
decoded no larger than that needs.
"""

from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres._log import first_line

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in 0..1
Transform = Callable[[Any], Tensor]  # a PIL image in RGB -> [C, H, W], floating


class Item(NamedTuple):
    """One image to decode: a file's path, or a row of a table with its bytes, the path of a file or its pixels."""

    path: str
    row: int | None = None
    data: Any = None  # bytes, a path, or an array [h, w, 3] uint8


class Decoded(NamedTuple):
    """A batch: the images that could be decoded, and for each item its (path, row) and the error or None."""

    names: list[tuple[str, int | None]]
    errors: list[str | None]
    images: Tensor | None  # [n, C, H, W], n the number of None in errors; None where n is 0


def opened(file: Any, side: int | None = None, upright: bool = True) -> Any:
    """Decode a file to a PIL image in RGB; a JPEG whose sides are multiples of `side` smaller."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        if side is not None:
            image.draft("RGB", (side, side))  # a JPEG decoder can scale to 1/8, 1/4 or 1/2
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips them
            image = image.point(lambda value: value * (1 / 256)).convert("L")
        image = image.convert("RGB")
    if upright:
        ImageOps.exif_transpose(image, in_place=True)
    return image


def cut(image: Any, side: float, size: int | None, across: float = 0.5, down: float = 0.5) -> Tensor:
    """Scale the shorter side of a PIL image to `side` and cut out size x size pixels: [size, size, 3] uint8.

    Args:
        image: in RGB.
        side: pixels of the shorter side.
        size: None keeps the whole image.
        across: where the cut is: 0 left, 1 right; `down` likewise.
    """
    import numpy
    from PIL import Image

    width, height = image.size
    scale = min(width, height) / side
    shape, box = (round(width / scale), round(height / scale)), None
    if size is not None:
        x, y = across * (width - size * scale), down * (height - size * scale)
        shape, box = (size, size), (x, y, x + size * scale, y + size * scale)
    return torch.from_numpy(numpy.array(image.resize(shape, Image.Resampling.BILINEAR, box=box)))


def centered(images: Tensor) -> Tensor:
    """[n, 3, h, w] uint8 -> fp32, ImageNet's mean subtracted, unit deviation; the memory layout stays."""
    one = torch.empty_like(images[:1], dtype=torch.float32)  # a constant a pixel: a third of the time of one a channel
    mean, deviation = (one.clone().copy_(torch.tensor(t)[:, None, None]) for t in (MEAN, DEVIATION))
    return images.float().div_(255).sub_(mean).div_(deviation)


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the loop, which needs the workers to finish its iteration and ends them with SIGTERM.

    A loop that ends while a worker hands it a tensor is no error either.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, ConnectionError) else sys.__excepthook__(kind, *rest)


def start_worker(worker: int) -> None:
    """Set up a worker process: Ctrl-C is the loop's, and damaged images say what they are in their row alone."""
    ignore_interrupts(worker)
    warnings.simplefilter("ignore")


class Decoder(torch.utils.data.Dataset[Any]):
    """Decodes the items that it is asked for; it holds none of them, so that worker processes stay small.

    Args:
        transform: of the caller's; None: the middle `size` x `size` pixels, uint8.
        size: pixels a side.
    """

    def __init__(self, transform: Transform | None, size: int) -> None:
        self.transform, self.size = transform, size
        self.shape: tuple[int, ...] | None = None  # of every image that the transform gives

    def example(self, count: int) -> Tensor:
        """Noise as `count` images that a network takes [count, C, H, W]. Raises what the transform raises."""
        import numpy
        from PIL import Image

        noise = numpy.random.default_rng(0).integers(0, 256, (count, self.size * 5 // 4, self.size * 3 // 2, 3))
        images = [self._fitted(Image.fromarray(one)) for one in noise.astype(numpy.uint8)]
        self.shape = tuple(images[0].shape)
        return self.given(self._stacked(images))

    def given(self, images: Tensor) -> Tensor:
        """Decoded images as the network takes them, floating."""
        return images if self.transform else centered(images)

    def __getitem__(self, item: Item) -> Tensor | str:
        """The image, or the reason there is none: an exception in a worker would arrive as a page of text."""
        from PIL import Image, UnidentifiedImageError

        try:
            data = item.path if item.row is None else item.data
            if data is None:
                return "no image: the row has none"
            if not isinstance(data, bytes | str):  # pixels
                return self._fitted(Image.fromarray(data).convert("RGB"))
            side = None if self.transform else self.size * 256 // 224
            return self._fitted(opened(io.BytesIO(data) if isinstance(data, bytes) else data, side))
        except UnidentifiedImageError:
            return "no image: the bytes are of no format that Pillow reads"
        except Exception as error:  # Pillow raises nearly anything for damaged bytes
            return getattr(error, "strerror", None) or first_line(error)

    def batch(self, items: Sequence[Item]) -> Decoded:
        """Decode a batch."""
        found = [self[item] for item in items]
        images = [image for image in found if isinstance(image, Tensor)]
        errors = [image if isinstance(image, str) else None for image in found]
        return Decoded([item[:2] for item in items], errors, self._stacked(images) if images else None)

    __getitems__ = batch  # a DataLoader's worker calls it with the whole batch

    def _stacked(self, images: list[Tensor]) -> Tensor:
        stacked = torch.stack(images)
        return stacked if self.transform else stacked.permute(0, 3, 1, 2)  # [n, 3, h, w], channels_last

    def _fitted(self, image: Any) -> Tensor:
        if self.transform is None:
            return cut(image, self.size * 256 / 224, self.size)  # [h, w, 3]
        made = self.transform(image)
        if not isinstance(made, Tensor) or made.ndim != 3 or not made.is_floating_point():
            got = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise TypeError(f"transform: gave {got}, expected a floating tensor [C, H, W]")
        if self.shape is not None and tuple(made.shape) != self.shape:
            raise ValueError(f"transform: gave {list(made.shape)}, expected {list(self.shape)} as for other images")
        return made
