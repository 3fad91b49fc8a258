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
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_in_own_process(function: Callable[..., Any], *args: Any, timeout: float = 240, **kwargs: Any) -> str:
    """Call a function of a module's top level in a fresh process; return what it printed, raise what it raised."""
    function = inspect.unwrap(function)
    command = [sys.executable, __file__, inspect.getsourcefile(function), function.__qualname__]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    given = pickle.dumps((args, kwargs))
    done = subprocess.run(command, input=given, capture_output=True, timeout=timeout, env=env)
    out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    assert done.returncode == 0, f"{function.__qualname__} ended with {done.returncode}\n{out[-2000:]}\n{err[-6000:]}"
    return out


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
