"""conv_act's kernels for sm_80 on a machine without a GPU: csrc/cuda/conv_sm80*.cu and CUTLASS, as they are shipped, by
the C++ compiler. What CUTLASS writes as PTX is C++ in native/emulator80; the types are the CUDA toolkit's own.
"""

import ctypes
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

import emulation
from emulation import LAUNCHER, ROOT, cutlass_headers, pointer, toolkit_headers
from fastres.ops._conv_backends import output_size

SOURCES = [
    ROOT / "tests/emulation/native/emulated80.cpp",
    *(ROOT / "csrc/cuda" / name for name in ("conv_tiles.cu", "conv_sm80_64x64.cu", "conv_sm80_128x128.cu")),
]
DTYPES = {code: dtype for dtype, code in emulation.TYPES.items()}


def without_launch(cutlass):
    """A folder with CUTLASS's own launcher, less the launch: a C++ compiler knows no <<< >>>. Nothing here calls it."""
    text, launches = re.subn(r"[\w:<>]+<<<.*?>>>\(.*?\);", ";", (cutlass / LAUNCHER).read_text())
    assert launches == 1
    folder = ROOT / "build/emulated80"
    path = folder / LAUNCHER
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")  # another worker may be writing the same
        partial.write_text(text)
        partial.replace(path)
    return folder


@cache
def library():
    """tests/emulation/native/emulated80.cpp, compiled."""
    emulation.need_gcc()
    toolkit, cutlass = toolkit_headers(), cutlass_headers()
    folders = ROOT / "tests/emulation/native/emulator80", without_launch(cutlass), *toolkit, cutlass
    # Permissive: a few of CUTLASS's type names change their meaning in a class. Then, all symbols the library's own:
    # torch brings CUDA's runtime, and tests/emulation/native/emulated.cpp threads of the same names.
    flags = ["-fpermissive", "-DFASTRES_CONV_SM80", "-fno-gnu-unique", "-Wl,-Bsymbolic", *(f"-I{f}" for f in folders)]
    version = re.search(r"CUDART_VERSION +(\d+)", (toolkit[0] / "cuda_runtime_api.h").read_text())[1]
    about = version, (cutlass / "cutlass/version.h").read_text()
    loaded = emulation.compiled("emulated80", SOURCES, flags, about)
    for name in ("conv_tile", "conv_refusal", "conv_act"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


@dataclass(frozen=True)
class Tile:
    index: int
    name: str
    dtype: torch.dtype
    pixels: int
    channels: int
    depth: int
    threads: int
    shared_bytes: int


@cache
def tiles():
    """The kernels by name and element type."""
    found = {}
    for index in range(library().conv_tile_count()):
        values = (ctypes.c_int64 * 6)()
        name = library().conv_tile(index, values).decode()
        found[name, DTYPES[values[0]]] = Tile(index, name, DTYPES[values[0]], *values[1:])
    return found


def problem(x, weight, stride, padding, dilation):
    """ConvShape, of the shapes of x and weight."""
    n, c, h, w = x
    k, _, r, s = weight
    stride, padding, dilation = ((v, v) if isinstance(v, int) else v for v in (stride, padding, dilation))
    out = output_size((h, w), (r, s), stride, padding, dilation)
    return (ctypes.c_int64 * 15)(n, h, w, c, k, r, s, *out, *stride, *padding, *dilation)


def refusal(tile, x, weight, stride=1, padding=0, dilation=1):
    """Why a kernel does not take these shapes; empty: it does."""
    return library().conv_refusal(tile.index, problem(x, weight, stride, padding, dilation)).decode()


def conv_act(tile, x, weight, bias, residual, y, stride=1, padding=0, dilation=1, act="relu"):
    """What torch.ops.fastres._conv_act_native does once it has checked its arguments; all tensors channels_last."""
    tensors = map(pointer, (x, weight, bias, residual, y))
    shape = problem(x.shape, weight.shape, stride, padding, dilation)
    message = library().conv_act(tile.index, shape, *tensors, act.encode())
    if message is not None:
        raise RuntimeError(message.decode())


@contextmanager
def order(backwards=False, at_once=False, last_blocks=0):
    """Threads take turns downwards; cp.async copies early, not late; only the last blocks of a grid are run."""
    library().set_order(backwards, at_once)
    library().set_last_blocks(ctypes.c_uint64(last_blocks))
    try:
        yield
    finally:
        library().set_order(False, False)
        library().set_last_blocks(ctypes.c_uint64(0))


def bounded(z, lower, upper):
    y = torch.empty_like(z)
    numbers = ctypes.c_float(lower), ctypes.c_float(upper), pointer(y), ctypes.c_int64(z.numel())
    library().bounded(pointer(z), *numbers)
    return y
