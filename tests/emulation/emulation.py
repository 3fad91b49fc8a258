"""The CUDA kernels on a machine without a GPU: the shipped sources, compiled by the C++ compiler against the headers of
native/emulator, where the threads of a block are fibers. `kernels()` has the operators that the C++ modules
register, on CPU tensors; `library()` is everything that tests/emulation/native/emulated.cpp offers.
"""

import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("csrc/**/*.*"), *ROOT.glob("tests/emulation/native/**/*.*")])
KERNELS = [ROOT / "csrc/cuda" / name for name in ("add_relu_flat.cu", "bn_act_forward.cu", "bn_act_backward.cu")]
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-w", f"-I{ROOT}/csrc"]
LAUNCHER = "cutlass/conv/device/implicit_gemm_convolution.h"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EDGE = 32
MULTIPROCESSORS = 3  # few: each block has several row tiles, and there are several blocks to a tile


def compiler():
    command = shlex.split(os.environ.get("CXX", "c++"))
    return command if shutil.which(command[0]) else None


def toolkit_headers():
    """The folders of the CUDA toolkit's headers and of its C++ standard library, or None."""
    nvcc = shutil.which("nvcc")
    found = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    for root in filter(None, [*found, "/usr/local/cuda"]):
        folder = Path(root, "include")
        standard = [place for place in (folder, folder / "cccl") if (place / "cuda/std/utility").exists()]
        if standard and (folder / "cuda_runtime_api.h").exists():
            return folder, standard[0]
    return None


def cutlass_headers():
    """CUTLASS's folder, where setup.py looks for it (a wheel is unpacked there), or None."""
    given, spec = os.environ.get("FASTRES_CUTLASS"), importlib.util.find_spec("cutlass_library")
    if given:
        roots = Path(given), ROOT / "build" / Path(given).stem
    else:
        roots = [Path(spec.origin).parents[1]] if spec and spec.origin else []
    found = [source / "include" for root in roots for source in (root, root / "cutlass_library/source")]
    return next((folder for folder in found if (folder / LAUNCHER).exists()), None)


def need_gcc():
    """Skip where there is no g++ or no CUTLASS: its host code is tried with no other compiler."""
    command = compiler()
    if toolkit_headers() is None or cutlass_headers() is None or not (ROOT / "csrc").exists():
        pytest.skip("no headers of the CUDA toolkit or of CUTLASS, or no sources")
    if command is None or "clang" in subprocess.run([*command, "--version"], capture_output=True, text=True).stdout:
        pytest.skip("no g++: CUTLASS's kernels compile for a CPU with no other compiler")


def compiled(name, sources, flags, about=""):
    """The library of these C++ sources; kept under build/ for as long as all sources, the flags and `about` stay."""
    command = compiler()
    if command is None or not (ROOT / "csrc").exists():
        pytest.skip("no C++ compiler or no sources")
    text = b"".join(path.read_bytes() for path in SOURCES) + repr((command, FLAGS, flags, about)).encode()
    built = ROOT / "build" / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        partial = built.with_suffix(f".{os.getpid()}")  # another worker may be building the same
        arguments = [*FLAGS, *flags, "-x", "c++", *map(str, sources), "-o", str(partial)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        partial.replace(built)
    return ctypes.CDLL(str(built))


@cache
def library():
    """tests/emulation/native/emulated.cpp, compiled."""
    loaded = compiled(
        "emulated",
        [ROOT / "tests/emulation/native/emulated.cpp", *KERNELS],
        [f"-I{ROOT}/tests/emulation/native/emulator"],
    )
    for name in ("add_relu", "add_relu_backward", "bn_act", "bn_act_backward"):
        getattr(loaded, name).restype = ctypes.c_char_p
    for name in ("element", "channel"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.fast_divide.restype = ctypes.c_uint32
    return loaded


def on_gpu(dtype=torch.float16):
    """What refusals read of a tensor on a GPU, where there is none."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)


def pointer(t):
    """A tensor's memory, or None; a numpy-like view is not made: bf16 has none."""
    return None if t is None else ctypes.c_void_p(t.data_ptr())


def dense(shape, dtype, channels_last=False, offset=0, device="cpu"):
    """A dense tensor of this order in the middle of a buffer of NaN, `offset` elements off an aligned address."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + 2 * EDGE + offset,), float("nan"), dtype=dtype, device=device)
    flat = whole[EDGE + offset :][:count]
    if not channels_last:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def edges_untouched(t):
    whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    before, after = t.storage_offset(), t.storage_offset() + t.numel()
    return bool(whole[:before].isnan().all() and whole[after:].isnan().all())


class Emulated:
    """The operators of fastres._C_cuda, by their names in torch.ops.fastres; outputs lie in the middle of NaN."""

    def __init__(self, multiprocessors):
        self.multiprocessors = multiprocessors

    def _run(self, name, *arguments):
        message = getattr(library(), name)(*arguments, ctypes.c_int(self.multiprocessors))
        if message is not None:
            raise RuntimeError(message.decode())

    def _image(self, x, channels_last):
        n, c, h, w = x.shape
        sizes = [ctypes.c_int64(v) for v in (n, c, h * w)]
        return [ctypes.c_int(TYPES[x.dtype]), *sizes, ctypes.c_int(channels_last)]

    def _add_relu(self, name, a, b):
        out = dense(a.shape, a.dtype, offset=a.storage_offset() % EDGE)
        self._run(name, ctypes.c_int(TYPES[a.dtype]), *map(pointer, (a, b, out)), ctypes.c_int64(a.numel()))
        assert edges_untouched(out)
        return out

    def _add_relu_native(self, x, residual):
        return self._add_relu("add_relu", x, residual)

    def _add_relu_backward_native(self, dy, y):
        return self._add_relu("add_relu_backward", dy, y)

    def _bn_act_native(
        self, x, weight, bias, residual, running_mean, running_var, count, training, momentum, eps, relu, overwrite
    ):
        channels_last = not x.is_contiguous()
        y = x if overwrite else dense(x.shape, x.dtype, channels_last, x.storage_offset() % EDGE)
        mean, var = (None, None) if overwrite else torch.full((2, x.shape[1]), float("nan"))
        tensors = map(pointer, (x, residual, y, weight, bias, mean, var, running_mean, running_var, count))
        numbers = ctypes.c_float(momentum), ctypes.c_float(eps), ctypes.c_int(relu), ctypes.c_int(training)
        self._run("bn_act", *self._image(x, channels_last), *tensors, *numbers)
        assert edges_untouched(y)
        return y, mean, var

    def _bn_act_backward_native(self, dy, x, y, weight, bias, mean, var, training, eps, relu, needs, reuse_dy):
        channels_last = not x.is_contiguous()

        def new(bit):
            if not needs >> bit & 1:
                return None
            image = bit in (0, 3)
            return (
                dense(x.shape, x.dtype, channels_last, x.storage_offset() % EDGE) if image else torch.empty_like(mean)
            )

        grads = dx, dweight, dbias, dresidual = [new(bit) for bit in range(4)]
        tensors = map(pointer, (dy, x, y if relu else None, weight, mean, var, dx, dweight, dbias, dresidual))
        numbers = ctypes.c_float(eps), ctypes.c_int(training)
        self._run("bn_act_backward", *self._image(dy, channels_last), *tensors, *numbers)
        assert all(edges_untouched(t) for t in (dx, dresidual) if t is not None)
        return grads


@cache
def kernels(multiprocessors=MULTIPROCESSORS):
    library()
    return Emulated(multiprocessors)
