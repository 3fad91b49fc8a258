"""The log of a run: log.csv, and TensorBoard's events where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import IO, Any

from fastres.lab.errors import OutputError
from fastres.lab.loop_state import Point


class Log:
    """log.csv and events.out.* in `folder`.

    Args:
        folder: of the run.
        history: the points so far, as the checkpoint has them: what a run logged after its last checkpoint is dropped.
        iteration: done so far.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, folder: Path, history: list[Point], iteration: int) -> None:
        path = folder / "log.csv"
        try:
            self._file: IO[str] = open(path, "w")  # noqa: SIM115 (closed by close)
            self._file.write(",".join(Point.COLUMNS) + "\n")
            self._file.writelines(map(_row, history))
            self._file.flush()
        except OSError as error:
            raise OutputError(f"output file {path}: cannot be written: {error.strerror or error}") from error
        self._events: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder), purge_step=iteration + 1)

    def add(self, point: Point, gradients: dict[str, float]) -> None:
        """Add a row; `gradients` are the norms of single layers, for TensorBoard."""
        self._file.write(_row(point))
        self._file.flush()
        if self._events is not None:
            for column in Point.COLUMNS[1:]:
                if (value := getattr(point, column)) is not None:
                    self._events.add_scalar(column, value, point.iteration)
            for name, norm in gradients.items():
                self._events.add_scalar(f"gradient_norm/{name}", norm, point.iteration)

    def flush(self) -> None:
        """Write TensorBoard's events to the disk, so that a checkpoint is never ahead of them."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _row(point: Point) -> str:
    values = (getattr(point, column) for column in Point.COLUMNS)
    return ",".join("" if value is None else repr(value) for value in values) + "\n"
