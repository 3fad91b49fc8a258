"""Predicting on a Ray cluster: a class for Ray Data's map_batches, and the engine of ``predict(engine="ray")``.

The engine sends no image over the network: a task is the number of a batch, and the actor that has it reads its images,
which every node must see under the same names. Ray runs a task of a dead actor again, so a batch may be computed twice;
its rows arrive once, in the order of the batches.
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastres._log import first_line
from fastres.inference.frozen import FrozenModel
from fastres.inference.load import load
from fastres.pipelines.answers import answers_to, count_classes, device_of
from fastres.pipelines.images import Decoder, Item, Transform
from fastres.pipelines.shards import Row
from fastres.pipelines.sources import Images

BATCHES = 8  # a task of Ray has so many: what a dead actor costs, and how often rows arrive


class Predictor:
    """A frozen classifier for Ray Data: ``dataset.map_batches(fastres.ray.Predictor, fn_constructor_args=[file])``.

    A call takes {column: values} and gives the same columns without the images, and for each row ``classes`` and
    ``scores`` [n, top_k], the likeliest first (-1 and NaN where there are none), ``labels`` [n, top_k] if there are
    any, and ``error``, empty or the reason.

    Args:
        model: a file that ``FrozenModel.save`` wrote, or a function that gives a frozen model.
        column: holds the images: a file's bytes, as ``ray.data.read_binary_files`` gives them, or pixels [h, w, 3]
            uint8 as ``ray.data.read_images`` does.
        batch: images a call of the network at most; fewer are filled up to a power of two, more are cut.
        top_k, labels, image_size, transform: as for ``fastres.predict``.
        device: None keeps that of the file.

    Example:
        >>> import io, numpy, tempfile, torch, fastres, fastres.ray
        >>> from PIL import Image
        >>> net = fastres.models.cifar_resnet(8).eval()
        >>> fastres.freeze(net, torch.randn(2, 3, 32, 32), tune=False).save(saved := f"{tempfile.mkdtemp()}/net")
        >>> predict = fastres.ray.Predictor(saved, image_size=32, top_k=2)
        >>> Image.new("RGB", (40, 30), "red").save(file := io.BytesIO(), "png")
        >>> files = numpy.array([file.getvalue(), b"damaged"], object)
        >>> rows = predict({"bytes": files, "path": numpy.array(["a", "b"])})
        >>> sorted(rows), rows["classes"].shape, rows["error"][1][:8]
        (['classes', 'error', 'path', 'scores'], (2, 2), 'no image')
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Callable[[], FrozenModel],
        *,
        column: str = "bytes",
        batch: int = 32,
        top_k: int = 5,
        labels: Sequence[str] | None = None,
        image_size: int = 224,
        transform: Transform | None = None,
        device: str | None = None,
    ) -> None:
        self.network = model() if callable(model) else load(model, device=device)
        if not isinstance(self.network, FrozenModel):
            raise TypeError(f"model: got {type(self.network).__name__}, expected a FrozenModel")
        self.column, self.batch, self.labels = column, batch, labels
        self.decoder = Decoder(transform, image_size)
        self.top_k = min(top_k, count_classes(self.network, self.decoder, batch, labels))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy

        if self.column not in batch:
            raise ValueError(f"column: got {self.column!r}, expected one of {sorted(batch)}")
        images = batch[self.column]
        items = [Item("", place, _value(one)) for place, one in enumerate(images)]
        rows: list[Row] = []
        for start in range(0, len(items), self.batch):
            decoded = self.decoder.batch(part := items[start : start + self.batch])
            size = min(self.batch, 1 << (len(part) - 1).bit_length())  # the network is prepared for few sizes
            rows += answers_to(self.network, self.decoder, decoded, size, self.top_k, self.labels)
        made = {name: values for name, values in batch.items() if name != self.column}

        def filled(name: str, nothing: Any, kind: Any) -> Any:
            cells = [row[name] if row["error"] is None else [nothing] * self.top_k for row in rows]
            return numpy.array(cells, kind).reshape(len(rows), self.top_k)

        made["classes"], made["scores"] = filled("classes", -1, numpy.int64), filled("scores", numpy.nan, numpy.float32)
        if self.labels is not None:
            made["labels"] = filled("labels", "", object)
        made["error"] = numpy.array([row["error"] or "" for row in rows], object)
        return made


def _value(image: Any) -> Any:
    return bytes(image) if isinstance(image, bytes | bytearray | memoryview) else image


class Cluster:
    """A connection to Ray: one that is there, the cluster at an address, or one of this machine's own.

    Raises:
        ImportError: Ray is not installed; the message has the pip command.
        ValueError: nothing answers at the address.
    """

    def __init__(self, address: str | None) -> None:
        try:
            self.ray: Any = importlib.import_module("ray")
            importlib.import_module("ray.data")
        except ImportError as error:
            raise ImportError(f'engine: ray needs Ray ({first_line(error)}): pip install "fastres[ray]"') from error
        self.own = not self.ray.is_initialized()
        if self.own:
            options = {"logging_level": logging.ERROR, "log_to_driver": False}
            try:
                if found := re.fullmatch(r"(?:ray://)?([\w.-]+):(\d+)", address or ""):  # Ray would try for minutes
                    socket.create_connection((found[1], int(found[2])), timeout=10).close()
                self.ray.init(
                    address=address or "local", **options, **({} if address else {"include_dashboard": False})
                )
            except (OSError, ValueError, RuntimeError) as error:
                text = f"address: got {address!r}, expected that of a running cluster, such as 10.0.0.1:6379 or auto"
                raise ValueError(f"{text}: {first_line(error)}") from error

    def close(self) -> None:
        """Leave the cluster, if this connected to it."""
        if self.own:
            self.ray.shutdown()

    def answers(
        self,
        network: FrozenModel,
        images: Images,
        decoder: Decoder,
        batch: int,
        top_k: int,
        labels: Sequence[str] | None,
        workers: int | None,
        start: int,
    ) -> Iterator[list[Row]]:
        """The rows of the images from number `start` on, a batch at a time, in order.

        Raises ValueError where no file holds the network.
        """
        with tempfile.TemporaryDirectory() as folder:
            network.save(path := Path(folder, "network"))
            held = self.ray.put(path.read_bytes())
        batches = -(-(images.count - start) // batch)
        most = min(batches, workers or max(1, int(self.ray.cluster_resources().get("CPU", 1))))
        kind = device_of(network).type
        context = self.ray.data.DataContext.get_current()
        before = context.execution_options.preserve_order, context.enable_progress_bars
        context.execution_options.preserve_order, context.enable_progress_bars = True, False
        try:  # a dataset keeps the context that it was made in
            # Not range(): reading it takes CPUs, which the actors may all have.
            numbers = self.ray.data.from_items(list(range(batches)), override_num_blocks=-(-batches // BATCHES))
            rows = numbers.map_batches(
                _Part,
                batch_size=1,
                compute=self.ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
                num_gpus=1 if kind == "cuda" else None,
                fn_constructor_args=[held, kind, images, decoder, batch, top_k, labels, start],
            )
        finally:
            context.execution_options.preserve_order, context.enable_progress_bars = before
        for row in rows.iter_rows():
            yield json.loads(row["rows"])


class _Part:
    """An actor: the rows of the batches whose numbers it is given, each as JSON."""

    def __init__(
        self,
        held: Any,
        device: str,
        images: Images,
        decoder: Decoder,
        batch: int,
        top_k: int,
        labels: Sequence[str] | None,
        start: int,
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "network").write_bytes(importlib.import_module("ray").get(held))
            self.network = load(Path(folder, "network"), device=device)
        self.images, self.decoder, self.batch, self.start = images, decoder, batch, start
        self.how = batch, top_k, labels
        self.items: Iterator[Item] = iter(())  # of batch number `following` and on
        self.following = -1
        torch.set_grad_enabled(False)

    def __call__(self, numbers: dict[str, Any]) -> dict[str, list[str]]:
        made = []
        for number in numbers["item"].tolist():
            if number != self.following:  # a table's rows are found by reading their group from its first one
                self.items = self.images.items(self.start + number * self.batch)
            self.following = number + 1
            decoded = self.decoder.batch(list(itertools.islice(self.items, self.batch)))
            made.append(answers_to(self.network, self.decoder, decoded, *self.how))
        return {"rows": [json.dumps(rows) for rows in made]}
