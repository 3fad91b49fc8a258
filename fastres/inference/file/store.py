"""One file for a frozen network: safetensors for the weights, JSON in its metadata for all the rest. No pickle.

::

    metadata   format   "fastres.frozen"
               version  "2"            of the format; a file of another one is refused
               fastres, torch          the versions that wrote it
               model                   JSON: graph, signature, trees of inputs and outputs, dtype, layout, plan, report
               sha256                  of all of the above and of every tensor's name, dtype, shape and bytes
    tensors    the weights under the names of the frozen network, plain and contiguous, shared ones once

Nothing in a file is code, and none of its names is looked up but on lists of fastres' own: see operators.py and
trees.py. The checksum finds damage; it is no signature, and a file is safe to open without it.

Reading takes the memory of the weights once, plus the largest tensor; they are independent of the file then. Writing
takes a copy of those weights that are not contiguous or not on the CPU. A file is written beside its place under
another name, flushed to the disk and renamed, so that its place has the old file or the new one, whatever happens.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from fastres.inference.file.document import Stored, from_json, to_json
from fastres.inference.file.values import FrozenFileError, dump, parse, short

FORMAT = "fastres.frozen"
VERSION = 2
_KEYS = {"format", "version", "fastres", "torch", "model", "sha256"}
_SAFETENSORS = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


def write(path: str | os.PathLike[str], stored: Stored) -> None:
    """Writes the file, whole or not at all.

    Raises:
        FrozenFileError: the network holds something that no file can; the message says what. Nothing was written.
        OSError: the folder is missing, the path is a folder, the disk is full, ...
    """
    target = _target(path)
    try:
        document, tensors = to_json(stored)
        text = dump(document)
        meta = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
        from_json(parse(text), meta, torch.device("meta"))  # what is written can be read
    except FrozenFileError as error:
        raise FrozenFileError(f"path: {os.fspath(path)!r} is not written: {error}") from error
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "fastres": str(sys.modules["fastres"].__version__),
        "torch": str(torch.__version__),
        "model": text,
    }
    digest = _digest(metadata, [(name, t.dtype, tuple(t.shape)) for name, t in plain.items()])
    for name in sorted(plain):
        _update(digest, plain[name])
    _write(target, plain, {**metadata, "sha256": digest.hexdigest()})


def read(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Stored:
    """The network of a file.

    Args:
        path: the file.
        device: where it goes; None: where it was saved.

    Raises:
        FrozenFileError: no frozen network, or a damaged, tampered or newer file; or it needs a package or a device that
            is not there. The message names the file and says what was wrong.
        OSError: the file is missing or may not be read.
    """
    name = os.fspath(path)
    try:
        return _read(name, None if device is None else torch.device(device))
    except FrozenFileError as error:
        raise FrozenFileError(f"path: {name!r}: {error}") from error


def _read(name: str, device: torch.device | None) -> Stored:
    _refuse_foreign(name)
    try:
        with safe_open(name, framework="pt", backend="pread") as file:
            metadata = file.metadata() or {}
            _check(metadata)
            document = parse(metadata["model"])
            if not isinstance(document, dict):
                raise FrozenFileError("its JSON describes no network")
            tensors: dict[str, Tensor] = {}
            names = sorted(file.keys())
            table = []
            for key in names:
                kind, shape = file.get_slice(key).get_dtype(), tuple(file.get_slice(key).get_shape())
                if kind not in _SAFETENSORS:
                    raise FrozenFileError(f"its tensor {short(key)} is of {kind}, none of {', '.join(_SAFETENSORS)}")
                table.append((key, _SAFETENSORS[kind], shape))
            digest = _digest(metadata, table)
            for key, _, _ in table:
                raw = file.get_tensor(key)
                _update(digest, raw)
                tensors[key] = _own(raw)
    except (SafetensorError, OverflowError) as error:
        raise FrozenFileError(f"it is no safetensors file, or a damaged one: {error}") from error
    if digest.hexdigest() != metadata["sha256"]:
        raise FrozenFileError("it is damaged, or was changed after it was written: its checksum is another")
    return from_json(document, tensors, device)


def _refuse_foreign(name: str) -> None:
    mode = os.stat(name).st_mode
    if stat.S_ISDIR(mode):
        raise FrozenFileError("it is a folder, expected a file that FrozenModel.save wrote")
    if not stat.S_ISREG(mode):
        raise FrozenFileError("it is no regular file, expected one that FrozenModel.save wrote")
    with open(name, "rb") as file:
        head = file.read(9)
    if not head:
        raise FrozenFileError("it is empty")
    if head[:2] == b"PK" or (head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5")):
        raise FrozenFileError("it is a pickle or a file of torch.save, expected one that FrozenModel.save wrote")


def _check(metadata: Mapping[str, str]) -> None:
    """Format and version, which every version of the format has."""
    if metadata.get("format") != FORMAT:
        got = short(metadata.get("format"))
        raise FrozenFileError(f"it is a safetensors file, but no frozen network: its format is {got}, not {FORMAT!r}")
    version = metadata.get("version", "")
    if not (version.isascii() and version.isdigit() and len(version) < 6 and int(version) > 0):
        raise FrozenFileError(f"its version {short(version)} is none")
    if int(version) > VERSION:
        writer = short(metadata.get("fastres", "unknown"))
        raise FrozenFileError(
            f"it has version {version} of the format, written by fastres {writer}; this fastres reads {VERSION}: "
            "upgrade fastres"
        )
    if int(version) < VERSION:
        writer = short(metadata.get("fastres", "unknown"))
        raise FrozenFileError(
            f"it has version {version} of the format, written by fastres {writer}; this fastres reads {VERSION} alone: "
            "freeze the model again and save it"
        )
    if set(metadata) != _KEYS:
        raise FrozenFileError(f"its metadata are {short(sorted(metadata))}, expected {', '.join(sorted(_KEYS))}")


def _digest(metadata: Mapping[str, str], table: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Any:
    """SHA-256 of the metadata and the list of tensors; their bytes follow, in the order of their names."""
    text = sorted((key, value) for key, value in metadata.items() if key != "sha256")
    rows = sorted((name, str(dtype), list(shape)) for name, dtype, shape in table)
    return hashlib.sha256(dump([text, rows]).encode("ascii"))


def _update(digest: Any, t: Tensor) -> None:
    size = t.numel() * t.element_size()
    if size:  # without numpy, which torch does not need
        digest.update((ctypes.c_ubyte * size).from_address(t.data_ptr()))


def _own(raw: Tensor) -> Tensor:
    """The tensor in memory of torch's own, which is aligned as kernels like it."""
    if raw.dtype is torch.bool and bool((raw.view(torch.uint8) > 1).any()):
        raise FrozenFileError("a boolean tensor of it holds neither true nor false")
    return torch.empty(raw.shape, dtype=raw.dtype, device="cpu").copy_(raw)


def _target(path: str | os.PathLike[str]) -> str:
    """Where to write: links are followed, folders and devices refused."""
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"path: got {type(name).__name__}, expected a string or a path")
    target = os.path.realpath(name)
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        raise IsADirectoryError(f"path: {name!r} is a folder, expected the name of a file")
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(f"path: {name!r} is no regular file")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"path: {name!r}: there is no folder {folder!r}")
    return target


def _write(target: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Beside the target first, then in its place; nothing is left behind where that fails."""
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".fastres-{secrets.token_hex(8)}.tmp")
    specs = {
        name: TensorSpec(
            dtype=str(t.dtype).removeprefix("torch."),
            shape=list(t.shape),
            data_ptr=t.data_ptr(),
            data_len=t.numel() * t.element_size(),
        )
        for name, t in tensors.items()
    }
    try:
        mode = _create(temporary)
        if os.path.exists(target):
            mode = stat.S_IMODE(os.stat(target).st_mode)
        serialize_file(specs, temporary, metadata=metadata)
        os.chmod(temporary, mode)  # safetensors writes for the owner alone
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, SafetensorError):
            raise OSError(f"path: {target!r} cannot be written: {error}") from error
        raise
    with suppress(OSError):  # the name too; not every file system flushes folders
        _flush(folder, os.O_RDONLY)


def _create(path: str) -> int:
    """Makes an empty file; the permissions that files get here."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _flush(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
