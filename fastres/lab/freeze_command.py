"""`fastres freeze`: freeze a network given by name, show its report, and write the report and the model to files."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from typer import Argument, Option

from fastres.inference import FrozenFileError, FrozenModel
from fastres.inference import freeze as freeze_model
from fastres.inference.freeze import DTYPE_NAMES
from fastres.lab.devices import pick_device
from fastres.lab.errors import LabError, MissingExtra, RefereeError, first_line
from fastres.lab.named_models import ModelError, build
from fastres.lab.results import environment, prepare_folder, write_json
from fastres.lab.terminal import Device, activity, said
from fastres.pipelines.calibration import calibration_images

SCHEMA = "fastres.freeze/1"
_LARGEST = 1 << 14  # pixels a side


@dataclass(frozen=True)
class Request:
    """Freeze a network for inference, and report what was folded and fused, its speed, and the referee's verdict.

    Nothing is downloaded: weights are random unless --weights or the folder of hf: provides them.
    """

    model: Annotated[
        str,
        Argument(
            metavar="MODEL",
            help="torchvision:resnet50, timm:resnet50d, fastres:resnet18, hf:FOLDER or net.py:function.",
            show_default=False,
        ),
    ]
    report: Annotated[bool, Option("--report", help="Print the whole report, not just its first line.")] = False
    image_size: Annotated[str, Option(help="Pixels per side, or HEIGHTxWIDTH.")] = "224"
    batch: Annotated[int, Option(min=1, help="Images in the example; the frozen model takes any number.")] = 1
    dtype: Annotated[str, Option(help="fp32, bf16, fp16 or int8.")] = "fp32"
    calibrate: Annotated[
        Path | None, Option(help="For int8: a folder of images like those to come; 256 of them are read.")
    ] = None
    channels: Annotated[int | None, Option(min=1, help="Channels of the images; by default 3.")] = None
    weights: Annotated[
        Path | None, Option(help="A state_dict (.safetensors, .pt, .pth); by default random weights.")
    ] = None
    device: Device = "auto"
    tune: Annotated[bool, Option("--tune/--no-tune", help="Measure layouts, packs and eager.")] = True
    precision: Annotated[str, Option(help="auto, or exact: no Winograd, direct products alone.")] = "auto"
    max_weights: Annotated[
        float | None, Option(min=0, help="Megabytes of packed and transformed weights beside the weights; 0: none.")
    ] = None
    save: Annotated[Path | None, Option(help="Save the frozen model to this file.")] = None
    json: Annotated[Path | None, Option("--json", help="Write the report to this file as JSON.")] = None


def run(console: Console, request: Request, command: str) -> FrozenModel:
    """Build the network, freeze it for images of the size asked for, and show or write what was asked for.

    Raises LabError for a bad option, model, weights file or output path, before any work that it would waste;
    RefereeError where the referee rejects the frozen network: the report has been shown and written, nothing saved.
    """
    shape, dtype, device = _checked(request)
    logging.getLogger("fastres").addHandler(logging.NullHandler())  # its warnings are in the report
    start = time.perf_counter()
    with activity() as say:
        say(f"building {request.model}")
        named = build(request.model, request.weights, request.channels)
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).sub_(0.45).div_(0.225).to(device)
        model = named.model.to(device)
        say(f"running {request.model} once")
        _run_once(request.model, model, images)
        say(f"freezing {request.model}" + (" and measuring it" if request.tune else ""))
        with said(lambda text: say(f"freezing {request.model}: {text}")):
            frozen = _freeze(model, images, "int8" if request.dtype == "int8" else dtype, request)
    seconds = time.perf_counter() - start

    report = frozen.report
    size = "x".join(map(str, shape))
    console.print(f"{named.name}: {named.weights}; example {size}; {seconds:.1f} s", soft_wrap=True, markup=False)
    text = f"{report}\n\n{report.table()}" if request.report else str(report).splitlines()[0]
    if report.quantization is not None:
        text += f"\n\n{report.quantization.table()}" if request.report else f"\n{report.quantization}"
    console.print(text, soft_wrap=True, markup=False)
    if request.json is not None:
        data = {"schema": SCHEMA, **environment(device, command), "model": named.name, "weights": named.weights}
        write_json(request.json, {**data, "example": list(shape), "seconds": seconds, "report": report.to_dict()})
        console.print(f"report: {request.json}", soft_wrap=True, markup=False)
    if report.verification is not None and not report.verification:
        ratio = report.verification.error_ratio
        raise RefereeError(f"the referee rejects the frozen {named.name}: error {ratio:.3g} times eager's")
    if request.save is not None:
        _save(frozen, request.save)
        console.print(f"frozen model: {request.save}", soft_wrap=True, markup=False)
    return frozen


def _checked(request: Request) -> tuple[tuple[int, int, int, int], torch.dtype, torch.device]:
    """The example's shape, the dtype and the device, once every option is checked and the paths are writable."""
    if request.dtype not in (*DTYPE_NAMES, "int8"):
        raise LabError(f"--dtype: got {request.dtype!r}, expected {', '.join([*DTYPE_NAMES, 'int8'])}")
    if (request.calibrate is None) == (request.dtype == "int8"):
        wanted = "a folder of images for --dtype int8" if request.calibrate is None else "--dtype int8 with it"
        raise LabError(f"--calibrate: got {request.calibrate or 'none'}, expected {wanted}")
    if request.calibrate is not None and request.channels not in (None, 3):
        raise LabError(f"--channels: got {request.channels}, expected 3 for --calibrate: images are read in RGB")
    if request.precision not in ("auto", "exact"):
        raise LabError(f"--precision: got {request.precision!r}, expected auto or exact")
    sides = request.image_size.lower().split("x")
    numbers = [int(side) if side.isascii() and side.isdigit() and len(side) < 6 else 0 for side in sides]
    if not 1 <= len(sides) <= 2 or not all(1 <= number <= _LARGEST for number in numbers):
        wanted = f"a number of pixels from 1 to {_LARGEST}, or HEIGHTxWIDTH"
        raise LabError(f"--image-size: got {request.image_size!r}, expected {wanted}")
    if request.calibrate is not None and len(set(numbers)) > 1:
        raise LabError(f"--image-size: got {request.image_size!r}, expected a square for --calibrate")
    device = pick_device(request.device)
    for path in (request.json, request.save):
        if path is not None:
            prepare_folder(path.parent, [path.name])
    shape = request.batch, request.channels or 3, numbers[0], numbers[-1]
    return shape, DTYPE_NAMES.get(request.dtype, torch.float32), device


def _run_once(name: str, model: nn.Module, images: Tensor) -> None:
    """Run the network, so that an image size or number of channels it cannot take is found before freezing."""
    try:
        with torch.no_grad():
            model(images)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        shape = list(images.shape)
        raise ModelError(f"model: {name} does not run on images of {shape}: {first_line(error)}") from error


def _freeze(model: nn.Module, images: Tensor, dtype: torch.dtype | str, request: Request) -> FrozenModel:
    try:
        given = None if request.calibrate is None else calibration_images(request.calibrate, images.shape[-1])
        how: dict[str, Any] = {"tune": "auto" if request.tune else False, "precision": request.precision}
        room = None if request.max_weights is None else int(request.max_weights * 1e6)
        return freeze_model(model, images, dtype=dtype, **how, max_weights=room, verify="warn", calibrate=given)
    except ImportError as error:  # Pillow
        raise MissingExtra(first_line(error)) from error
    except FileNotFoundError as error:
        raise LabError(f"--calibrate: {first_line(error)}") from error
    except (TypeError, ValueError) as error:
        for name in ("calibrate: ", "source: "):
            if str(error).startswith(name):
                raise LabError(f"--calibrate: {str(error).removeprefix(name)}") from error
        if str(error).startswith("dtype: got 'int8'"):
            raise LabError(f"--{first_line(error)}") from error
        if str(error).startswith("model:"):  # for example, it is quantized already
            raise ModelError(f"{request.model}: {error}") from error
        raise


def _save(frozen: FrozenModel, path: Path) -> None:
    try:
        frozen.save(path)
    except FrozenFileError as error:  # a network without a graph
        raise LabError(f"--save: {error}") from error
    except OSError as error:
        raise LabError(f"--save {path}: cannot be written: {error.strerror or error}") from error
