"""Saving: a file is the old one or the whole new one, whatever happens; what no file can hold is refused by name."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections import defaultdict

import pytest
import torch
from torch import nn

import fastres
from fastres import _files
from fastres.graph.steps import Slot
from fastres.inference.file import store
from file_cases import X, assert_same, aten, freeze, run, through


def test_paths(residual, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    residual.save("here")
    (tmp_path / "folder").mkdir()
    residual.save(tmp_path / "folder" / "über naß")
    (tmp_path / "link").symlink_to("folder/target")
    residual.save(tmp_path / "link")  # a link is followed
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "target").is_file()
    for path in ("here", tmp_path / "folder" / "über naß", "link", str(tmp_path / "here")):
        assert_same(fastres.load(path)(X), residual(X))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "here", "link", "target", "über naß"]
    with pytest.raises(IsADirectoryError, match="folder"):
        residual.save(tmp_path / "folder")
    with pytest.raises(OSError, match="no regular file"):
        residual.save("/dev/null")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        residual.save(tmp_path / "nowhere" / "net")
    for path in (3, None, b"bytes"):
        with pytest.raises(TypeError):
            residual.save(path)


def test_permissions(residual, tmp_path):
    """A new file has those that files get here, another one keeps its own."""
    (tmp_path / "usual").touch()
    residual.save(tmp_path / "net")
    assert (tmp_path / "net").stat().st_mode == (tmp_path / "usual").stat().st_mode
    for mode in (0o640, 0o444):
        (tmp_path / "net").chmod(mode)
        residual.save(tmp_path / "net")
        assert (tmp_path / "net").stat().st_mode & 0o777 == mode


class Stop(BaseException):
    pass


@pytest.mark.parametrize("step", ["write_tensors", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt(), Stop()], ids=lambda e: type(e).__name__)
def test_a_failed_save_leaves_the_old_file_alone(residual, residual_file, tmp_path, monkeypatch, step, error):
    path = tmp_path / "net"
    path.write_bytes(residual_file.read_bytes())
    real = getattr(store, step, None)

    def broken(*args, **kwargs):
        if real:
            real(*args, **kwargs)  # the temporary file is there, whole
        raise error

    monkeypatch.setattr(store if real else os, step, broken)
    with pytest.raises(type(error)):
        residual.save(path)
    assert path.read_bytes() == residual_file.read_bytes() and os.listdir(tmp_path) == ["net"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_full_disk(residual_file, tmp_path):
    code = """
        import os, resource, signal, sys
        import fastres
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        frozen = fastres.load(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            frozen.save(sys.argv[2])
        except OSError as error:
            print(type(error).__name__)
        print(os.listdir(os.path.dirname(sys.argv[2])))
    """
    output, errors = run(code, residual_file, tmp_path / "net").communicate()
    assert output == "OSError\n[]\n", errors


@pytest.mark.skipif(sys.platform == "win32", reason="needs kill and locks")
def test_what_a_killed_save_leaves_goes_with_the_next(residual, tmp_path):
    """... but not the file of a writer that is alive, however long it takes."""
    code = """
        import sys, time
        from fastres._files import write_atomically
        def write(file):
            file.write(b"half")
            file.flush()
            print("begun", flush=True)
            time.sleep(600)
        write_atomically(sys.argv[1], write)
    """
    path = tmp_path / "net"
    residual.save(path)
    whole = path.read_bytes()
    alive, killed = run(code, path), run(code, path)
    try:
        assert alive.stdout.readline() == killed.stdout.readline() == "begun\n"
        assert len(os.listdir(tmp_path)) == 3
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert path.read_bytes() == whole and len(os.listdir(tmp_path)) == 3
        residual.save(path)
        assert len(os.listdir(tmp_path)) == 2 and path.read_bytes() == whole
    finally:
        for process in (alive, killed):
            process.kill()
            process.communicate()
    residual.save(tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["net", "other"]


def test_a_file_that_is_removed_before_its_lock_is_made_again(tmp_path, monkeypatch):
    """The race between a new writer and one that tidies up, planted: no public way hits it."""
    real, removed = _files._lock, []

    def lock(file, wait=True):
        if wait and not removed:
            removed.append(os.unlink(file.name))
        return real(file, wait)

    monkeypatch.setattr(_files, "_lock", lock)
    _files.write_atomically(tmp_path / "a", lambda file: file.write(b"whole"))
    assert removed and (tmp_path / "a").read_bytes() == b"whole" and os.listdir(tmp_path) == ["a"]


def test_writers_and_readers_at_once(residual, tmp_path):
    path, errors, until = tmp_path / "net", [], time.monotonic() + 2
    residual.save(path)

    def work(action):
        while time.monotonic() < until:
            try:
                action()
            except BaseException as error:
                errors.append(error)

    actions = [lambda: residual.save(path)] * 3 + [lambda: fastres.load(path)] * 2
    threads = [threading.Thread(target=work, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == ["net"]


# ---- what no file holds


@contextlib.contextmanager
def refused(folder, words):
    with pytest.raises(fastres.FrozenFileError, match=rf"net' is not written: {words}"):
        yield
    assert os.listdir(folder) == []


def test_a_network_without_a_graph(tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.bn(self.conv(x))
            return y if y.sum() > 0 else -y

    frozen = freeze(Branch())
    assert frozen.report.capture == "modules"
    with refused(tmp_path, r"Branch was frozen without a graph.*torch.exp"):
        frozen.save(tmp_path / "net")


def nested(value, depth):
    return value if depth == 0 else [nested(value, depth - 1)]


odd = torch.randn(3)
TENSORS = {
    "sparse": odd.to_sparse(),
    "complex64": odd.to(torch.complex64),
    "meta": odd.to("meta"),
    "qint8": torch.quantize_per_tensor(odd, 0.1, 0, torch.qint8),
}
STEPS = {
    "aten.relu_.default writes": (aten.relu_.default, (Slot(0),)),
    "aten.from_file.default takes a string, filename": (aten.from_file.default, ("/etc/passwd",)),
    "it calls .*built-in": (torch.relu, (Slot(0),)),
    "it calls .*getattr": (getattr, (Slot(0), "shape")),
    "complex is no plain value": (aten.add.Tensor, (Slot(0), 1j)),
    "Tensor is no plain value": (aten.add.Tensor, (Slot(0), odd)),
    "does not take 2 positional arguments": (aten.relu.default, (Slot(0), 1)),
}
STRUCTURES = {"defaultdict": defaultdict(list, a=Slot(0)), "nested more than 32 deep": nested(Slot(0), 40)}
REFUSED = [
    *((f"odd is .*{words}", {"outputs": (Slot(1),), "tensors": {"odd": t}}) for words, t in TENSORS.items()),
    *((f"step .*{words}", {"outputs": (Slot(1),), "steps": [step]}) for words, step in STEPS.items()),
    *((f".*{words}", {"outputs": outputs}) for words, outputs in STRUCTURES.items()),  # a factory could be anything
]


@pytest.mark.parametrize(("words", "network"), REFUSED, ids=[words for words, _ in REFUSED])
def test_networks_that_no_file_holds(tmp_path, words, network):
    with refused(tmp_path, words):
        through(tmp_path / "net", **network)
