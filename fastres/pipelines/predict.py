"""predict: the loop over a source, and what of it survives a kill."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastres._info import usable_cores
from fastres._log import first_line
from fastres.inference.file.values import FrozenFileError
from fastres.inference.freeze import DTYPE_NAMES, freeze
from fastres.inference.frozen import FrozenModel
from fastres.inference.load import load
from fastres.pipelines.answers import answers_to, count_classes, device_of
from fastres.pipelines.cluster import Cluster
from fastres.pipelines.images import Decoded, Decoder, Item, Transform, start_worker
from fastres.pipelines.shards import Row, Shards
from fastres.pipelines.sources import Images, Source


class Predictions(Iterator[Row]):
    """The rows of ``fastres.predict``, in the order of the images.

    Attributes:
        total: how many rows there are in all.
        resumed: how many of them an earlier run has made; they come first.
        model: the frozen network; None where every row was there.
    """

    def __init__(self, rows: Iterator[Row], total: int, resumed: int, model: FrozenModel | None) -> None:
        self._rows, self.total, self.resumed, self.model = rows, total, resumed, model

    def __next__(self) -> Row:
        return next(self._rows)

    def close(self) -> None:
        """Stop: the batches that are done are written, the workers end."""
        self._rows.close()  # type: ignore[attr-defined]


def predict(
    model: nn.Module,
    source: Source,
    *,
    out: str | os.PathLike[str] | None = None,
    batch: int = 32,
    workers: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    top_k: int = 5,
    labels: Sequence[str] | None = None,
    image_size: int = 224,
    transform: Transform | None = None,
    column: str | None = None,
    tune: bool = True,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
) -> Predictions:
    """Freeze a classifier and run it over images, however many: an iterator with one row an image, in their order.

    Images are decoded in worker processes. One that cannot be decoded is a row with its error. With ``out`` the rows
    go to a file as well, and the run can be resumed: whole batches are kept in the folder OUT.parts every few seconds;
    after a kill, Ctrl-C or a break the same call gives the rows made before from there, then goes on, and the file is
    the one that an uninterrupted run writes. It appears when the last row has been given; another run is refused there.

    Args:
        model: gives logits [N, classes], or an output that has them as ``logits``; a FrozenModel runs as it is.
        source: a folder, a glob, a .txt file with a path a line, a .parquet file with a column of images (bytes, or
            {"bytes", "path"} as Hugging Face's datasets writes them), an image; or a sequence of such.
        out: a new file, .jsonl, .csv or .parquet.
        batch: images a call of the network.
        workers: processes that decode; 0 decodes in this one, None takes as many as there are cores.
        dtype: that the network runs in, as for ``fastres.freeze``; None keeps the model's.
        device: None keeps the model's.
        top_k: classes in a row, the likeliest first.
        labels: the name of each class.
        image_size: the middle of so many pixels a side is cut out after the shorter side was scaled to 256/224 of it,
            and ImageNet's mean and deviation are taken off.
        transform: makes the network's input [C, H, W] of a PIL image in RGB instead, such as torchvision's
            ``weights.transforms()``.
        column: of the images in parquet files, where it is not clear.
        tune: measure how the frozen network runs best.
        engine: "ray" answers on a Ray cluster whose nodes see the images under the same names; ``workers`` is then the
            number of actors, by default one a CPU. The rows and the file are the same, and a run may change engines.
        address: of the cluster, as for ``ray.init``; None: the one that this process is connected to, or a new one.

    Returns:
        :class:`Predictions`. A row is a dict: ``path``; ``row``, the number in a parquet file, else None; ``classes``,
        ``labels`` (None without labels) and ``scores``, the probabilities; ``error``, None or why there are none.

    Raises:
        TypeError, ValueError: an argument that cannot be used, images or a network that are none, rows of another run
            at ``out``.
        FileNotFoundError: no such source.
        ImportError: Pillow, or pyarrow for parquet, is not installed; the message has the pip command.
        OSError: ``out`` cannot be written, or another process writes it.
        RuntimeError: the referee rejects the frozen network; a worker died.

    Example:
        >>> import tempfile, torch, fastres
        >>> from PIL import Image
        >>> folder = tempfile.mkdtemp()
        >>> for name in ("red", "blue"):
        ...     Image.new("RGB", (40, 30), name).save(f"{folder}/{name}.png")
        >>> net = fastres.models.cifar_resnet(8).eval()
        >>> rows = fastres.predict(net, folder, image_size=32, top_k=1, workers=0, out=f"{folder}/rows.csv")
        >>> [(row["path"].rpartition("/")[2], len(row["classes"]), row["error"]) for row in rows]
        [('blue.png', 1, None), ('red.png', 1, None)]
    """
    for name, value, least in (("batch", batch, 1), ("top_k", top_k, 1), ("image_size", image_size, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: got {value!r}, expected a number from {least} on")
    if workers is not None and (type(workers) is not int or workers < 0):
        raise ValueError(f"workers: got {workers!r}, expected a number from 0 on, or None")
    if engine not in ("local", "ray"):
        raise ValueError(f"engine: got {engine!r}, expected 'local' or 'ray'")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if isinstance(dtype, str) and dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype: got {dtype!r}, expected {', '.join(DTYPE_NAMES)}, or a torch.dtype")
    wanted = DTYPE_NAMES[dtype] if isinstance(dtype, str) else dtype
    if isinstance(model, FrozenModel) and wanted not in (None, model.dtype):
        raise ValueError(f"dtype: got {dtype!r}, but the model is frozen in {model.dtype}")
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(f'predict needs Pillow ({first_line(error)}): pip install "fastres[predict]"') from error

    images, decoder = Images(source, column), Decoder(transform, image_size)
    shards = None
    if out is not None:
        about = {"fastres.predict": 1, "images": images.count, "names": images.digest(), "weights": _digest(model)}
        about |= {
            "batch": batch,
            "dtype": str(wanted),
            "top_k": top_k,
            "image_size": image_size,
            "labels": _hash(labels),
        }
        shards = Shards(out, about | {"transform": re.sub(" at 0x[0-9a-f]+", "", repr(transform))})
    done, batch = shards.done if shards else 0, min(batch, images.count)
    cluster: Cluster | None = None
    try:
        cluster = Cluster(address) if engine == "ray" and done < images.count else None
        network = _network(model, decoder, batch, wanted, device, tune, shards) if done < images.count else None
        if network is not None:
            top_k = min(top_k, count_classes(network, decoder, batch, labels))
        if cluster and network is not None and network.report.capture != "graph":
            reason = network.report.capture_reason
            raise ValueError(f"engine: got 'ray' for a network without a graph, which no file holds: {reason}")
    except BaseException:
        for one in (shards, cluster):
            if one:
                one.close()
        raise
    made = None
    if network is not None:
        about_them = network, images, decoder, batch, top_k, labels
        if cluster:
            made = cluster.answers(*about_them, workers, done)
        else:
            made = _locally(*about_them, usable_cores() if workers is None else workers, done)
    return Predictions(_rows(made, shards, cluster), images.count, done, network)


def _rows(made: Iterator[list[Row]] | None, shards: Shards | None, cluster: Cluster | None) -> Iterator[Row]:
    try:
        if shards:
            yield from shards.rows()
        for rows in made or ():
            if shards:
                shards.add(rows)
            yield from rows
        if shards:
            shards.finish()
    finally:
        for one in (shards, cluster):
            if one:
                one.close()


def _locally(
    network: FrozenModel,
    images: Images,
    decoder: Decoder,
    batch: int,
    top_k: int,
    labels: Sequence[str] | None,
    workers: int,
    start: int,
) -> Iterator[list[Row]]:
    """The rows of the images from number `start` on, a batch at a time, decoded by processes of this machine."""
    for decoded in _decoded(images, start, decoder, batch, workers, device_of(network)):
        yield answers_to(network, decoder, decoded, batch, top_k, labels)


def _decoded(
    images: Images, start: int, decoder: Decoder, batch: int, workers: int, device: torch.device
) -> Iterator[Decoded]:
    """The batches, decoded ahead by the workers. Only the images under way are in memory."""
    items = images.items(start)
    batches: Iterator[list[Item]] = iter(lambda: list(itertools.islice(items, batch)), [])
    loader: Any = torch.utils.data.DataLoader(
        decoder,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_same,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
    )
    return iter(loader)


def _same(decoded: Any) -> Any:
    return decoded


def _network(
    model: nn.Module,
    decoder: Decoder,
    batch: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    tune: bool,
    shards: Shards | None,
) -> FrozenModel:
    """The model frozen; the one of the run's beginning where that is known, since another may round otherwise."""
    if isinstance(model, FrozenModel):
        return model
    if shards and shards.model.exists():
        return load(shards.model, device=device)
    where = torch.device(device) if device is not None else device_of(model)
    count = min(batch, 16) if where.type == "cpu" else batch  # a CPU runs larger ones in parts; a GPU records them
    try:
        frozen = freeze(model, decoder.example(count), dtype=dtype, device=device, tune="auto" if tune else False)
    except ValueError as error:
        raise ValueError(str(error).replace("example_inputs: the model", "model:")) from error
    if shards:
        with contextlib.suppress(FrozenFileError):  # without a graph: no file holds it
            frozen.save(shards.model)
    return frozen


def _digest(model: nn.Module) -> str:
    """A hash of the weights."""
    found = hashlib.sha256()
    tensors = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    for name, t in tensors.items():
        found.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _hash(labels: Sequence[str] | None) -> str | None:
    return None if labels is None else hashlib.sha256("\n".join(labels).encode()).hexdigest()[:16]
