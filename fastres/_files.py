"""The atomic writer: a file is the old one or the whole new one, whatever happens while it is written.

A new file is written next to its place as `.fastres-<random>.tmp`, flushed to the disk and renamed. Its writer holds a
lock on it, which the system lets go of when the writer dies: the next write into that folder removes what no writer
holds. On file systems without locks, and on Windows, nothing is removed.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import stat
from collections.abc import Callable
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` on a temporary file and put it in the place of `path`; a link is followed, permissions are kept.

    Raises:
        OSError: there is no such folder, it is full, the path is a folder or a device; or what `write` raises. The old
            file is as it was then, and the temporary one is gone.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        raise IsADirectoryError(f"path: {os.fspath(path)!r} is a folder, expected the name of a file")
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(f"path: {os.fspath(path)!r} is no regular file")
    _remove_torn(folder)
    file = _temporary(folder)
    try:
        if os.path.exists(target):
            os.chmod(file.name, stat.S_IMODE(os.stat(target).st_mode))
        write(file)
        file.flush()
        os.fsync(file.fileno())
        if fcntl is None:  # Windows renames no open file
            file.close()
        os.replace(file.name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)
        raise
    finally:
        with contextlib.suppress(OSError):  # what is left in its buffer after a failure
            file.close()
    with contextlib.suppress(OSError):  # the name too; not every file system flushes folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary(folder: str) -> IO[bytes]:
    """A new file in `folder`, locked. One that was removed between its making and its locking is made again."""
    while True:
        file = open(os.path.join(folder, f".fastres-{secrets.token_hex(8)}.tmp"), "xb")
        _lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _remove_torn(folder: str) -> None:
    """Remove the temporary files that no writer holds."""
    for name in glob.glob(os.path.join(glob.escape(folder), ".fastres-*.tmp")):
        with contextlib.suppress(OSError), open(name, "r+b") as file:  # gone by now, or another user's
            if _lock(file, wait=False):
                os.unlink(name)


def _lock(file: IO[Any], wait: bool = True) -> bool:
    """Lock a file as its only writer; False where another one has it, or there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
