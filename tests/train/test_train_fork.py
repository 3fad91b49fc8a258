"""A fork after a threaded training step: DataLoader workers, a child of one thread, locks of other threads.

A child that uses several threads hangs in GNU OpenMP, in eager as in ours (docs/training.md).
"""

import copy
import os
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastres import _extension
from own_process import own_process
from train_cases import assert_bitwise, gradients, twins, vision

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def threaded_step():
    """(a swapped block after a training step on two threads, its input)."""
    torch.set_num_threads(2)
    block, _ = twins(lambda: vision.BasicBlock(8, 8))
    x = torch.randn(8, 8, 48, 48)
    block(x).square().mean().backward()
    return block, x


class Features(Dataset):
    """Images, and what a swapped network makes of them, computed in the worker."""

    def __init__(self, block):
        self.block = block

    def __len__(self):
        return 6

    def __getitem__(self, index):
        x = torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            return x, self.block(x[None])[0]


@own_process
def test_row60_dataloader_workers_after_a_threaded_step():
    block, _ = threaded_step()
    block.eval()
    loader = DataLoader(Features(block), 2, num_workers=2, multiprocessing_context="fork", timeout=120)
    for _ in range(2):
        forked = copy.deepcopy(block)  # what the workers have: the training below moves the statistics
        for x, y in loader:
            with torch.no_grad():
                torch.testing.assert_close(y, forked(x))
            block.train()(x).square().mean().backward()
        block.eval()


def in_a_child(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(17)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


@own_process
def test_row60_a_child_of_one_thread_trains():
    block, x = threaded_step()

    def train():
        torch.set_num_threads(1)
        found = []
        for _ in range(2):
            block.zero_grad()
            block(x).square().mean().backward()
            found.append(gradients(block))
        assert all(g.isfinite().all() for g in found[0].values())
        assert_bitwise(*found)

    in_a_child(train)


@own_process
def test_row60_a_child_finds_no_lock_of_the_extension_taken():
    """Another thread is loading it while this one forks: the lock is private, and nothing else would hold it."""
    native, taken, over = _extension._CPU, threading.Event(), threading.Event()
    native._settled = False

    def hold():
        with native._lock:
            taken.set()
            over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(10)
    in_a_child(lambda: native.why_not())
    over.set()
    thread.join()
