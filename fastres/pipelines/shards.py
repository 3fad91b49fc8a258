"""Shards: the finished rows of a run, every few seconds in a new file, and the one file made of them.

    OUT.parts/run.json                what the run is: images, weights, batch, ...; another run is refused
    OUT.parts/000000000-000001024     rows 0 to 1023 as JSON lines, written whole or not at all
    OUT.parts/model.fastres           the frozen network, so that a resumed run answers as the first one would have
    OUT.parts/lock                    locked while a process writes here

A run killed at any moment leaves whole batches behind, from the first on; the next run of the same command goes on
where they end. OUT appears whole, then the folder goes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from fastres._files import write_atomically
from fastres.pipelines.sources import needs_pyarrow

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]
Rows = Callable[[], Iterator[Row]]  # from the first on, at each call
SECONDS, ROWS = 5.0, 4096  # a shard is written after so long, or so many rows
_NAME = re.compile("([0-9]{9,})-([0-9]{9,})")


class Shards:
    """The rows of one run, and where they go.

    Args:
        out: the file to make: .jsonl, .csv or .parquet.
        run: what makes this run another one, by name: plain values.

    Raises:
        ValueError: another kind of file, one that exists, or rows of another run.
        ImportError: .parquet without pyarrow.
        OSError: the folder cannot be written, or another process writes to the same file.
    """

    def __init__(self, out: str | os.PathLike[str], run: dict[str, Any]) -> None:
        self.out, self.folder = Path(out), Path(f"{os.fspath(out)}.parts")
        if self.out.suffix.lower() not in _WRITERS:
            raise ValueError(f"out: got {str(out)!r}, expected a name that ends in {', '.join(_WRITERS)}")
        if self.out.suffix.lower() == ".parquet":
            _parquet_modules()
        about = self.folder / "run.json"
        if (self.folder / "done").exists():
            self._clear()
        if self.out.exists() and not about.exists():
            raise ValueError(f"out: {self.out} exists, expected a new file: delete it or choose another name")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")  # noqa: SIM115
        except OSError as error:
            raise OSError(f"out: {self.folder} cannot be written: {error.strerror}") from error
        self._rows: list[Row] = []
        try:
            self._take(about, run)
        except BaseException:
            self._lock.close()
            raise
        self.model = self.folder / "model.fastres"
        self._files = self._finished()
        self.done = self._stop = self._files[-1][1] if self._files else 0  # rows; and those with what is held here
        self._last = time.monotonic()

    def _take(self, about: Path, run: dict[str, Any]) -> None:
        try:
            if fcntl is not None:  # not flock: a killed run's workers would hold it for seconds
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise BlockingIOError(f"out: another process writes {self.out}") from error
        if not about.exists():
            write_atomically(about, lambda file: file.write(json.dumps(run, indent=1).encode()))
            return
        before = json.loads(about.read_text())
        changed = [f"{key} ({before.get(key)}, now {run[key]})" for key in run if before.get(key) != run[key]]
        if changed:
            how = f"delete {self.folder} to start again, or choose another name"
            raise ValueError(f"out: {self.folder} holds rows of another run: {', '.join(changed)}; {how}")

    def _finished(self) -> list[tuple[int, int, Path]]:
        """(first row, last + 1, file) of the shards, one after the other from row 0 on."""
        named = [(_NAME.fullmatch(path.name), path) for path in sorted(self.folder.iterdir())]
        found = [(int(match[1]), int(match[2]), path) for match, path in named if match]
        for (_, stop, _), (start, _, path) in itertools.pairwise([(0, 0, self.folder), *found]):
            if start != stop:
                raise ValueError(f"out: {path}: rows {stop} to {start - 1} before it are missing; delete {self.folder}")
        return found

    def add(self, rows: list[Row]) -> None:
        """Take the rows of a batch; every few seconds they are on the disk."""
        self._rows += rows
        if len(self._rows) >= ROWS or time.monotonic() - self._last >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a shard."""
        if self._rows:
            start, stop = self._stop, self._stop + len(self._rows)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows).encode()
            path = self.folder / f"{start:09}-{stop:09}"
            write_atomically(path, lambda file: file.write(text))
            self._files.append((start, stop, path))
            self._rows, self._stop = [], stop
        self._last = time.monotonic()

    def rows(self) -> Iterator[Row]:
        """The rows of the shards, in order."""
        for start, stop, path in list(self._files):
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # not splitlines: a name may hold other line ends
            if len(lines) != stop - start:
                raise ValueError(f"out: {path}: got {len(lines)} rows, expected {stop - start}; delete {self.folder}")
            yield from map(json.loads, lines)

    def finish(self) -> None:
        """Make the file of all rows, and remove the shards."""
        self.flush()
        writer = _WRITERS[self.out.suffix.lower()]
        write_atomically(self.out, lambda file: writer(self.rows, file))
        os.replace(self.folder / "run.json", self.folder / "done")
        self._clear()

    def _clear(self) -> None:
        """Remove the folder of a finished run, the sign that it is one last."""
        ours = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        for path in (*ours, *(self.folder / name for name in ("model.fastres", "lock", "done"))):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it
            self.folder.rmdir()

    def close(self) -> None:
        """Write what is held, and let go of the file."""
        try:
            self.flush()
        except RuntimeError:  # the signal that a worker died interrupts this process anywhere, here too
            self.flush()
            raise
        finally:
            self._lock.close()


# ---- files ----------------------------------------------------------------------------------------------------------


def _jsonl(rows: Rows, file: IO[bytes]) -> None:
    for row in rows():
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _csv(rows: Rows, file: IO[bytes]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    most = max((len(row["classes"]) for row in rows()), default=0)
    names = [f"{name}_{place}" for place in range(1, most + 1) for name in ("class", "label", "score")]
    writer.writerow(["path", "row", "error", *names])
    for row in rows():
        answers = zip(row["classes"], row["labels"] or itertools.repeat(None), row["scores"], strict=False)
        writer.writerow([row["path"], row["row"], row["error"], *itertools.chain.from_iterable(answers)])
    text.flush()
    text.detach()


def _parquet(rows: Rows, file: IO[bytes]) -> None:
    arrow, parquet = _parquet_modules()
    kinds = {"path": arrow.string(), "row": arrow.int64(), "error": arrow.string()}
    kinds |= {"classes": arrow.list_(arrow.int32()), "labels": arrow.list_(arrow.string())}
    schema = arrow.schema({**kinds, "scores": arrow.list_(arrow.float32())})
    left = rows()
    with parquet.ParquetWriter(file, schema) as writer:
        while some := list(itertools.islice(left, ROWS)):
            writer.write_table(arrow.Table.from_pylist(some, schema))


def _parquet_modules() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise needs_pyarrow("out", error) from error
    return pyarrow, pyarrow.parquet


_WRITERS: dict[str, Callable[[Rows, IO[bytes]], None]]
_WRITERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
