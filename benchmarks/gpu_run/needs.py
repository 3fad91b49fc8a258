"""The requirements of `make gpu`, checked before anything runs; all that is missing is reported at once, with remedies.

The GPU is detected through the driver's own library, in milliseconds and without torch.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

CUTLASS = "FASTRES_CUTLASS"
PYTHON = (3, 11)
CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Gpu:
    """The GPU to use: the first visible one."""

    name: str
    capability: str  # "9.0"
    memory_mib: int

    @property
    def arch_list(self) -> str:
        """TORCH_CUDA_ARCH_LIST for this GPU only; from 9.0 on the architecture-specific target."""
        return self.capability + ("a" if float(self.capability) >= 9.0 else "")

    def __str__(self) -> str:
        return f"{self.name} ({self.capability}, {self.memory_mib / 1024:.0f} GiB)"


@dataclass(frozen=True)
class Item:
    """Something that a run needs or can use: its version, or why it is absent and how to get it."""

    name: str
    version: str | None
    remedy: str = ""
    why: str = "is not installed"

    def __str__(self) -> str:
        return f"{self.name} {self.version}" if self.version else f"{self.name} {self.why}: {self.remedy}"


def find_gpu() -> Gpu | str:
    """The first visible GPU, or the reason why there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "NVIDIA's driver (libcuda.so.1) is not installed"
    count = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return f"NVIDIA's driver returns error {code}"
    if not count.value:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "none is visible" + (f": CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else "")
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    parts = []
    for attribute in CAPABILITY:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        parts.append(str(value.value))
    return Gpu(name.value.decode(), ".".join(parts), memory.value >> 20)


def module(name: str, distribution: str | None = None, remedy: str | None = None) -> Item:
    """Look up a Python module by its import name, without importing it."""
    distribution = distribution or name
    try:
        version = (_version(distribution) or "(no metadata)") if importlib.util.find_spec(name) else None
    except (ImportError, ValueError):
        version = None
    return Item(name, version, remedy or f"pip install {distribution}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def tool(name: str, remedy: str) -> Item:
    """Look up a program on the PATH and in the CUDA toolkit."""
    path = shutil.which(name) or shutil.which(name, path=f"{cuda_home()}/bin")
    return Item(name, path, remedy, "was not found")


def cuda_home() -> str:
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"


_TORCH = "import torch; print(torch.__version__, torch.version.cuda or '', torch.cuda.is_available(), sep='\\n')"


def _torch(gpu: bool) -> tuple[Item, str | None]:
    """torch, examined in another process, and the CUDA version it was built for; with `gpu` it must find a GPU."""

    def absent(why: str, remedy: str = "pip install torch (PyPI's Linux wheels include CUDA)") -> tuple[Item, None]:
        return Item("torch", None, remedy, why), None

    if module("torch").version is None:
        return absent("is not installed")
    try:
        done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return absent("cannot be imported (it took more than 180 s)")
    if done.returncode:
        return absent(f"cannot be imported ({(done.stderr.strip().splitlines() or ['no message'])[-1]})")
    version, cuda, usable = done.stdout.splitlines()[-3:]
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 11):
        return absent(f"is {version}, older than 2.11", "pip install 'torch>=2.11'")
    if not gpu:
        return Item("torch", version), None
    if not cuda:
        return absent(f"{version} is built without CUDA")
    if usable != "True":
        remedy = "a newer driver, or a torch for the driver's CUDA"
        return Item("torch", None, remedy, f"{version} for CUDA {cuda} cannot use this GPU"), cuda
    return Item("torch", f"{version} (CUDA {cuda})"), cuda


def _nvcc(cuda: str | None) -> Item:
    remedy = f"the CUDA toolkit {cuda or ''}".strip() + ", its bin folder on the PATH or CUDA_HOME set"
    found = tool("nvcc", remedy)
    if found.version is None:
        return found
    try:
        text = subprocess.run([found.version, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Item("nvcc", None, remedy, f"does not run ({error})")
    release = re.search(r"release ((\d+)\.\d+)", text)
    if release is None:
        return Item("nvcc", None, remedy, "does not say its release")
    if cuda is not None and release[2] != cuda.split(".")[0]:
        return Item("nvcc", None, remedy, f"is of CUDA {release[2]}, torch of {cuda}: torch refuses to build with it")
    return Item("nvcc", release[1])


def required(gpu: bool = True) -> list[Item]:
    """Everything that a run must have; without a GPU, what a dry run must have."""
    items = []
    if sys.version_info < PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        items.append(Item("python", None, "make gpu PYTHON=python3.12", f"is {version}, older than 3.11"))
    torch, cuda = _torch(gpu)
    items += [torch, module("triton"), module("safetensors"), module("pytest", remedy="pip install 'pytest>=8'")]
    items += [module("setuptools", remedy="pip install 'setuptools>=77,<82'"), module("pybind11"), module("ninja")]
    if items[-1].version is None and shutil.which("ninja"):
        items[-1] = Item("ninja", shutil.which("ninja"))
    if not gpu:  # nothing is compiled
        return items
    compiler, version = os.environ.get("CXX", "").split(" ")[0] or "c++", sysconfig.get_python_version()
    headers = Path(sysconfig.get_path("include"), "Python.h")
    python = str(headers) if headers.is_file() else None
    items += [_nvcc(cuda), tool(compiler, "apt-get install g++, or name a C++ compiler in CXX")]
    return [*items, Item("Python.h", python, f"apt-get install python{version}-dev", "was not found")]


def optional() -> list[Item]:
    """Everything that a run uses if it is available; the summary lists the parts left out without it."""
    toolkit = "part of the CUDA toolkit; add its bin folder to the PATH"
    return [
        module("torchvision"),
        module("timm"),
        module("transformers"),
        module("jax", remedy="pip install 'jax[cuda13]'"),
        module("onnxruntime", "onnxruntime-gpu" if _version("onnxruntime-gpu") else None),
        module("matplotlib"),
        module("xdist", "pytest-xdist"),
        tool("compute-sanitizer", toolkit),
        tool("nvidia-smi", "part of NVIDIA's driver"),
        cutlass(),
    ]


def cutlass() -> Item:
    """CUTLASS's headers, from the package nvidia-cutlass or from the wheel or folder named by FASTRES_CUTLASS."""
    remedy = f"pip install --no-deps nvidia-cutlass, or {CUTLASS}=its wheel or an unpacked folder"
    given = os.environ.get(CUTLASS)
    if given is None:
        return Item("CUTLASS", _version("nvidia-cutlass"), remedy)
    header = "include/cutlass/cutlass.h"
    path = Path(given)
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            if any(name.endswith(header) for name in wheel.namelist()):
                return Item("CUTLASS", str(path))
    elif any((path / prefix / header).is_file() for prefix in ("", "cutlass_library/source")):
        return Item("CUTLASS", str(path))
    return Item("CUTLASS", None, remedy, f"was not found in {CUTLASS}={given}")
