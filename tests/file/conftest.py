"""Saved networks, and a way to write one with other content."""

import builtins

import pytest
import torch

from file_cases import Residual, content, forge, freeze, hostile_base


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "real"
    hostile_base(path)
    return path


@pytest.fixture
def change(real, tmp_path):
    """Writes the file with another document, other tensors or metadata, and the checksum that goes with them."""
    meta, tensors = content(real)
    yield lambda *args, **kwargs: forge(tmp_path / "forged", meta, tensors, *args, **kwargs)
    assert not hasattr(builtins, "pwned")


@pytest.fixture(scope="module")
def residual():
    """A frozen network with a residual."""
    torch.manual_seed(0)
    return freeze(Residual())


@pytest.fixture(scope="module")
def residual_file(residual, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "residual.fastres"
    residual.save(path)
    return path
