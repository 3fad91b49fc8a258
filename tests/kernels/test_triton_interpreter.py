"""The Triton kernels without a GPU: the lanes of tests/kernels/interpreter run in Triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, so the lanes have a process of their own. They are not named
test_*.py, so that pytest does not collect them here, where kernels are compiled. fp32 and fp16 only: the interpreter's
bf16 is wrong.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

LANES = Path(__file__).parent / "interpreter"


def passed(lanes, *arguments):
    """How many tests of these lanes pass; asserts that none fails and none is skipped."""
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    env.pop("PYTEST_ADDOPTS", None)
    env.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    command += [str(LANES / f"lane_{lane}.py") for lane in lanes]
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout
    ((count, word),) = re.findall(r"(\d+) (passed|failed|skipped|error)", run.stdout.splitlines()[-1])
    assert word == "passed", run.stdout
    return int(count)


TOGETHER = [("add_relu", "bn_act", "geometry"), ("conv_act",)]  # in one process


@pytest.mark.parametrize("lanes", TOGETHER, ids="-".join)
def test_lanes(lanes):
    assert passed(lanes) > 50


@pytest.mark.full
def test_the_rest_of_the_lanes():
    assert passed(["conv_act"], "-m", "full") >= 30


def test_every_lane_is_run():
    assert {p.stem.removeprefix("lane_") for p in LANES.glob("lane_*.py")} == {lane for x in TOGETHER for lane in x}
