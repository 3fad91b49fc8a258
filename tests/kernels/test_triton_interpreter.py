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


def run_lane(lane):
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    env.pop("PYTEST_ADDOPTS", None)
    env.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:randomly", str(lane)]
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    return run.returncode, run.stdout


def counts(output):
    summary = output.strip().splitlines()[-1]
    return {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}


@pytest.mark.parametrize("lane", sorted(LANES.glob("lane_*.py")), ids=lambda p: p.stem)
def test_lane(lane):
    code, output = run_lane(lane)
    assert code == 0, f"{lane.name}:\n{output}"
    got = counts(output)
    assert got.get("passed", 0) > 0 and set(got) == {"passed"}, f"{lane.name}: {got}\n{output}"


def test_there_are_lanes_for_every_operator():
    assert {"lane_add_relu.py", "lane_bn_act.py", "lane_conv_act.py"} <= {p.name for p in LANES.glob("lane_*.py")}
