"""A short run of the loop on the digits, and how runs are compared; for the loop's tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastres.lab.loop import RunSpec
from fastres.lab.recipes import recipe

QUICK = replace(recipe("digits-quick"), batch_size=32, iterations=12, milestones=(8,), test_every=6, log_every=3)
SPEC = RunSpec("resnet8", "digits", QUICK)


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def timeless(result):
    data = result.to_dict()
    return {**data, "seconds": 0, "history": [{**point, "seconds": 0} for point in data["history"]]}


def write_images(root, parts, size):
    """JPEG files of noise in root/part/label, `parts[part]` of each of two labels; those of b are brighter."""
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    for part, count in parts.items():
        for label, name in enumerate("ab"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                rng = torch.Generator().manual_seed(i)
                noise = torch.randint(0, 56, (size[0] + 40 * i, size[1], 3), dtype=torch.uint8, generator=rng)
                image.fromarray((noise + 150 * label).numpy()).save(folder / f"{i}.JPEG", quality=95)
    return root
