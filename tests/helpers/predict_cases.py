"""What the tests of predict share: a tiny classifier, folders of tiny images, runs in a process that can be killed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import fastres

CLASSES = 7


def net() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, CLASSES)).eval()


def write_images(folder: Path, count: int, size: int = 24) -> list[Path]:
    """PNG files of noise, each of its own brightness."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{place:04}.png" for place in range(count)]
    for place, path in enumerate(paths):
        rng = torch.Generator().manual_seed(place)
        low = place * 37 % 200
        Image.fromarray(torch.randint(low, low + 56, (size, size, 3), dtype=torch.uint8, generator=rng).numpy()).save(
            path
        )
    return paths


def run(source, **options):
    """The rows of `fastres.predict` with the tiny classifier at 16 pixels."""
    return list(predictions(source, **options))


def predictions(source, model=None, **options):
    return fastres.predict(
        model or net(), source, **{"image_size": 16, "tune": False, "workers": 0, "batch": 8, **options}
    )


CHILD = """
import sys
from fastres.pipelines import shards
shards.SECONDS = 0.0  # a shard a batch, so that a run of seconds has many
from predict_cases import predictions
rows = predictions(sys.argv[1], out=sys.argv[2], workers=int(sys.argv[3]))
print("ready", rows.resumed, flush=True)
for place, row in enumerate(rows):
    print(place, flush=True)
"""


@contextmanager
def child(source: Path, out: Path, workers: int = 2):
    """A process that predicts and prints "ready" with the rows found, then each row's number; killed -9 in the end."""
    command = [sys.executable, "-c", CHILD, str(source), str(out), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
