"""`fastres predict`: a network given by name over folders, globs, lists and parquet files, one row an image."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

from rich.console import Console
from torch import nn
from typer import Argument, Option

from fastres.inference import FrozenFileError, load
from fastres.inference.freeze import DTYPE_NAMES
from fastres.lab.cards import Card, card, read_labels
from fastres.lab.devices import pick_device
from fastres.lab.errors import LabError, MissingExtra, RefereeError, RunError, first_line
from fastres.lab.named_models import ModelError, build
from fastres.lab.terminal import Device, activity, progress, recent_rate, said
from fastres.pipelines import Predictions, predict

_OPTIONS = {"source": "IMAGES", "out": "--out", "labels": "--labels", "model": "model", "dtype": "--dtype"}
_OPTIONS |= {"engine": "--engine", "address": "--address"}


@dataclass(frozen=True)
class Request:
    """Run a frozen network over images: the likeliest classes of each, as a table in a file or as JSON lines.

    Example: fastres predict hf:resnet-50 photos/ --out predictions.csv

    An image that cannot be decoded is a row with its error. The same command resumes a run with --out that was killed.

    Nothing is downloaded: weights are random unless --weights or the folder of hf: provides them.
    """

    model: Annotated[
        str,
        Argument(
            metavar="MODEL",
            help="torchvision:resnet50, timm:resnet50d, fastres:resnet18, hf:FOLDER, net.py:function, or a file that"
            " fastres freeze --save wrote.",
            show_default=False,
        ),
    ]
    images: Annotated[
        list[str],
        Argument(
            metavar="IMAGES...",
            help="Folders, globs, images, lists (.txt, a path a line) or .parquet files with a column of images.",
            show_default=False,
        ),
    ]
    weights: Annotated[
        Path | None, Option(help="A state_dict (.safetensors, .pt, .pth); by default random weights.")
    ] = None
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16; by default the model's.")] = None
    out: Annotated[
        Path | None, Option(help="A new file, .parquet, .csv or .jsonl; by default JSON lines go to standard output.")
    ] = None
    batch: Annotated[int, Option(min=1, help="Images a call of the network.")] = 32
    workers: Annotated[
        int | None, Option(min=0, help="Processes that decode; by default one a core, 0: none but this one.")
    ] = None
    top_k: Annotated[int, Option(min=1, help="Classes in a row.")] = 5
    labels: Annotated[
        Path | None, Option(help="The names of the classes, a line each; by default those that the weights name.")
    ] = None
    image_size: Annotated[
        int | None, Option(min=1, help="Pixels a side; by default the network's own transform, or 224.")
    ] = None
    column: Annotated[str | None, Option(help="The column of images in parquet files, where it is not clear.")] = None
    device: Device = "auto"
    engine: Annotated[str, Option(help="local, or ray: on a cluster that sees the images under the same names.")] = (
        "local"
    )
    address: Annotated[str | None, Option(help="The cluster's, for ray; by default one on this machine.")] = None
    tune: Annotated[bool, Option("--tune/--no-tune", help="Measure how the frozen network runs best.")] = True


def run(console: Console, request: Request, command: str) -> None:
    """Predict, with images/s and the time left, and say where the rows are.

    Raises LabError for bad input, before any work that it would waste; RefereeError where the referee rejects the
    frozen network; KeyboardInterrupt after Ctrl-C, with the batches that are done written.
    """
    if request.dtype is not None and request.dtype not in DTYPE_NAMES:
        raise LabError(f"--dtype: got {request.dtype!r}, expected {', '.join(DTYPE_NAMES)}")
    logging.getLogger("fastres").addHandler(logging.NullHandler())  # freeze's warnings are in its report
    errors = Console(stderr=True, highlight=False, emoji=False)
    with _one_line(), activity() as say:
        say(f"building {request.model}")
        model, weights, about = _built(request)
        with said(lambda text: say(f"freezing {request.model}: {text}")):
            rows = _predictions(request, model, about)
    errors.print(f"{request.model}: {weights}; {rows.total} images", soft_wrap=True, markup=False)
    if rows.resumed:
        errors.print(f"resuming: {rows.resumed} rows are there", soft_wrap=True, markup=False)
    count = failed = 0
    rate, start = recent_rate(), time.perf_counter()
    with _one_line(), closing(rows), progress(errors, "predicting") as report:
        try:
            for count, row in enumerate(rows, 1):
                failed += row["error"] is not None
                if request.out is None:
                    console.file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if count >= rows.resumed and (count % request.batch == 0 or count == rows.total):
                    report(count, rows.total, rate(count, time.perf_counter()))
        except KeyboardInterrupt:
            if request.out is not None:
                errors.print("interrupted; run the same command again to resume", soft_wrap=True, markup=False)
            raise
    seconds, made = time.perf_counter() - start, rows.total - rows.resumed
    speed = f"; {made / seconds:.1f} images/s" if made else ""
    where = f"{request.out}: " if request.out is not None else ""
    errors.print(f"{where}{count} rows, {failed} of them errors{speed}", soft_wrap=True, markup=False)


def _built(request: Request) -> tuple[nn.Module, str, Card]:
    """The network, where its weights are from, and what its library says about it."""
    device = pick_device(request.device)
    if ":" not in request.model and os.path.isfile(request.model):
        if request.weights is not None:
            raise LabError(f"--weights: got {request.weights} for a frozen model, which has its own")
        try:
            return load(request.model, device=device), "frozen before", Card()
        except FrozenFileError as error:
            raise ModelError(f"model: {error}") from error
    named = build(request.model, request.weights)
    return named.model.to(device), named.weights, card(named, request.weights)


def _predictions(request: Request, model: nn.Module, about: Card) -> Predictions:
    return predict(
        model,
        request.images,
        out=request.out,
        batch=request.batch,
        workers=request.workers,
        dtype=request.dtype,
        top_k=request.top_k,
        labels=about.labels if request.labels is None else read_labels(request.labels),
        image_size=request.image_size or 224,
        transform=about.transform if request.image_size is None else None,
        column=request.column,
        tune=request.tune,
        engine=cast(Literal["local", "ray"], request.engine),  # checked there
        address=request.address,
    )


@contextmanager
def _one_line() -> Iterator[None]:
    """Errors about what the user gave as one line, with the option's name; faults of fastres as they are."""
    try:
        yield
    except (LabError, BrokenPipeError):
        raise
    except ImportError as error:
        raise MissingExtra(first_line(error)) from error
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        name, _, text = first_line(error).partition(": ")
        if name in _OPTIONS:
            raise LabError(f"{_OPTIONS[name]}: {text}") from error
        if name == "freeze":
            raise RefereeError(first_line(error).rstrip(":")) from error
        if isinstance(error, OSError):
            raise LabError(f"{error.filename or 'output'}: {error.strerror or error}") from error
        if "DataLoader worker" in name:
            raise RunError(
                f"a process that decodes images died: {name}; with --out, the same command resumes"
            ) from error
        raise
