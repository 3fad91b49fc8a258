"""Sources: folders, globs, list files, parquet files and single images as one sequence of images."""

from __future__ import annotations

import bisect
import glob
import hashlib
import importlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastres._log import first_line
from fastres.pipelines.images import Item

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Table:
    """A column of images in a parquet file: bytes, or {"bytes", "path"} as Hugging Face's datasets writes them.

    Args:
        path: the file.
        column: its name; None: the only column of that kind, or the one called image.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: no parquet file, or no such column.
    """

    def __init__(self, path: str, column: str | None) -> None:
        self.path = path
        file = self._open()
        kinds = {field.name: str(field.type) for field in file.schema_arrow}
        known = [name for name, kind in kinds.items() if kind.startswith(("binary", "large_binary", "struct<bytes: "))]
        if column is None:
            column = known[0] if len(known) == 1 else "image"
        if column not in known:
            wanted = "a column of bytes or {bytes, path} named image, or its name in column"
            raise ValueError(f"source: {path}: got the columns {kinds}, expected {wanted}")
        self.column, self.rows = column, file.metadata.num_rows

    def items(self, start: int) -> Iterator[Item]:
        """The rows from `start` on, read as a stream."""
        with self._open() as file:
            groups, row = list(range(file.num_row_groups)), 0
            while groups and row + (size := file.metadata.row_group(groups[0]).num_rows) <= start:
                row += size
                del groups[0]
            batches = file.iter_batches(16, row_groups=groups, columns=[self.column], use_threads=False)
            while (batch := self._checked(lambda: next(batches, None))) is not None:
                skipped = max(0, start - row)
                for number, value in enumerate(batch.column(0)[skipped:].to_pylist(), row + skipped):
                    data = value["bytes"] or value.get("path") if isinstance(value, dict) else value
                    yield Item(self.path, number, data)
                row += len(batch)

    def _open(self) -> Any:
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise needs_pyarrow(f"source: {self.path}", error) from error
        return self._checked(lambda: parquet.ParquetFile(self.path, pre_buffer=False))

    def _checked(self, read: Any) -> Any:
        try:
            return read()
        except (OSError, ValueError) as error:  # pyarrow's own are of these kinds
            reason = getattr(error, "strerror", None) or first_line(error)
            raise ValueError(f"source: {self.path}: cannot be read: {reason}; expected a parquet file") from error


def needs_pyarrow(what: str, error: ImportError) -> ImportError:
    """The error of a parquet file where pyarrow is missing."""
    return ImportError(f'{what}: parquet needs pyarrow ({first_line(error)}): pip install "fastres[predict]"')


class Images:
    """The images of a source, in an order that depends on their names alone.

    Args:
        source: folders (searched through, hidden files and links to folders left out), globs, .txt files with a path a
            line, .parquet files, and images; one, or a sequence of them.
        column: of the images in parquet files.

    Raises:
        TypeError: not a path.
        FileNotFoundError, ValueError: a name with nothing behind it, a folder without images or that cannot be read.
            A path in a list is not looked at: what is missing there becomes a row with its error.
    """

    def __init__(self, source: Source, column: str | None = None) -> None:
        given = [source] if isinstance(source, str | os.PathLike) else source
        if not isinstance(given, Sequence) or not all(isinstance(one, str | os.PathLike) for one in given):
            raise TypeError(f"source: got {source!r:.80}, expected a path or a sequence of paths")
        self.entries = [entry for one in given for entry in _entries(os.fspath(one), column)]
        sizes = (entry.rows if isinstance(entry, Table) else 1 for entry in self.entries)
        self.ends = list(itertools.accumulate(sizes))  # of each entry: the number of images up to its last one
        self.count = self.ends[-1] if self.ends else 0
        if not self.count:
            raise ValueError(f"source: got no images in {', '.join(map(str, given)) or 'an empty list'}")

    def items(self, start: int = 0) -> Iterator[Item]:
        """The images from number `start` on."""
        first = bisect.bisect_right(self.ends, start)
        skipped = start - (self.ends[first - 1] if first else 0)
        for place in range(first, len(self.entries)):
            entry = self.entries[place]
            yield from [Item(entry)] if isinstance(entry, str) else entry.items(skipped)
            skipped = 0

    def digest(self) -> str:
        """A hash of the names and their order."""
        found = hashlib.sha256()
        for entry in self.entries:
            path, *table = (entry.path, entry.column, str(entry.rows)) if isinstance(entry, Table) else (entry,)
            found.update(b"\0".join([os.fsencode(os.path.abspath(path)), *map(str.encode, table), b"\n"]))
        return found.hexdigest()[:16]


def _entries(name: str, column: str | None) -> list[str | Table]:
    if os.path.isdir(name):
        return list(_files(name))
    if os.path.isfile(name):
        return [entry for entry in _listed(name, column)]
    if glob.has_magic(name) and (found := sorted(glob.glob(name, recursive=True))):
        return [entry for one in found for entry in (_files(one) if os.path.isdir(one) else _listed(one, column))]
    raise FileNotFoundError(
        f"source: found nothing at {name!r}, expected a folder, an image, a .txt or .parquet file, or a glob"
    )


def _listed(name: str, column: str | None) -> list[str | Table]:
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet":
        return [Table(name, column)]
    if suffix != ".txt":
        return [name]
    try:
        with open(name, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            return [path for line in file if (path := line.rstrip("\r\n"))]
    except OSError as error:
        raise ValueError(f"source: the list {name} cannot be read: {error.strerror}") from error


def _files(folder: str) -> Iterator[str]:
    """The images in a folder and those below it, by name."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"source: the folder {error.filename} cannot be read: {error.strerror}") from error

    empty = True
    for path, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(path, name)
                empty = False
    if empty:
        raise ValueError(f"source: the folder {folder} has no images ({' '.join(SUFFIXES)})")
