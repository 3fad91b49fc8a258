"""A short run of the loop on the digits, and how runs are compared; for the loop's tests."""

from __future__ import annotations

from dataclasses import replace

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
