"""Captures and calls of frozen models keep out of each other's way, whatever threads they are in.

`torch.export` works on the whole process: while it runs, `nn.Module.__call__` is patched and
`torch.compiler.is_compiling()` is true in every thread. So a capture waits until the calls that are running have ended,
and calls wait until the capture has; calls do not wait for one another. Networks that are not frozen are outside of
this, one that holds a frozen one too: nothing keeps them from running during a capture, and PyTorch has no answer then.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_changed = threading.Condition(_lock)
_running: set[int] = set()  # the threads inside a call
_captor: int | None = None  # the thread that captures, or is the next to


class Running:
    """`with Running():` around the run of a frozen network; about a microsecond.

    A call inside another one, or inside a capture, is part of it.
    """

    __slots__ = ("thread",)

    def __enter__(self) -> None:
        me = threading.get_ident()
        self.thread = 0
        if _captor == me or me in _running:
            return
        with _lock:
            while _captor is not None:
                _changed.wait()
            _running.add(me)
            self.thread = me

    def __exit__(self, *error: object) -> None:
        if self.thread:
            with _lock:
                _running.discard(self.thread)
                if _captor is not None:
                    _changed.notify_all()


@contextmanager
def capturing() -> Iterator[None]:
    """Around a capture: one at a time, while no frozen network runs but the one that it is made for."""
    global _captor
    me = threading.get_ident()
    if _captor == me:
        yield
        return
    with _lock:
        inside = me in _running  # a call that needs a capture lets others capture meanwhile
        _running.discard(me)
        try:
            _changed.notify_all()
            while _captor is not None:
                _changed.wait()
            _captor = me
            while _running:
                _changed.wait()
        except BaseException:  # Ctrl-C: nobody waits for this thread
            _leave(me, inside)
            raise
    try:
        yield
    finally:
        with _lock:
            _leave(me, inside)


def _leave(me: int, inside: bool) -> None:
    global _captor
    if _captor == me:
        _captor = None
    if inside:
        _running.add(me)
    _changed.notify_all()


def is_captured_elsewhere() -> bool:
    """Whether another thread captures: then torch's flags say nothing about this one."""
    captor = _captor
    return captor is not None and captor != threading.get_ident()


def _after_fork() -> None:
    """The child has this thread alone; another one may have held the lock."""
    global _lock, _changed, _captor
    me = threading.get_ident()
    _lock = threading.Lock()
    _changed = threading.Condition(_lock)
    _running.intersection_update({me})
    _captor = me if _captor == me else None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
