"""The log of a run: log.csv, cut back to where a resumed run goes on; TensorBoard's events where it is installed."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
from pathlib import Path
from typing import IO, Any

from fastres.lab.errors import CheckpointError, OutputError
from fastres.lab.loop_state import Point

_HEADER = ",".join(Point.COLUMNS) + "\n"


class Log:
    """log.csv and events.out.* in `folder`.

    Args:
        folder: of the run.
        length: bytes of log.csv to keep, 0 to begin it; what stands behind was written after the checkpoint.
        iteration: done so far.
        writes: False for a process that only keeps the history.

    Raises:
        CheckpointError: log.csv is shorter than `length`, or damaged.
        OutputError: it cannot be written.
    """

    def __init__(self, folder: Path, length: int, iteration: int, writes: bool = True) -> None:
        self.path = folder / "log.csv"
        self.history = _rows(self.path, length)
        self._file: IO[bytes] | None = None
        self._events: Any = None
        if not writes:
            return
        try:
            self._file = open(self.path, "r+b" if length else "w+b")  # noqa: SIM115 (closed by close)
            self._file.truncate(length)
            self._file.seek(length)
            if not length:
                self._file.write(_HEADER.encode())
        except OSError as error:
            raise OutputError(f"output file {self.path}: cannot be written: {error.strerror or error}") from error
        self._events = _events(folder, iteration)

    def add(self, point: Point, gradients: dict[str, float]) -> None:
        """Adds a row; `gradients` are the norms of single layers, for TensorBoard."""
        self.history.append(point)
        if self._file is None:
            return
        values = [getattr(point, column) for column in Point.COLUMNS]
        self._file.write((",".join("" if value is None else repr(value) for value in values) + "\n").encode())
        self._file.flush()
        if self._events is not None:
            for column, value in zip(Point.COLUMNS[1:], values[1:], strict=True):
                if value is not None:
                    self._events.add_scalar(column, value, point.iteration)
            for name, norm in gradients.items():
                self._events.add_scalar(f"gradient_norm/{name}", norm, point.iteration)

    def saved(self) -> int:
        """The length of log.csv, all of it on the disk."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()
        return self._file.tell()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def _events(folder: Path, iteration: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=iteration + 1)


def _rows(path: Path, length: int) -> list[Point]:
    """The points in the first `length` bytes of a log."""
    if not length:
        return []
    try:
        text = path.read_bytes()[:length]
    except OSError as error:
        raise CheckpointError(f"log {path}: cannot be read: {error.strerror}, expected {length} bytes") from error
    if len(text) < length:
        raise CheckpointError(f"log {path}: got {len(text)} bytes, expected the {length} that the checkpoint counts")
    try:
        rows = list(csv.reader(io.StringIO(text.decode())))
        if rows[0] != list(Point.COLUMNS):
            raise ValueError(f"the header {rows[0]}")
        return [
            Point(int(row[0]), *(None if cell == "" else float(cell) for cell in row[1:]))  # type: ignore[arg-type]
            for row in rows[1:]
        ]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"log {path}: is damaged: got {error}") from error
