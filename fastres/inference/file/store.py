"""One file for a frozen network: safetensors for the weights, JSON in its metadata for all the rest. No pickle.

::

    metadata   format   "fastres.frozen"
               version  "3"            of the format; a file of another one is refused
               fastres, torch          the versions that wrote it
               model                   JSON: see document.py
               sha256                  of all of the above and of every tensor's name, dtype, shape and bytes
    tensors    the weights under the names of the frozen network, plain and contiguous

Nothing in a file is code, and none of its names is looked up but on lists of fastres' own: see operators.py and
trees.py. The checksum finds damage; it is no signature, and a file is safe to open without it.

Reading takes the memory of the weights once, plus the largest tensor; they are independent of the file then. Writing
takes a copy of those weights that are not contiguous or not on the CPU. A file is written whole or not at all
(fastres/_files.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastres._files import write_atomically
from fastres.inference.file.document import Stored, from_json, to_json
from fastres.inference.file.values import DTYPES, FrozenFileError, dump, parse, short

FORMAT = "fastres.frozen"
VERSION = 3
_KEYS = {"format", "version", "fastres", "torch", "model", "sha256"}
_SAFETENSORS = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}


@contextmanager
def naming(path: str | os.PathLike[str], what: str = "") -> Iterator[None]:
    """Around all that a file's content goes through.

    Raises:
        FrozenFileError: for whatever was raised within but a fault of the system's; it names the file.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # Python's and torch's own refusals of what passed the checks
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f"its JSON has no {error}"
        elif not isinstance(error, FrozenFileError):
            reason = f"its network cannot be built: {type(error).__name__}: {' '.join(reason.split())[:200]}"
        raise FrozenFileError(f"path: {os.fspath(path)!r}{what}: {reason}") from error


def write(path: str | os.PathLike[str], stored: Stored) -> None:
    """Write the file, whole or not at all.

    Raises:
        FrozenFileError: the network holds something that no file can; the message says what. Nothing was written.
        OSError: the folder is missing, the path is a folder, the disk is full, ...
    """
    with naming(path, " is not written"):
        text = dump(to_json(stored))
        empty = {name: torch.empty_like(t, device="meta") for name, t in stored.tensors.items()}
        from_json(parse(text), empty, torch.device("meta"))  # what is written can be read
    tensors = {name: t.detach().to("cpu").contiguous() for name, t in stored.tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "fastres": str(sys.modules["fastres"].__version__),
        "torch": str(torch.__version__),
        "model": text,
    }
    metadata["sha256"] = checksum(metadata, tensors)
    write_atomically(path, lambda file: write_tensors(file, tensors, metadata))


def read(path: str | os.PathLike[str], device: torch.device | None = None) -> Stored:
    """The network of a file; call it within `naming`.

    Args:
        path: the file.
        device: where it goes; None: where it was saved.

    Raises:
        FrozenFileError: no frozen network, or a damaged, tampered or newer file; or it needs a package or a device that
            is not there.
        OSError: the file is missing or may not be read.
    """
    _refuse_foreign(os.fspath(path))
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            metadata = file.metadata() or {}
            _check(metadata)
            tensors = {name: _own(name, file.get_tensor(name)) for name in sorted(file.keys())}
    except (SafetensorError, OverflowError) as error:
        raise FrozenFileError(f"it is no safetensors file, or a damaged one: {error}") from error
    if checksum(metadata, tensors) != metadata["sha256"]:
        raise FrozenFileError("it is damaged, or was changed after it was written: its checksum is another")
    return from_json(parse(metadata["model"]), tensors, device)


def _refuse_foreign(name: str) -> None:
    mode = os.stat(name).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise FrozenFileError(f"it is {kind}, expected a file that FrozenModel.save wrote")
    with open(name, "rb") as file:
        head = file.read(2)
    if not head:
        raise FrozenFileError("it is empty")
    if head == b"PK" or (head[0] == 0x80 and head[1:] in (b"\2", b"\3", b"\4", b"\5")):
        raise FrozenFileError("it is a pickle or a file of torch.save, expected one that FrozenModel.save wrote")


def _check(metadata: Mapping[str, str]) -> None:
    """Format and version, which every version of the format has."""
    if metadata.get("format") != FORMAT:
        got = short(metadata.get("format"))
        raise FrozenFileError(f"it is a safetensors file, but no frozen network: its format is {got}, not {FORMAT!r}")
    version, writer = metadata.get("version", ""), short(metadata.get("fastres", "unknown"))
    if version != str(VERSION):
        older = version in map(str, range(1, VERSION))
        advice = "freeze the model again and save it" if older else "upgrade fastres"
        raise FrozenFileError(
            f"it has version {short(version)} of the format, written by fastres {writer}; this fastres reads "
            f"{VERSION} alone: {advice}"
        )
    if set(metadata) != _KEYS:
        raise FrozenFileError(f"its metadata are {short(sorted(metadata))}, expected {', '.join(sorted(_KEYS))}")


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the metadata and of every tensor, by name."""
    digest = hashlib.sha256(dump(sorted(item for item in metadata.items() if item[0] != "sha256")).encode())
    for name, t in sorted(tensors.items()):
        digest.update(dump([name, str(t.dtype), list(t.shape)]).encode())
        digest.update(_bytes(t))
    return digest.hexdigest()


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write safetensors' format: the header's size, the header, the tensors, those of the largest elements first.

    Not by safetensors' own writer, which makes a temporary file of its own and leaves it when it is killed.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # each is aligned
    end = 0
    for name in names:
        t = tensors[name]
        begin, end = end, end + t.nbytes
        header[name] = {"dtype": _SAFETENSORS[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = dump(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(_bytes(tensors[name]))


def _bytes(t: Tensor) -> Any:
    """The memory of a contiguous tensor; without numpy, which torch does not need."""
    return (ctypes.c_ubyte * t.nbytes).from_address(t.data_ptr()) if t.nbytes else b""


def _own(name: str, raw: Tensor) -> Tensor:
    """The tensor in memory of torch's own, which is aligned as kernels like it."""
    if raw.dtype not in DTYPES.values():
        raise FrozenFileError(f"its tensor {short(name)} is of {raw.dtype}, none of {', '.join(DTYPES)}")
    if raw.dtype is torch.bool and bool((raw.view(torch.uint8) > 1).any()):
        raise FrozenFileError("a boolean tensor of it holds neither true nor false")
    return torch.empty(raw.shape, dtype=raw.dtype, device="cpu").copy_(raw)
