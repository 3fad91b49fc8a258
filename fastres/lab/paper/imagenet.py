"""Experiment 6, ImageNet (Tables 2 to 4): a checkpoint's errors in the paper's three evaluations.

    1-crop       shorter side 256, the center 224
    10-crop      four corners, the center, and their mirror images; the mean of the softmax (Tables 2, 3)
    multi-scale  the whole image, shorter side 224, 256, 384, 480, 640, and mirrored; the network is fully
                 convolutional: its last pooling averages over any size (Table 4)

The checkpoint may be torchvision's (shortcut B; v1.5 is resnet50, v1 resnet50-v1), or any state_dict of the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastres.lab import datasets, networks
from fastres.lab.checkpoints import load_checkpoint
from fastres.lab.devices import channels_last, pick_device
from fastres.lab.evaluation import Views, test_errors
from fastres.lab.paper.presets import PaperError, Published, find
from fastres.lab.paper.runs import Context, Evaluation, Experiment
from fastres.lab.paper.tables import Outcome, Table, percent

VIEWS: dict[str, Views] = {"1-crop": "single", "10-crop": "ten-crop", "multi-scale": "multi-scale"}


def check(asked: Evaluation) -> tuple[str, Path]:
    """The network and its checkpoint; raises PaperError where one is missing, or a view is unknown."""
    if asked.network is None or asked.weights is None:
        missing = "network" if asked.network is None else "weights"
        raise PaperError(
            f"{missing}: got none, expected --network resnet50 --weights FILE --data-root FOLDER (with train/ and val/)"
        )
    unknown = [view for view in asked.views if view not in VIEWS]
    if unknown or not asked.views:
        raise PaperError(f"views: got {', '.join(unknown) or 'none'}, expected some of {', '.join(VIEWS)}")
    return asked.network, asked.weights


def outcome(context: Context) -> Outcome:
    """The measured errors, a row for each published number, and their difference.

    Raises LabError: no network or checkpoint, one that does not fit, no data.
    """
    asked = context.evaluation
    network, weights = check(asked)
    data = datasets.load("imagenet", context.place.data_root)
    options: dict[str, Any] = {} if asked.shortcut is None else {"shortcut": asked.shortcut}
    model = networks.build(network, data.classes, data.channels, **options)
    load_checkpoint(weights, model, network)
    model = channels_last(model.to(pick_device(context.place.device)))
    measured = {}
    for view in asked.views:
        context.tell(f"{network}, {view}, {data.test_size:,} images")
        measured[view] = test_errors(model, data, VIEWS[view])
    shortcut = None if network.startswith("plain") else asked.shortcut or "B"
    rows: list[tuple[str, Published | None]] = []
    for view in asked.views:
        rows += [(view, each) for each in rows_for(network, view, shortcut) or (None,)]

    def difference(view: str, published: Published | None, error: str) -> str:
        known = getattr(published, error, None)
        return "-" if known is None else f"{100 * (getattr(measured[view], error) - known):+.2f}"

    table = Table.of(
        f"{network}, shortcut {shortcut or 'none'}, {data.test_size:,} images of {data.classes:,} classes",
        {
            "views": lambda row: row[0],
            "top-1 error %": lambda row: percent(measured[row[0]].top1),
            "top-5 error %": lambda row: percent(measured[row[0]].top5),
            "published by": lambda row: row[1].source if row[1] else "not published",
            "top-1 %": lambda row: percent(row[1].top1) if row[1] else "-",
            "top-5 %": lambda row: percent(row[1].top5) if row[1] else "-",
            "difference": lambda row: difference(*row, "top1"),
            "difference, 5": lambda row: difference(*row, "top5"),
        },
        rows,
        f"Weights: {weights.name}.",
    )
    lines = tuple(
        f"{view}: {percent(measured[view].top1)} % top-1, {difference(view, each, 'top1')} against {each.source}"
        for view, each in rows
        if each
    )
    kept = {view: {"top1": e.top1, "top5": e.top5, "images": e.images} for view, e in measured.items()}
    return Outcome((table,), lines, (), {"network": network, "errors": kept})


def rows_for(network: str, view: str, shortcut: str | None) -> list[Published]:
    """The published errors of one network and evaluation.

    >>> [each.source for each in rows_for("resnet50-v1", "10-crop", "B")]
    ['Table 3']
    """
    found = find(network.removesuffix("-v1"), data="imagenet", protocol=view)
    return [each for each in found if each.shortcut == shortcut]


EXPERIMENTS = (
    Experiment(
        6,
        "imagenet",
        "ImageNet: a checkpoint's exact evaluation",
        "Tables 2, 3, 4",
        lambda preset: (),
        outcome,
        presets=("imagenet",),
        note="forward passes only: 50,000 images x 1, 10, and 10 larger views",
    ),
)
