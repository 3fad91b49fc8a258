"""Where tests marked `gpu` run: on the GPU, or with FASTRES_TEST_DEVICE=cpu on the CPU, as far as it can stand for one.

The second is for `make gpu-dry-run`: it proves that the tests themselves run, and nothing about a GPU.
"""

import os

import pytest
import torch

DRY = os.environ.get("FASTRES_TEST_DEVICE") == "cpu"
DEVICE = torch.device("cpu" if DRY else "cuda")

needs_device = pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="no CUDA device")
on_gpu_alone = pytest.mark.skipif(DRY, reason="dry run: streams and CUDA graphs are a GPU's")


def needs_gpus(count):
    """A mark: skipped where there are fewer."""
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs")
