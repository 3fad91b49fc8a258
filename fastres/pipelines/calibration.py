"""Images for the calibration of an int8 network, read as `predict` reads them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from fastres.pipelines.images import Decoder, Transform
from fastres.pipelines.sources import Images, Source

COUNT = 256  # images, spread evenly over the source
_AT_A_TIME = 8


def calibration_images(
    source: Source, image_size: int = 224, transform: Transform | None = None, count: int = COUNT
) -> Iterator[Tensor]:
    """Batches of images [n, C, H, W], float32, for ``fastres.freeze(..., dtype="int8", calibrate=...)``.

    Args:
        source, image_size, transform: as for ``fastres.predict``.
        count: how many at the most; images that cannot be decoded are left out.

    Raises:
        FileNotFoundError, ValueError: no such source, or none of its images can be decoded.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = tempfile.mkdtemp()
        >>> for name in ("red", "blue"):
        ...     Image.new("RGB", (40, 30), name).save(f"{folder}/{name}.png")
        >>> [tuple(batch.shape) for batch in calibration_images(folder, image_size=32)]
        [(2, 3, 32, 32)]
    """
    images, decoder = Images(source, None), Decoder(transform, image_size)
    step = max(1, images.count // count)
    chosen = itertools.islice(images.items(0), 0, step * count, step)
    decoded = 0
    while batch := list(itertools.islice(chosen, _AT_A_TIME)):
        found = decoder.batch(batch).images
        if found is not None:
            decoded += len(found)
            yield decoder.given(found).contiguous()
    if not decoded:
        raise ValueError(f"source: none of the {images.count} images can be decoded")
