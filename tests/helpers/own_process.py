"""Tests that fork, send signals or fill memory, each in a fresh Python process: a worker of pytest-xdist has threads
that do not survive a fork, and it dies of what such a test does to its process.

    @own_process
    def test_a_fork_finds_no_lock_taken(tmp_path):
        ...

Fixtures and parameters are made in the worker and pickled: paths, numbers, tensors, objects of the test's own module.
`run_in_own_process(function, *arguments)` is the same for a part of a test.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def run_in_own_process(function: Callable[..., Any], *args: Any, timeout: float = 240, **kwargs: Any) -> str:
    """Call a function of a module's top level in a fresh process; return what it printed, fail where it fails."""
    function = inspect.unwrap(function)
    command = [sys.executable, __file__, inspect.getsourcefile(function), function.__qualname__]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:  # pipes end with the last process
        pickle.dump((args, kwargs), given)
        given.seek(0)
        files = {"stdin": given, "stdout": said, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **files, env=env, start_new_session=True)
        try:
            code = process.wait(timeout)
        finally:  # with all that it has started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        text = said.read().decode(errors="replace")
    assert code == 0, f"{function.__qualname__} ended with {code}\n{text[-6000:]}"
    return text


def own_process(test: Callable[..., Any]) -> Callable[..., None]:
    """Run this test in a process of its own."""

    @functools.wraps(test)
    def wrapper(**fixtures: Any) -> None:
        run_in_own_process(test, **fixtures)

    return wrapper


def _main(file: str, name: str) -> None:
    import torch

    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    args, kwargs = pickle.load(sys.stdin.buffer)
    torch.manual_seed(0)  # as conftest.py does
    inspect.unwrap(getattr(module, name))(*args, **kwargs)


if __name__ == "__main__":
    _main(*sys.argv[1:])
