"""What the tests of the CPU convolutions share: memory around a tensor, a process with another instruction set."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from fastres._extension import build_info


def guarded(t):
    """The tensor in the middle of NaN, and the memory around it."""
    if t.dtype is torch.int32:  # a packed weight, of pairs of bf16 numbers
        view, memory = guarded(t.view(torch.float32))
        return view.view(torch.int32), memory
    memory = torch.full((t.numel() + 256,), float("nan"), dtype=t.dtype)
    view = memory.as_strided(t.shape, t.stride(), 128)
    view.copy_(t)
    return view, memory


def run_on(isa: str, module: str, calls: str) -> None:
    """Run `calls` on the test module `tests` in a process whose CPU kernels use this instruction set."""
    isas = ["baseline", "avx2", "avx512", "amx"]
    if isas.index(isa) >= isas.index(str(build_info()["isa_runtime"])) > 0 or build_info()["isa_runtime"] == "baseline":
        pytest.skip("this machine has none wider")
    code = f"""
import sys
sys.path[:0] = {[p for p in sys.path if "tests" in p]!r}
import {module} as tests
assert tests.build_info()["isa_runtime"] == {isa!r}
{textwrap.dedent(calls)}
"""
    environment = os.environ | {"FASTRES_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
