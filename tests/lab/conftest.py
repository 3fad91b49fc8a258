"""Shared by the tests of the training loop: one thread, for sums of one order, and a run that nothing stops."""

import pytest
import torch


@pytest.fixture
def one_thread():
    torch.set_num_threads(1)  # tests/conftest.py sets it back


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """SPEC run without a break: (result, folder, steps). Nobody writes to the folder."""
    from fastres.lab.loop import run
    from train_runs import SPEC

    folder, steps, threads = tmp_path_factory.mktemp("whole") / "new" / "run", [], torch.get_num_threads()
    torch.set_num_threads(1)
    result = run(SPEC, folder, device="cpu", on_step=steps.append)
    torch.set_num_threads(threads)
    return result, folder, steps
