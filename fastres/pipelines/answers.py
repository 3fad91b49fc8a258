"""The rows of decoded images: a frozen network's likeliest classes, or why there are none."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastres._log import first_line
from fastres.inference.frozen import FrozenModel
from fastres.pipelines.images import Decoded, Decoder
from fastres.pipelines.shards import Row


def answers_to(
    network: FrozenModel, decoder: Decoder, decoded: Decoded, batch: int, top_k: int, labels: Sequence[str] | None
) -> list[Row]:
    """The rows of a batch. The network always has `batch` images, so that it is prepared for one number of them."""
    answers: Iterator[tuple[list[int], list[float]]] = iter(())
    if decoded.images is not None:
        given = decoded.images.to(device_of(network), non_blocking=True)
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


def count_classes(network: FrozenModel, decoder: Decoder, batch: int, labels: Sequence[str] | None) -> int:
    """The number of classes. Raises ValueError where the network or the labels do not fit."""
    example = decoder.example(batch).to(device_of(network))
    try:
        made = network(example)
    except (RuntimeError, ValueError) as error:  # frozen for other images
        raise ValueError(f"model: does not run on images of {list(example.shape)}: {first_line(error)}") from error
    classes = _logits(made, batch).shape[1]
    if labels is not None and len(labels) != classes:
        raise ValueError(f"labels: got {len(labels)}, expected {classes}, one for each class of the model")
    return classes


def device_of(model: nn.Module) -> torch.device:
    return next((t.device for t in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))
