"""What the command line shows: styled text and a live bar on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[int, int, str], None]  # (done, total, text)


@contextmanager
def progress(console: Console, title: str, every_s: float = 5.0, remaining: bool = True) -> Iterator[Report]:
    """A progress bar with its text and a time; without a terminal, a line every `every_s` seconds.

    The time is what is left where the steps are alike, and with `remaining=False` what has passed.
    """
    if console.is_interactive and console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True) if remaining else TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=None, text="")
            yield lambda done, total, text: bar.update(task, completed=done, total=total, text=text)
        return

    start, last = 0.0, time.monotonic()
    first: int | None = None  # what was done when the work began: the time before it says nothing about what is left

    def report(done: int, total: int, text: str) -> None:
        nonlocal start, last, first
        now = time.monotonic()
        if first is None:
            start, first = now, done
        if done == total or now - last >= every_s:
            known = remaining and first < done < total
            left = f", {(now - start) / (done - first) * (total - done):.0f} s left" if known else ""
            console.print(f"{title} {done}/{total}, {text}{left}", highlight=False, markup=False)
            last = now

    yield report
