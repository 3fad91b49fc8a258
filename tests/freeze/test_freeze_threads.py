"""Frozen models in threads, in processes and under inference mode."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastres.graph import export
from freeze_cases import cifar, compare, fixed, freeze, images


@pytest.fixture(scope="module")
def net():
    return cifar()


@pytest.fixture(scope="module")
def frozen(net):
    return freeze(net, images(2, 16), tune=False, verify=False)


# ---- threads ---------------------------------------------------------------------------------------------------------


def in_threads(work, count):
    """`work(i)` in `count` threads that start together; the first exception is raised here."""
    start, errors = threading.Barrier(count), []

    def run(i):
        try:
            start.wait(60)
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "threads wait for one another"
    if errors:
        raise errors[0]


@pytest.fixture
def switching():
    """Threads take turns much more often than they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("sizes", ["one size", "other sizes"])
@pytest.mark.parametrize(("capture", "tune"), [("graph", False), ("graph", True), ("modules", False)])
def test_31_eight_threads_get_the_bits_of_one(net, switching, capture, tune, sizes):
    first = freeze(net, images(2, 16), capture=capture, tune=tune, verify=False)
    edges = [16] * 6 + ([16, 16] if sizes == "one size" else [12, 20])  # graphs of these two are made meanwhile
    inputs = [images(n + 1, edge) for n, edge in enumerate(edges)]
    inputs[5][0, 0, 0, 0] = float("inf")  # has a plan of its own
    single = copy.deepcopy(first)
    want = [single(x).nan_to_num() for x in inputs]
    for turn in range(3):
        shared = copy.deepcopy(first)  # fresh: threads lower it and pack its weights at once

        def work(i, shared=shared, turn=turn):
            for step in range(10):
                which = (i + step * turn) % 8
                with torch.inference_mode(i % 3 == 0):
                    assert torch.equal(shared(inputs[which]).nan_to_num(), want[which]), (turn, i, step, which)

        in_threads(work, 8)


def test_31_threads_freeze_while_others_run(net, frozen, switching):
    other = copy.deepcopy(frozen)
    by_modules = freeze(net, images(2, 16), capture="modules", tune=False, verify=False)
    x = images(4, 16)
    want, done, made = frozen(x), threading.Event(), []

    def work(i):
        if i < 2:
            try:
                for _ in range(2):
                    made.append(freeze(net, images(2, 8 + 4 * i), tune=False, verify=False).report)
            finally:
                if len(made) == 4:
                    done.set()
        while i > 1 and not done.wait(1e-4):
            assert torch.equal(frozen(x), want)
            torch.testing.assert_close(by_modules(x), want, rtol=1e-4, atol=1e-4)  # its layers see the export
            if i == 2:
                other.capture(images(2, 20))  # waits for the export

    in_threads(work, 6)
    assert [(report.capture, report.folded) for report in made] == [("graph", 7)] * 4


def test_31_a_size_that_many_threads_ask_for_is_captured_once(caplog):
    net, x = fixed(), images(3, 12)
    shared = freeze(net, images(2, 16), tune=False, verify=False)
    with caplog.at_level("INFO", "fastres"):
        in_threads(lambda i: compare(net, shared, x), 6)
    assert caplog.text.count("captured again for [3, 3, 12, 12]") == 1 and len(shared._variants) == 1


def test_captures_of_several_threads_take_turns():
    source, inside = fixed(), threading.Event()
    shared = freeze(source, images(2, 16), tune=False, verify=False)

    def work(i):
        if i == 0:
            with export.LOCK:
                inside.set()
                assert not captured.wait(0.3)
        else:
            inside.wait(10)
            assert shared(images(2, 16)).shape == (2, 4, 16)  # what is captured and lowered waits for nobody
            shared.capture(images(2, 12))
            captured.set()

    captured = threading.Event()
    shared(images(2, 16))
    in_threads(work, 2)
    assert captured.is_set()


# ---- processes -------------------------------------------------------------------------------------------------------


class Features(Dataset):
    """Images, run through a network where the DataLoader asks for them."""

    def __init__(self, network: nn.Module, images: torch.Tensor) -> None:
        self.network, self.images = network, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.network(self.images[index : index + 1])[0]


def work_in_a_dataloader(method: str) -> None:
    net = cifar()
    frozen, x = freeze(net, images(2, 16), tune=False, verify=False), images(7, 16)
    with torch.no_grad():
        want = net(x)
    options = {"batch_size": 3, "num_workers": 2, "multiprocessing_context": method, "timeout": 240}
    got = list(DataLoader(Features(frozen, x), **options))
    assert [len(part) for part in got] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen(x), want, rtol=1e-4, atol=1e-5)  # and here, as before


def find_no_lock_in_a_child() -> None:
    """A child of a process in which another thread holds the lock, in the middle of an export."""
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with export.LOCK:
            taken.set()
            over.wait(30)

    frozen = freeze(cifar(), images(2, 16), tune=False, verify=False)
    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of newer Pythons, about forking with threads
        child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(17 if frozen(images(3, 16)).shape == (3, 5) and export.LOCK.acquire(timeout=10) else 1)
    over.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


def in_a_process_of_its_own(*command: str) -> None:
    """Runs a function of this file: what forks must not do so in a worker, which has threads of others."""
    folders = [os.path.dirname(__file__), *(p for p in sys.path if p)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, __file__, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.mark.parametrize(
    "method", [pytest.param("fork", marks=needs_fork), pytest.param("spawn", marks=pytest.mark.full)]
)
def test_37_in_the_workers_of_a_dataloader(method):
    in_a_process_of_its_own("work_in_a_dataloader", method)


@needs_fork
def test_a_child_process_finds_no_lock_taken():
    in_a_process_of_its_own("find_no_lock_in_a_child")


# ---- inference mode -------------------------------------------------------------------------------------------------


def test_under_inference_mode(frozen):
    x, shared = images(3, 16), copy.deepcopy(frozen)
    with torch.inference_mode():
        inside = [shared(x.clone()) for _ in range(3)]
        assert all(t.is_inference() for t in inside[1:])  # the first call lowers, outside it
    outside = [shared(x) for _ in range(3)]
    assert all(torch.equal(t, frozen(x)) for t in inside + outside)
    assert not any(t.is_inference() or t.requires_grad for t in outside)
    head = nn.Linear(5, 2)
    head(outside[-1]).sum().backward()  # a plain tensor to whatever comes behind
    assert head.weight.grad is not None


def test_frozen_under_inference_mode_it_is_as_any(net):
    source, x, ones = copy.deepcopy(net), images(2, 12), torch.ones(1, 3, 16, 16)
    with torch.inference_mode():
        fast = freeze(source, images(2, 16), tune=False, verify=False)
        inside = fast(ones)
    assert torch.equal(fast(ones), inside)
    assert not any(t.is_inference() for t in fast.state_dict().values())
    with torch.no_grad():
        source.fc.bias.add_(1)
    assert fast.is_stale()
    fast.refresh()
    torch.testing.assert_close(fast(ones), inside + 1)
    with torch.inference_mode():
        want = source(x)
        torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-5)  # captured in there
    torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
