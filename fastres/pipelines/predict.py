"""predict: the loop over a source, and what of it survives a kill."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastres._info import usable_cores
from fastres._log import first_line
from fastres.inference.file.values import FrozenFileError
from fastres.inference.freeze import DTYPE_NAMES, freeze
from fastres.inference.frozen import FrozenModel
from fastres.inference.load import load
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
    try:
        network = _network(model, decoder, batch, wanted, device, tune, shards) if done < images.count else None
        if network is not None:
            top_k = min(top_k, _classes(network, decoder, batch, labels))
    except BaseException:
        if shards:
            shards.close()
        raise
    workers = usable_cores() if workers is None else workers
    rows = _rows(network, images, decoder, batch, workers, top_k, labels, shards)
    return Predictions(rows, images.count, done, network)


def _rows(
    network: FrozenModel | None,
    images: Images,
    decoder: Decoder,
    batch: int,
    workers: int,
    top_k: int,
    labels: Sequence[str] | None,
    shards: Shards | None,
) -> Iterator[Row]:
    try:
        if shards:
            yield from shards.rows()
        if network is not None:
            for decoded in _decoded(images, shards.done if shards else 0, decoder, batch, workers, _device(network)):
                made = _answers(network, decoder, decoded, batch, top_k, labels)
                if shards:
                    shards.add(made)
                yield from made
        if shards:
            shards.finish()
    finally:
        if shards:
            shards.close()


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


def _answers(
    network: FrozenModel, decoder: Decoder, decoded: Decoded, batch: int, top_k: int, labels: Sequence[str] | None
) -> list[Row]:
    """The rows of a batch. The network always has `batch` images, so that it is prepared for one number of them."""
    answers: Iterator[tuple[list[int], list[float]]] = iter(())
    if decoded.images is not None:
        given = decoded.images.to(_device(network), non_blocking=True)
        count = len(given)
        if count < batch:  # the last one, or one with damaged images
            given = torch.cat((given, given[:1].expand(batch - count, -1, -1, -1)))
        logits = _logits(network(decoder.given(given)), batch)[:count]
        scores, classes = logits.softmax(1).topk(top_k)  # [n, top_k] each; NaN where an answer is not finite
        answers = iter(zip(classes.tolist(), scores.tolist(), strict=True))
    rows = []
    for (path, row), error in zip(decoded.names, decoded.errors, strict=True):
        best, chances = next(answers) if error is None else ([], [])
        if any(chance != chance for chance in chances):
            best, chances, error = [], [], "the network's answer is not finite"
        path = os.fsencode(path).decode(errors="backslashreplace")  # names that are no UTF-8
        names = [labels[one] for one in best] if labels is not None else None
        shown = [float(f"{chance:.6g}") for chance in chances]
        rows.append(Row(path=path, row=row, classes=best, labels=names, scores=shown, error=error))
    return rows


def _logits(made: Any, count: int) -> Tensor:
    """The network's answer to `count` images as logits [count, classes], fp32. Raises ValueError for another answer."""
    logits = made if isinstance(made, Tensor) else getattr(made, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(made).__name__
        raise ValueError(f"model: gave {got} for {count} images, expected logits [{count}, classes]")
    return logits.float()


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
    where = torch.device(device) if device is not None else _device(model)
    count = min(batch, 16) if where.type == "cpu" else batch  # a CPU runs larger ones in parts; a GPU records them
    try:
        frozen = freeze(model, decoder.example(count), dtype=dtype, device=device, tune="auto" if tune else False)
    except ValueError as error:
        raise ValueError(str(error).replace("example_inputs: the model", "model:")) from error
    if shards:
        with contextlib.suppress(FrozenFileError):  # without a graph: no file holds it
            frozen.save(shards.model)
    return frozen


def _classes(network: FrozenModel, decoder: Decoder, batch: int, labels: Sequence[str] | None) -> int:
    """The number of classes. Raises ValueError where the network or the labels do not fit."""
    example = decoder.example(batch).to(_device(network))
    try:
        made = network(example)
    except (RuntimeError, ValueError) as error:  # frozen for other images
        raise ValueError(f"model: does not run on images of {list(example.shape)}: {first_line(error)}") from error
    classes = _logits(made, batch).shape[1]
    if labels is not None and len(labels) != classes:
        raise ValueError(f"labels: got {len(labels)}, expected {classes}, one for each class of the model")
    return classes


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))


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
