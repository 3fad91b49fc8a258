"""Runs that are stopped, killed and interrupted go on exactly; two processes equal one on the joined batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

from fastres.lab.errors import OutputError  # noqa: E402
from fastres.lab.loop import RunResult, RunSpec, run  # noqa: E402
from fastres.lab.recipes import recipe  # noqa: E402
from own_process import own_process  # noqa: E402
from train_runs import SPEC, assert_equal, timeless, weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_stopped_and_resumed_is_the_same_run_bit_for_bit(whole, tmp_path):
    result, folder, _ = whole
    for stop in (1, 2, 7, 11):
        stopped = run(SPEC, tmp_path, device="cpu", stop_after=stop)
        assert stopped.iterations == stop and not (tmp_path / "result.json").exists()
    assert timeless(run(SPEC, tmp_path, device="cpu")) == timeless(result)
    assert_equal(weights(tmp_path), weights(folder))


def test_what_was_logged_after_the_checkpoint_is_cut_off(whole, tmp_path):
    class Killed(BaseException):
        pass

    def die(step):
        if step.step == 10:
            raise Killed

    with pytest.raises(Killed):
        run(SPEC, tmp_path, device="cpu", checkpoint_every=4, on_step=die)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4  # 3, 6, 9; the checkpoint is of 8
    assert timeless(run(SPEC, tmp_path, device="cpu")) == timeless(whole[0])
    rows = [row.rpartition(",")[0] for row in (tmp_path / "log.csv").read_text().splitlines()]
    assert rows == [row.rpartition(",")[0] for row in (whole[1] / "log.csv").read_text().splitlines()]


def test_killed_while_the_checkpoint_is_written(whole, tmp_path, monkeypatch):
    run(SPEC, tmp_path, device="cpu", stop_after=5)

    def torn(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", torn)
        with pytest.raises(OutputError, match="checkpoint.pt: cannot be written: No space left"):
            run(SPEC, tmp_path, device="cpu", checkpoint_every=2)
    assert timeless(run(SPEC, tmp_path, device="cpu")) == timeless(whole[0])


COMMAND = [sys.executable, "-m", "fastres", "train", "resnet8", "--recipe", "digits-quick", "--device", "cpu"]
COMMAND += ["--threads", "1", "--iterations", "40", "--batch-size", "16", "--checkpoint-every", "1"]


@pytest.fixture
def typer():
    pytest.importorskip("typer")
    pytest.importorskip("rich")


@pytest.mark.parametrize("most", [2, pytest.param(5, marks=pytest.mark.full)])
def test_kill_9_at_any_moment(typer, tmp_path, most):
    """Killed again and again, at whatever it was doing, until it is done; the weights are those of a run left alone."""
    from cli_cases import started

    log, b = tmp_path / "b" / "log.csv", tmp_path / "b"
    for attempt in range(most + 1):
        with started([*COMMAND, "--out", str(b)]) as process:
            before, deadline = log.stat().st_size if log.exists() else 0, time.monotonic() + 120
            while process.poll() is None and attempt < most and time.monotonic() < deadline:
                if log.exists() and log.stat().st_size > before + 60:
                    time.sleep(0.003 * attempt)
                    process.kill()  # kill -9
                    break
                time.sleep(0.001)
            _, err = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), err
        if process.returncode == 0:
            break
    assert process.returncode == 0 and attempt >= 2
    assert not [path.name for path in b.iterdir() if path.name.endswith(".tmp")]  # of writes that were killed
    wanted = run(RunSpec.from_dict(json.loads((b / "spec.json").read_text())), tmp_path / "a", device="cpu")
    assert_equal(weights(b), weights(tmp_path / "a"))
    assert timeless(RunResult.from_dict(json.loads((b / "result.json").read_text()))) == timeless(wanted)


@own_process
def test_ctrl_c_leaves_a_run_that_goes_on(whole, tmp_path):
    def interrupt(step):
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    torch.set_num_threads(1)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(SPEC, tmp_path, device="cpu", on_step=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["iteration"] == 5
    assert timeless(run(SPEC, tmp_path, device="cpu")) == timeless(whole[0])


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(), pytest.param((10,), marks=pytest.mark.full)], ids=["whole", "resumed"])
def test_two_processes_equal_one_on_the_joined_batch(typer, tmp_path, stops):
    """BN takes its statistics over a process's part, so one process must take them over the same parts: bn_batch.

    Bit for bit: the losses are halved exactly, and the sum of two gradients has one order.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastres"]
    command += ["train", "resnet8", "--recipe", "digits-quick", "--device", "cpu", "--out", tmp_path / "two"]
    for extra in (*(["--stop-after", str(stop)] for stop in stops), []):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, (extra, done.stderr)
        assert done.stdout.count("test error") == 1  # one process shows
    spec = RunSpec("resnet8", "digits", replace(recipe("digits-quick"), bn_batch=32))
    one = run(spec, tmp_path / "one", device="cpu")
    assert_equal(weights(tmp_path / "two"), weights(tmp_path / "one"))
    two = RunResult.from_dict(json.loads((tmp_path / "two" / "result.json").read_text()))
    assert two.test_error == one.test_error
    for mine, theirs in zip(two.history, one.history, strict=True):
        # the first point after a resume lacks the second process's share before it
        if not stops or mine.iteration != 12:
            assert mine.train_loss == pytest.approx(theirs.train_loss, rel=1e-6)
            assert mine.train_error == theirs.train_error
        assert mine.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-6)
