"""What the tests of the command line share: its commands, processes of it, the one line of a refusal."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

FASTRES = [sys.executable, "-m", "fastres"]


def one_line(capsys) -> str:
    """What went to stderr, which must be one line from fastres; stdout must be empty."""
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fastres: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def png_size(path) -> tuple[int, int]:
    """Width and height of a whole PNG file."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@contextmanager
def started(command: list[str], **options) -> Iterator[subprocess.Popen]:
    """A process of one thread with its output in pipes, which Ctrl-C reaches; killed in the end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it, its children too
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
