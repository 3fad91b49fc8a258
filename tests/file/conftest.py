"""A saved network, and a way to write it with other content."""

import builtins

import pytest

from file_cases import content, forge, hostile_base


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
