"""Shared by the tests of the CUDA backends without a GPU: one of any compute capability, as far as refusals ask."""

import pytest
import torch

from fastres import _extension


@pytest.fixture
def gpu(monkeypatch):
    """Makes a GPU of this compute capability, and a module built for these architectures."""
    built = _extension.build_info_cuda()

    def make(capability=(9, 0), architectures="8.0;9.0a;10.0+PTX", why_not=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(_extension, "why_not_cuda", lambda: why_not)
        monkeypatch.setattr(_extension, "build_info_cuda", lambda: built | {"architectures": architectures})

    return make
