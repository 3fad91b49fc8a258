"""`fastres.info()` and `fastres info`: the capabilities of this installation, and what is missing.

No CUDA context is created unless asked for: GPUs are counted through NVML and named by nvidia-smi.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastres import _dispatch, _extension

ENVIRONMENT = tuple(
    "FASTRES_BACKEND FASTRES_DISABLE FASTRES_LOG FASTRES_ISA FASTRES_CACHE_DIR FASTRES_BUILD_EXT TRITON_INTERPRET "
    "TRITON_CACHE_DIR TORCH_CUDA_ARCH_LIST CUDA_VISIBLE_DEVICES CUDA_HOME OMP_NUM_THREADS OMP_WAIT_POLICY "
    "MKL_NUM_THREADS".split()
)
PACKAGES = ("torch", "triton", "torchvision", "safetensors", "scikit-learn", "matplotlib", "typer", "rich")
_EXTRA = {"torchvision": "train", "scikit-learn": "train", "matplotlib": "viz", "typer": "cli", "rich": "cli"}
_MARKS = re.compile(r"\((?:R|TM)\)")  # in names of CPUs
_CPU_QUOTA = "/sys/fs/cgroup/cpu.max"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Info(dict[str, Any]):
    """A dictionary of plain data, ready for JSON, that prints as a page of text."""

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of the same data."""
        return dict(self)

    def __str__(self) -> str:
        cpu, lines = self["cpu"], [f"fastres {self['fastres']}"]

        def section(title: str, rows: list[tuple[str, str]]) -> None:
            width = max((len(name) for name, _ in rows), default=0)
            lines.append(f"\n{title}")
            for name, text in rows:
                lines.extend(_wrapped(f"  {name:<{width}}  ", text))

        versions = {"python": self["python"], **self["versions"]}
        section("versions", [(name, version or "not installed") for name, version in versions.items()])
        bf16 = "native" if cpu["native_bf16"] else "emulated (slow)"
        section(
            "machine",
            [
                ("cpu", cpu["model"]),
                ("isa", f"{cpu['isa']}, bf16 convolutions {bf16}"),
                ("cores", f"{cpu['cores']} usable, {cpu['threads']} torch threads"),
                *((f"gpu {i}", _gpu_line(gpu)) for i, gpu in enumerate(self["gpus"])),
                *([] if self["gpus"] else [("gpu", self["cuda"]["reason"])]),
            ],
        )
        rows = []
        for name, module in (("fastres._C", self["extension"]), ("fastres._C_cuda", self["cuda_extension"])):
            built = ", ".join(f"{key} {value}" for key, value in module["build"].items())
            rows.append((name, module["why_not"] or f"loaded: {built}"))
        section("extension", rows)
        if self["cuda_extension"]["kernels"]:
            section("kernels on the GPU", [(n, _kernel_line(k)) for n, k in self["cuda_extension"]["kernels"].items()])
        for device, operators in self["operators"].items():
            rows = []
            for operator, backends in operators.items():
                for i, (backend, reasons) in enumerate(backends.items()):
                    rows.append((f"{operator if i == 0 else '':<12}{backend}", "; ".join(reasons) or "available"))
            section(f"operators on {device} ({', '.join(self['dtypes'])})", rows)
        section("environment", [*self["environment"].items()] or [("", "no variable that fastres reads is set")])
        if self["fixes"]:
            lines.append("\nto fix")
            for fix in self["fixes"]:
                lines.extend(_wrapped("  - ", fix))
        return "\n".join(lines)


def info(*, init_cuda: bool = False) -> Info:
    """Versions, the machine, and for each operator the backends that can run, with reasons for those that cannot.

    Args:
        init_cuda: also query the operators on the GPU, which creates a CUDA context in this process. By default they
            are queried on the GPU only if a context exists already.

    Returns:
        A dictionary with the keys fastres, python, platform, versions, cpu, gpus, cuda, extension, cuda_extension
        (with the kernels' registers, memory and occupancy if a CUDA context exists), dtypes, operators (device ->
        operator -> backend -> refusals, empty if it can run), environment and fixes. `str()` of it is a page of text.

    Example:
        >>> import fastres
        >>> fastres.info()["operators"]["cpu"]["add_relu"]["reference"]
        []
    """
    gpus, cuda = _gpus(), _cuda()
    devices = ["cpu"]
    if gpus and (init_cuda or torch.cuda.is_initialized()):
        try:
            torch.cuda.init()
            devices.append("cuda")
        except RuntimeError as error:  # most often, a driver older than torch's CUDA
            cuda["reason"] = str(error).splitlines()[0]
    cuda_extension = _module_info(_extension.why_not_cuda(), _extension.build_info_cuda)
    cuda_extension["kernels"] = _kernels() if "cuda" in devices and cuda_extension["build"] else {}
    info = Info(
        fastres=version("fastres") or getattr(sys.modules.get("fastres"), "__version__", None),
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: version(name) for name in PACKAGES},
        cpu=cpu(),
        gpus=gpus,
        cuda=cuda,
        extension=_module_info(_extension.why_not_cpu(), _extension.build_info),
        cuda_extension=cuda_extension,
        dtypes=[str(dtype).removeprefix("torch.") for dtype in _DTYPES],
        operators={device: _operators(device) for device in devices},
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )
    info["fixes"] = _fixes(info)
    return info


def version(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """The CPU's model, instruction set, native bf16 support in oneDNN, usable cores, and torch's threads."""
    return {
        "model": _cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": native_bf16(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
    }


def gpu(device: int | torch.device) -> dict[str, Any]:
    """A GPU's name, memory and compute capability; creates a CUDA context."""
    found = torch.cuda.get_device_properties(device)
    capability = f"{found.major}.{found.minor}"
    return {"name": found.name, "memory_mib": found.total_memory >> 20, "capability": capability}


def usable_cores() -> int:
    """The cores this process may use: its affinity, and a container's quota (cgroup v2), which torch ignores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open(_CPU_QUOTA, encoding="ascii") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):  # no cgroup v2 here
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def load_average() -> float | None:
    """The average number of programs that wanted a core over the last minute; None if the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def native_bf16() -> bool:
    """True if this CPU has bf16 instructions for oneDNN (avx512_bf16, amx); otherwise bf16 is emulated."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _wrapped(head: str, text: str, width: int = 79) -> list[str]:
    """`head` and `text` in lines of at most `width`, with the text indented by the length of `head`."""
    lines = textwrap.wrap(text, width - len(head), break_long_words=False, break_on_hyphens=False) or [""]
    return [(head + lines[0]).rstrip(), *(" " * len(head) + line for line in lines[1:])]


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [_MARKS.sub("", line.split(":", 1)[1]).strip() for line in lines if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    """torch's CUDA version and, if there is no GPU to use, the reason."""
    reason = None
    if torch.version.cuda is None:
        reason = "none: this torch is built without CUDA"
    elif torch.cuda.device_count() == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = f"none visible: CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else "none: no NVIDIA GPU found"
    return {"version": torch.version.cuda, "initialized": torch.cuda.is_initialized(), "reason": reason}


def _gpus() -> list[dict[str, Any]]:
    """Name, memory and compute capability of the GPUs that torch may use; from nvidia-smi until CUDA is initialized."""
    count = torch.cuda.device_count() if torch.version.cuda else 0
    if count == 0:
        return []
    if torch.cuda.is_initialized():
        return [gpu(i) for i in range(count)]
    listed = _nvidia_smi()
    unknown = {"name": "unknown until CUDA is initialized", "memory_mib": None, "capability": None}
    return listed if len(listed) == count else [dict(unknown) for _ in range(count)]  # otherwise some are hidden


def _nvidia_smi() -> list[dict[str, Any]]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # no driver: the count above is what torch can use
        return []
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.count(",") == 2]
    return [{"name": n, "memory_mib": int(m) if m.isdigit() else None, "capability": c} for n, m, c in rows]


def _gpu_line(gpu: dict[str, Any]) -> str:
    memory = f", {gpu['memory_mib'] / 1024:.0f} GiB" if gpu["memory_mib"] else ""
    capability = f", compute capability {gpu['capability']}" if gpu["capability"] else ""
    return f"{gpu['name']}{memory}{capability}"


def _module_info(why_not: str | None, build_info: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    return {"why_not": why_not or None, "build": {} if why_not else dict(build_info())}


def _kernels() -> dict[str, dict[str, Any]]:
    """The CUDA kernels' resources; empty on a GPU that they have no code for: the operators' refusals say why."""
    try:
        return _extension.kernel_attributes()
    except RuntimeError:
        return {}


def _kernel_line(kernel: dict[str, Any]) -> str:
    return (
        f"{kernel['registers']} registers, {kernel['shared_bytes']} B shared, {kernel['local_bytes']} B local, "
        f"{kernel['blocks_per_multiprocessor']} blocks of {kernel['threads']}, sm_{kernel['architecture']}"
    )


def _operators(device: str) -> dict[str, dict[str, list[str]]]:
    """Operator -> backend -> refusals of an ordinary call, prefixed with the dtype if only some dtypes are refused."""
    table: dict[str, dict[str, list[str]]] = {}
    probes = {str(d).removeprefix("torch."): torch.empty(2, 8, 4, 4, dtype=d, device=device) for d in _DTYPES}
    for name, operator in _dispatch.OPERATORS.items():
        table[name] = {}
        for backend in operator.backends.values():
            reasons = {d: _dispatch.ordinary_refusals(operator, backend, probe) for d, probe in probes.items()}
            first = next(iter(reasons.values()))
            common = [reason for reason in first if all(reason in other for other in reasons.values())]
            own = [f"{d}: {reason}" for d, listed in reasons.items() for reason in listed if reason not in common]
            table[name][backend.name] = common + own
    return table


def _fixes(info: Info) -> list[str]:
    fixes = []
    if info["extension"]["why_not"]:
        fixes.append(
            "fastres._C: install a C++ compiler, Python's headers and ninja (Debian: apt install g++ python3-dev), then"
            " in the source tree: pip install --no-build-isolation ."
        )
    if info["gpus"] and info["cuda"]["version"] and info["cuda_extension"]["why_not"]:
        fixes.append(
            f"fastres._C_cuda: install the CUDA {info['cuda']['version']} toolkit (nvcc), then in the source tree: "
            "pip install --no-build-isolation ."
        )
    if info["gpus"] and info["versions"]["triton"] is None:
        fixes.append("triton: pip install triton")
    if info["cuda"]["version"] is None and shutil.which("nvidia-smi"):
        fixes.append("torch: this machine has NVIDIA's driver but torch has no CUDA: pip install a CUDA build of torch")
    missing = sorted({_EXTRA[name] for name, found in info["versions"].items() if found is None and name in _EXTRA})
    if missing:
        fixes.append(f'optional packages: pip install "fastres[{",".join(missing)}]"')
    problem = _dispatch.environment_problem() or _extension.isa_problem()
    if problem is not None:
        fixes.append(problem)
    elif info["environment"].get("FASTRES_DISABLE"):
        fixes.append("FASTRES_DISABLE is set: unset it to use the backends it names")
    return fixes
