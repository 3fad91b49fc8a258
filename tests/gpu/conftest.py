"""Shared by the tests on a GPU: each kernel of conv_act's by name, and cuDNN's switches."""

import pytest
import torch

from gpu_conv import KERNELS, need


@pytest.fixture(params=KERNELS, ids=lambda k: f"{k.name}-{k.element}" if k else "none")
def kernel(request):
    need(request.param)
    return request.param


@pytest.fixture
def tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
