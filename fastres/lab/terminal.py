"""Shared pieces of the command line: options, and progress as a live bar on a terminal or as lines in a pipe."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from typer import Option

from fastres.lab.loop_state import Step

Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, Option(min=1, help="CPU threads; by default torch's choice.")]
Report = Callable[[int, int, str], None]  # (done, total, text)


@contextmanager
def progress(console: Console, title: str, every_s: float = 5.0, remaining: bool = True) -> Iterator[Report]:
    """A progress bar with text and a time; without a terminal, a line every `every_s` seconds.

    The time is the time left, or with `remaining=False`, for steps of unequal length, the time elapsed.
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
    first: int | None = None  # done when the work began: the time before it says nothing about the time left

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


def on_step(report: Report) -> Callable[[Step], None]:
    """An `on_step` for the training loop that reports epoch, loss and the images/s of the last fifty steps."""
    rate = recent_rate()

    def show(step: Step) -> None:
        text = f"epoch {step.epoch}/{step.epochs}  loss {step.loss:.3f}  {rate(step.images, step.seconds)}"
        report(step.step, step.steps, text.rstrip())

    return show


def recent_rate() -> Callable[[int, float], str]:
    """A function of (images so far, seconds) that gives the images/s of its last fifty calls, empty in the first."""
    last: deque[tuple[int, float]] = deque(maxlen=50)

    def rate(images: int, seconds: float) -> str:
        last.append((images, seconds))
        (images0, seconds0) = last[0]
        return f"{(images - images0) / (seconds - seconds0):.0f} images/s" if seconds > seconds0 else ""

    return rate


@contextmanager
def said(say: Callable[[str], None]) -> Iterator[None]:
    """Show what freeze logs about its progress as the current activity."""
    log, handler = logging.getLogger("fastres"), logging.Handler(logging.INFO)
    handler.emit = lambda record: say(record.getMessage().split(": ", 2)[-1])  # type: ignore[method-assign]
    level = log.level
    log.addHandler(handler)
    log.setLevel(min(log.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def activity() -> Iterator[Callable[[str], None]]:
    """Show the current activity on a terminal; nothing elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("", spinner="dots") as status:
        yield lambda text: status.update(Text(f"{text} ..."))
