"""The compiled extension modules, each loaded once: `fastres._C` (CPU) and `fastres._C_cuda` where a build has it.

Importing one registers its kernels with torch; the modules themselves hold no operator, only `build_info()` and
`kernel_attributes()`. Both are optional: when one is not there, or was built for other operator schemas than these
sources declare, `why_not_cpu` and `why_not_cuda` say so in a sentence and nothing raises. Loading is lazy,
thread-safe, prints nothing and creates no CUDA context.

Environment: `FASTRES_DISABLE` (comma-separated), read until a module is loaded: "ext" leaves out both, "cpu" and
"cuda" one each, "all" both.
"""

from __future__ import annotations

import logging
import os
import threading
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # loads the shared libraries that the extension modules link to

# Raised by one whenever a schema of an `_<op>_native` operator changes; csrc/module.cpp carries the same number.
SCHEMA_VERSION = 9

REBUILD = "pip install --no-build-isolation ."


def isa_problem() -> str | None:
    """Say what is wrong with FASTRES_ISA; None when nothing is."""
    isa = os.environ.get("FASTRES_ISA", "")
    if isa in ("", "amx", "avx512", "avx2", "baseline"):
        return None
    return f"FASTRES_ISA: got {isa!r}, expected 'amx', 'avx512', 'avx2' or 'baseline'"


class _Native:
    """One extension module: loaded on first use, or the reason why it is not."""

    def __init__(self, name: str, backend: str) -> None:
        self.name = name
        self.backend = backend
        self._lock = threading.Lock()
        self._settled = False
        self._module: ModuleType | None = None
        self._reason: str | None = None

    def module(self) -> ModuleType | None:
        """The loaded module, or None (then `why_not` tells why)."""
        if not self._settled and self._disabled() is None:
            self._load()
        return self._module

    def why_not(self) -> str | None:
        """Say why the module is not loaded; None when it is."""
        if not self._settled:
            disabled = self._disabled()
            if disabled is not None:  # not remembered: the setting may change before the first load
                return disabled
            self._load()
        return self._reason

    def build_info(self) -> dict[str, object]:
        """Describe how the module was built; empty when it is not loaded."""
        module = self.module()
        return {} if module is None else dict(module.build_info())

    def _disabled(self) -> str | None:
        names = {part.strip() for part in os.environ.get("FASTRES_DISABLE", "").split(",")}
        return f"{self.name} is disabled by FASTRES_DISABLE" if names & {"ext", "all", self.backend} else None

    def _load(self) -> None:
        with self._lock:
            if self._settled:
                return
            self._module, self._reason = self._import()
            self._settled = True

    def _import(self) -> tuple[ModuleType | None, str | None]:
        problem = isa_problem()
        if problem is not None:
            logging.getLogger("fastres").warning("%s: no compiled kernel is used", problem)
            return None, problem
        if self.backend == "cuda" and torch.version.cuda is None:
            return None, f"{self.name} needs a CUDA build of torch; this one has none"
        try:
            module = import_module(self.name)
        except ModuleNotFoundError as error:
            if error.name != self.name:
                return None, f"{self.name} could not be loaded: {error}"
            return None, self._not_built()
        except (ImportError, OSError) as error:  # an undefined symbol, a missing shared library
            return None, f"{self.name} could not be loaded ({error}); build it again: {REBUILD}"
        found = module.build_info().get("schema_version")
        if found != SCHEMA_VERSION:
            return None, (
                f"{self.name} is stale: built for operator schemas {found}, these sources declare {SCHEMA_VERSION}; "
                f"build it again: {REBUILD}"
            )
        built = module.build_info().get("cuda")
        if built and torch.version.cuda and built.split(".")[0] != torch.version.cuda.split(".")[0]:
            return None, (
                f"{self.name} was built for CUDA {built}, this torch for CUDA {torch.version.cuda}: install a fastres "
                f"and a torch of one major release of CUDA, or build it here: {REBUILD}; until then Triton runs on GPUs"
            )
        return module, None

    def _not_built(self) -> str:
        stem = self.name.rpartition(".")[2]
        others = sorted(path.name for path in Path(__file__).parent.glob(f"{stem}.*.so"))
        if others:
            return (
                f"{self.name} was built for another Python ({', '.join(others)}, this one loads "
                f"{stem}{EXTENSION_SUFFIXES[0]}); build it again: {REBUILD}"
            )
        if self.backend == "cuda":
            return f"{self.name} is not part of this build: where nvcc is installed, {REBUILD}"
        return f"{self.name} is not built: install a C++ compiler and Python's headers, then {REBUILD}"


_CPU = _Native("fastres._C", "cpu")
_CUDA = _Native("fastres._C_cuda", "cuda")


def _free_in_child() -> None:
    """A forked child has the forking thread alone; another one may have been loading."""
    for native in (_CPU, _CUDA):
        native._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_in_child)


def native_cpu() -> ModuleType | None:
    """`fastres._C`, loaded on the first call, or None; `why_not_cpu` tells why not."""
    return _CPU.module()


def why_not_cpu() -> str | None:
    """Say why `fastres._C` is not loaded; None when it is."""
    return _CPU.why_not()


def native_cuda() -> ModuleType | None:
    """`fastres._C_cuda`, loaded on the first call, or None; `why_not_cuda` tells why not."""
    return _CUDA.module()


def why_not_cuda() -> str | None:
    """Say why `fastres._C_cuda` is not loaded; None when it is."""
    return _CUDA.why_not()


def build_info() -> dict[str, object]:
    """Describe how `fastres._C` was built: compiler, flags, target, schema version; empty when it is not loaded."""
    return _CPU.build_info()


def build_info_cuda() -> dict[str, object]:
    """Describe `fastres._C_cuda` likewise, with CUDA's release and the architectures; empty when it is not loaded."""
    return _CUDA.build_info()


def kernel_attributes() -> dict[str, dict[str, object]]:
    """Registers, shared memory and occupancy of each CUDA kernel, by its name; creates a CUDA context.

    Empty where `fastres._C_cuda` is not loaded or there is no GPU.
    """
    module = native_cuda()
    return {} if module is None else {name: dict(found) for name, found in module.kernel_attributes().items()}


def conv_kernels() -> list[dict[str, Any]]:
    """The kernels of conv_act that `fastres._C_cuda` has, in the order of the native operator's `tile`.

    Empty where the module is not loaded, or was built without CUTLASS's headers.
    """
    module = native_cuda()
    return [] if module is None else [dict(found) for found in module.conv_kernels()]


def why_not_conv(tile: int, shape: tuple[int, ...]) -> str:
    """Say why a kernel of conv_act cannot take a convolution; empty when it can. Needs no GPU.

    shape: N, H, W, C, K, R, S, P, Q, then stride, padding and dilation, two each.
    """
    module = native_cuda()
    return str(why_not_cuda()) if module is None else str(module.why_not_conv(tile, shape))


def why_not_architecture(capability: tuple[int, int], architectures: str) -> str | None:
    """Say why a build for `architectures` (TORCH_CUDA_ARCH_LIST) does not run at `capability`; None where it does.

    Code for 8.0 runs on 8.0 to 8.9, code for 9.0a on 9.0 alone; "+PTX" is compiled by the driver for what is newer.
    """
    for name in architectures.replace(" ", ";").split(";"):
        number, _, ptx = name.partition("+")
        own = number[-1:] in ("a", "f")
        major, _, minor = number.rstrip("af").partition(".")
        if not (major.isdecimal() and minor.isdecimal()):
            continue  # a family's name, such as Ampere: torch expands it, and no promise is made here
        built = int(major), int(minor)
        if capability == built or (not own and capability >= built and (ptx == "PTX" or capability[0] == built[0])):
            return None
    return (
        f"fastres._C_cuda has no code for compute capability {capability[0]}.{capability[1]}: built for {architectures}"
    )
