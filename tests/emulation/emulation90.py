"""The convolutions for sm_90a on a machine without a GPU: csrc/cuda/conv_sm90.cuh and the CUTLASS below it, translated
by cuda_to_cpp.py, compiled by the C++ compiler and run by native/emulator90. All blocks of a launch run at
once, their threads are fibers, and what runs next is drawn from a seed.
"""

import ctypes
import fcntl
import hashlib
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import cuda_to_cpp
from conv_emulation import problem
from emulation import ROOT, compiler, cutlass_headers, need_gcc, pointer, toolkit_headers

SHIPPED = [ROOT / "csrc/element.h", *(ROOT / "csrc/cuda" / name for name in ("conv_act.h", "runtime.h", "launch.h"))]
SHIPPED += sorted(ROOT.glob("csrc/cuda/conv_*.cu*"))
OWN = [ROOT / "tests/emulation/native/emulated90.cpp", *sorted((ROOT / "tests/emulation/native/emulator90").glob("*"))]
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-w", "-fpermissive", "-U_FORTIFY_SOURCE", "-Wl,-Bsymbolic"]
FLAGS += ["-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL", "-include", f"{ROOT}/tests/emulation/native/emulator90/prelude.h"]
TYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}
GUARD = 4096  # elements around y that must stay as they are


def build(command, headers, toolkit, everything, to):
    """Compile the library: 35 s of a core and 2.4 GB; three minutes and 4 GB for everything."""
    with tempfile.TemporaryDirectory() as folder:
        cuda_to_cpp.translate_headers(headers, folder)
        translated = Path(folder) / "cuda/conv_sm90.cuh"
        translated.parent.mkdir()
        translated.write_text(cuda_to_cpp.translate((ROOT / "csrc/cuda/conv_sm90.cuh").read_text()))
        includes = [f"-I{path}" for path in (folder, ROOT / "csrc")]
        for path in (headers.parent / "tools/util/include", *toolkit):
            includes += ["-isystem", str(path)]
        defines = ["-DEMULATED_ALL", "-DFASTRES_CONV_SM90"] if everything else []
        sources = [str(path) for path in OWN if path.suffix == ".cpp"]
        line = [*command, *FLAGS, *defines, *includes, *sources, "-o", str(to)]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]


@cache
def library(everything=False):
    """The compiled library; kept under build/ for as long as its sources stay."""
    need_gcc()
    command, headers, toolkit = compiler(), cutlass_headers(), toolkit_headers()
    sources = [*SHIPPED, *OWN, Path(cuda_to_cpp.__file__), headers / "cutlass/version.h"]
    about = command, FLAGS, str(toolkit[0]), everything
    text = b"".join(path.read_bytes() for path in sources) + repr(about).encode()
    built = ROOT / "build" / f"emulated90-{hashlib.sha256(text).hexdigest()[:16]}.so"
    built.parent.mkdir(exist_ok=True)
    with open(ROOT / "build/emulated90.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be building the same
        if not built.exists():
            partial = built.with_suffix(".partial")
            build(command, headers, toolkit, everything, partial)
            partial.replace(built)
    loaded = ctypes.CDLL(str(built))
    loaded.conv_act.restype = loaded.tile_label.restype = ctypes.c_char_p
    loaded.counted.restype = ctypes.c_int64
    return loaded


@dataclass(frozen=True)
class Tile:
    """A kernel of the library."""

    number: int
    everything: bool
    label: str
    rows: int
    columns: int
    cluster: int
    splits_depth: bool

    @property
    def dtype(self):
        return TYPES[self.label.split("<")[1].split(",")[0]]

    def counted(self, what):
        """How often something ran in the last call."""
        return library(self.everything).counted(what.encode())

    def run(self, x, weight, bias, residual, act="none", stride=1, padding=0, dilation=1, multiprocessors=2, seed=0):
        """y, all of it written and nothing beside it; raises what the kernel or the emulated GPU says."""
        sizes = problem(x.shape, weight.shape, stride, padding, dilation)
        n, _, _, _, k, _, _, p, q, *_ = sizes
        images = (t if t is None else t.contiguous(memory_format=torch.channels_last) for t in (x, weight, residual))
        x, weight, residual = images
        memory = torch.full((2 * GUARD + n * p * q * k,), float("nan"), dtype=self.dtype)
        y = memory[GUARD:-GUARD].view(n, p, q, k).permute(0, 3, 1, 2)
        before = memory.view(torch.uint8).clone()
        tensors = map(pointer, (x, weight, bias, residual, y))
        how = act.encode(), ctypes.c_int(multiprocessors), ctypes.c_uint64(seed)
        message = library(self.everything).conv_act(self.number, sizes, *tensors, *how)
        if message is not None:
            raise RuntimeError(message.decode())
        after, edge = memory.view(torch.uint8), GUARD * memory.element_size()
        assert torch.equal(before[:edge], after[:edge]) and torch.equal(before[-edge:], after[-edge:])
        return y

    def planned(self, sizes, residual, multiprocessors):
        """A launch that is not run, of ConvShape's 15 numbers and made-up addresses: what is refused, or nothing."""
        loaded, given = library(self.everything), (1, 2, 3, 4 if residual else 0, 5)
        tensors = [ctypes.c_void_p(place << 44) for place in given]
        how = b"relu", ctypes.c_int(multiprocessors), ctypes.c_uint64(0)
        loaded.set_planning(1)
        try:
            return (loaded.conv_act(self.number, (ctypes.c_int64 * 15)(*sizes), *tensors, *how) or b"").decode()
        finally:
            loaded.set_planning(0)


def tiles(everything=False):
    """Every kernel of the library, by its label."""
    loaded, found = library(everything), {}
    for number in range(loaded.tiles()):
        numbers = (ctypes.c_int * 4)()
        loaded.tile_numbers(number, numbers)
        label = loaded.tile_label(number).decode()
        rows, columns, cluster, splits_depth = numbers
        found[label] = Tile(number, everything, label, rows, columns, cluster, bool(splits_depth))
    return found
