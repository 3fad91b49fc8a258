"""The choice of a kernel of fastres._C_cuda for a convolution: by measurements, else by its bounds.

    kernels()          what this build has: tiles of y, from the largest that two warpgroups hold down to 64 x 64
    why_not(problem)   refusals, as sentences; empty when a kernel takes it
    choose(problem)    the kernel: the fastest measured one, else the one of least `cost`
    measured_order     the backends of a GPU, fastest first, where they were measured

Measurements are data in conv_measured.json next to this file; `make gpu` takes them and `make gpu-import` writes them:

    {"schema": "fastres.conv", "schema_version": 1, "entries": [
        {"arch": 90, "dtype": "float16", "shape": [256, 56, 56, 64, 64, 3, 3, 56, 56, 1, 1, 1, 1, 1, 1],
         "residual": true, "ms": {"cudnn": 0.1, "triton": 0.1, "sm90_128x64_pingpong": 0.1}, ...where, when}]}

A convolution of another batch or image size takes the nearest one's, by pixels, if they are within a factor of two.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from fastres import _extension

ACTS = ("relu", "none", "relu6")
PATH = Path(__file__).with_name("conv_measured.json")
SCHEMA, VERSION = "fastres.conv", 1
BACKENDS = ("cudnn", "triton")  # apart from our kernels, which have names of their own
FARTHEST = 2.0  # times as many pixels, or as few, that a measurement speaks for
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Problem:
    """A convolution on a GPU."""

    capability: tuple[int, int]
    dtype: torch.dtype
    shape: tuple[int, ...]  # N, H, W, C, K, R, S, P, Q, then stride, padding and dilation, two each
    residual: bool

    @property
    def pixels(self) -> int:
        n, p, q = self.shape[0], *self.shape[7:9]
        return n * p * q

    @property
    def layer(self) -> tuple[Any, ...]:
        """Key of the measurements: what stays when the batch or the image's size changes."""
        arch = 10 * self.capability[0] + self.capability[1]
        return arch, _NAMES[self.dtype], self.shape[3:7], self.shape[9:], self.residual


@dataclass(frozen=True)
class Kernel:
    """One kernel of the build: csrc/cuda/kernels.h says what the fields are."""

    index: int  # the native operator's `tile`
    name: str
    element: str
    architecture: int
    pixels: int
    channels: int
    depth: int
    cluster: int
    splits_depth: bool
    threads: int
    shared_bytes: int

    def runs_on(self, capability: tuple[int, int]) -> bool:
        return capability == (9, 0) if self.architecture == 90 else capability >= (8, 0)


@cache
def kernels() -> tuple[Kernel, ...]:
    """List the kernels of this build; none where it was built without CUTLASS's headers."""
    return tuple(Kernel(i, **found) for i, found in enumerate(_extension.conv_kernels()))


@lru_cache(4096)
def taken_by(problem: Problem) -> tuple[tuple[Kernel, ...], tuple[str, ...]]:
    """(the kernels that take it, why the others do not)."""
    known = [k for k in kernels() if k.element == _NAMES[problem.dtype] and k.runs_on(problem.capability)]
    reasons = [_extension.why_not_conv(k.index, problem.shape) for k in known]
    can = tuple(kernel for kernel, reason in zip(known, reasons, strict=True) if not reason)
    return can, tuple(dict.fromkeys(reason for reason in reasons if reason))


def why_not(problem: Problem) -> list[str]:
    """List why no kernel takes it; empty when one does."""
    if not kernels():
        return [
            "fastres._C_cuda was built without CUTLASS's headers: pip install --no-deps nvidia-cutlass, build again"
        ]
    can, reasons = taken_by(problem)
    return [] if can else list(reasons) or [f"no kernel of this build runs at {problem.capability}"]


@lru_cache(4096)
def choose(problem: Problem, multiprocessors: int) -> Kernel:
    """The kernel for a problem that one takes."""
    can, _ = taken_by(problem)
    times = _nearest(problem)
    measured = [kernel for kernel in can if kernel.name in times]
    if measured:
        return min(measured, key=lambda kernel: times[kernel.name])
    return min(can, key=lambda kernel: (cost(kernel, problem, multiprocessors), -kernel.pixels * kernel.channels))


# ---- bounds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chip:
    """A multiprocessor, per clock: datasheet figures, for want of measured ones. Only their proportions matter here."""

    products: int  # 16-bit multiplications and additions; TF32 has half
    memory: float  # bytes, of the multiprocessor's share
    cache: float  # bytes from the L2 cache
    shared: float  # bytes of shared memory


_SHARE = 8  # steps below which CUTLASS gives no block a part of a tile
_CHIPS = {80: _Chip(2048, 10, 32, 128), 90: _Chip(4096, 18, 48, 128)}


def cost(kernel: Kernel, problem: Problem, multiprocessors: int) -> float:
    """Clocks that a kernel needs at least: the larger of products and bytes of a tile, times the waves of tiles."""
    chip, size = _CHIPS[kernel.architecture], problem.dtype.itemsize
    _, _, _, c, k, r, s = problem.shape[:7]
    line = kernel.depth * size  # bytes
    steps = r * s * -(-c // kernel.depth)
    tiles = -(-problem.pixels // (kernel.pixels * kernel.cluster)) * kernel.cluster * -(-k // kernel.channels)

    rate = chip.products if size == 2 else chip.products // 2
    products = 2 * kernel.pixels * kernel.channels * kernel.depth / rate
    loads = (kernel.pixels + kernel.channels / kernel.cluster) * line / chip.cache
    rows = 64 if kernel.architecture == 90 else 32  # of x that one reading of the weights serves
    operands = kernel.pixels / rows * (rows + kernel.channels) * line / chip.shared
    step = max(products, loads, operands)
    epilogue = kernel.pixels * kernel.channels * size * (2 if problem.residual else 1) / chip.memory

    if kernel.splits_depth:
        share = max(tiles * steps / multiprocessors, min(steps, _SHARE))  # steps of a block
        sums = (
            2 * 4 * kernel.pixels * kernel.channels / chip.cache
        )  # in fp32: written and read, one block after another
        blocks = 1 if tiles % multiprocessors == 0 else max(steps / share, 2)  # that share a tile
        return step * share + epilogue * max(tiles / multiprocessors, 1) + sums * (blocks - 1)
    overlaps = "pingpong" in kernel.name or kernel.architecture == 80  # other tiles' products hide the epilogue
    tile = max(step * steps, epilogue) + min(step * steps, epilogue) * (0.1 if overlaps else 1)
    return float(-(-tiles // multiprocessors) * tile)


# ---- measurements ----------------------------------------------------------------------------------------------------


def checked(data: Any, where: str) -> list[dict[str, Any]]:
    """The entries of a file of measurements. Raises ValueError naming what is wrong."""
    if not isinstance(data, dict) or (data.get("schema"), data.get("schema_version")) != (SCHEMA, VERSION):
        raise ValueError(f"{where}: expected the schema {SCHEMA!r}, version {VERSION}")
    entries = data.get("entries")
    if not isinstance(entries, list):
        raise ValueError(f"{where}: entries: got {type(entries).__name__}, expected a list")
    seen = set()
    for i, entry in enumerate(entries):
        at = f"{where}: entries[{i}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{at}: got {type(entry).__name__}, expected an object")
        shape, ms = entry.get("shape"), entry.get("ms")
        if type(entry.get("arch")) is not int or entry.get("dtype") not in _NAMES.values():
            raise ValueError(f"{at}: arch, dtype: got {entry.get('arch')!r}, {entry.get('dtype')!r}")
        if not isinstance(shape, list) or len(shape) != 15 or any(type(v) is not int or v < 0 for v in shape):
            raise ValueError(f"{at}: shape: got {shape!r}, expected 15 sizes")
        if type(entry.get("residual")) is not bool:
            raise ValueError(f"{at}: residual: got {entry.get('residual')!r}, expected true or false")
        if not isinstance(ms, dict) or not ms or any(type(v) not in (int, float) or not v > 0 for v in ms.values()):
            raise ValueError(f"{at}: ms: got {ms!r}, expected milliseconds by name")
        key = entry["arch"], entry["dtype"], tuple(shape), entry["residual"]
        if key in seen:
            raise ValueError(f"{at}: {key} is there twice")
        seen.add(key)
    return entries


Table = dict[tuple[Any, ...], dict[int, dict[str, float]]]  # layer -> pixels -> milliseconds by name


def load(path: Path) -> Table:
    """The table in a file; empty where there is none. Raises ValueError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    table: Table = {}
    for entry in checked(data, str(path)):
        shape = tuple(entry["shape"])
        layer = entry["arch"], entry["dtype"], shape[3:7], shape[9:], entry["residual"]
        table.setdefault(layer, {})[prod((shape[0], *shape[7:9]))] = entry["ms"]
    return table


MEASURED = load(PATH)


def _nearest(problem: Problem) -> dict[str, float]:
    """Milliseconds by name, of the nearest measurement; nothing where none is near."""
    rows = MEASURED.get(problem.layer, {})
    pixels = problem.pixels
    near = [n for n in rows if pixels <= FARTHEST * n and n <= FARTHEST * pixels]
    return rows[min(near, key=lambda n: max(n, pixels) / min(n, pixels))] if near else {}


def measured_order(problem: Problem) -> tuple[str, ...]:
    """cudnn, triton and cuda, the fastest first, behind them what was not measured; nothing where two were not."""
    times = _nearest(problem)
    own = {kernel.name for kernel in taken_by(problem)[0]}
    best = {name: times[name] for name in BACKENDS if name in times}
    best |= {"cuda": min(ms for name, ms in times.items() if name in own)} if own & set(times) else {}
    if len(best) < 2:
        return ()
    return (*sorted(best, key=lambda name: best[name]), *(name for name in (*BACKENDS, "cuda") if name not in best))
