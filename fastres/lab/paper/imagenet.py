"""Experiment 6, ImageNet (Tables 2 to 4): a checkpoint's errors in the paper's three evaluations beside the published.

    1-crop       shorter side 256, the middle 224
    10-crop      four corners, the middle, and their mirror images; the mean of the softmax (Tables 2, 3)
    multi-scale  the whole image, shorter side 224, 256, 384, 480, 640, and mirrored; the network is fully
                 convolutional: its last pooling averages over whatever size arrives (Table 4)

The checkpoint may be torchvision's (shortcut B; v1.5 is resnet50, v1 resnet50-v1), or any state_dict of the network.
"""

from __future__ import annotations

from typing import Any

from fastres.lab import datasets, networks
from fastres.lab.checkpoints import load_checkpoint
from fastres.lab.devices import channels_last, pick_device
from fastres.lab.evaluation import Views, test_errors
from fastres.lab.paper.experiment import Context, Evaluation, Experiment
from fastres.lab.paper.presets import PaperError
from fastres.lab.paper.published import Published, find
from fastres.lab.paper.tables import Outcome, Table, percent

VIEWS: dict[str, Views] = {"1-crop": "single", "10-crop": "ten-crop", "multi-scale": "multi-scale"}


def check(asked: Evaluation) -> None:
    """Raises PaperError where the network or the checkpoint is missing, or a view is unknown."""
    if asked.network is None or asked.weights is None:
        missing = "network" if asked.network is None else "weights"
        raise PaperError(
            f"{missing}: got none, expected --network resnet50 --weights FILE --data-root FOLDER (with train/ and val/)"
        )
    unknown = [view for view in asked.views if view not in VIEWS]
    if unknown or not asked.views:
        raise PaperError(f"views: got {', '.join(unknown) or 'none'}, expected some of {', '.join(VIEWS)}")


def outcome(context: Context) -> Outcome:
    """The errors measured, a row for each published number, and their difference.

    Raises:
        LabError: no network or checkpoint, one that does not fit, no data.
    """
    asked = context.evaluation
    check(asked)
    assert asked.network is not None and asked.weights is not None
    data = datasets.load("imagenet", context.place.data_root)
    options: dict[str, Any] = {} if asked.shortcut is None else {"shortcut": asked.shortcut}
    model = networks.build(asked.network, data.classes, data.channels, **options)
    load_checkpoint(asked.weights, model, asked.network)
    model = channels_last(model.to(pick_device(context.place.device)))
    measured = {}
    for view in asked.views:
        context.tell(f"{asked.network}, {view}, {data.test_size:,} images")
        measured[view] = test_errors(model, data, VIEWS[view])
    plain = asked.network.startswith("plain")
    shortcut = None if plain else asked.shortcut or "B"
    rows, lines = [], []
    for view, errors in measured.items():
        published: list[Published | None] = [*rows_for(asked.network, view, shortcut)]
        for each in published or [None]:
            source = each.source if each else "not published"
            theirs = (each.top1, each.top5) if each else (None, None)
            differences = [
                None if b is None else a - b for a, b in zip((errors.top1, errors.top5), theirs, strict=True)
            ]
            rows.append(
                (
                    view,
                    percent(errors.top1),
                    percent(errors.top5),
                    source,
                    *map(percent, theirs),
                    *("-" if d is None else f"{100 * d:+.2f}" for d in differences),
                )
            )
            if differences[0] is not None:
                lines.append(f"{view}: {percent(errors.top1)} % top-1, {100 * differences[0]:+.2f} against {source}")
    head = (
        "views",
        "top-1 error %",
        "top-5 error %",
        "published by",
        "top-1 %",
        "top-5 %",
        "difference",
        "difference, 5",
    )
    table = Table(
        f"{asked.network}, shortcut {shortcut or 'none'}, {data.test_size:,} images of {data.classes:,} classes",
        head,
        tuple(rows),
        (f"Weights: {asked.weights.name}.",),
    )
    kept = {view: {"top1": e.top1, "top5": e.top5, "images": e.images} for view, e in measured.items()}
    return Outcome((table,), tuple(lines), (), {"network": asked.network, "errors": kept})


def rows_for(network: str, view: str, shortcut: str | None) -> list[Published]:
    """The published errors of one network and evaluation.

    >>> [each.source for each in rows_for("resnet50-v1", "10-crop", "B")]
    ['Table 3']
    """
    found = find(network.removesuffix("-v1"), data="imagenet", protocol=view)
    return [each for each in found if each.shortcut == shortcut]


EXPERIMENT = Experiment(
    6,
    "imagenet",
    "ImageNet: a checkpoint's exact evaluation",
    "Tables 2, 3, 4",
    lambda preset: (),
    outcome,
    presets=("imagenet",),
    note="forward passes only: 50,000 images x 1, 10, and 10 larger views",
)
