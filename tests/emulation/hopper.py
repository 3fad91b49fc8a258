"""What sm_90a's convolutions hand to the copy engine, at sizes that no emulator runs (emulation90.py runs small ones).

`library()` is tests/emulation/native/conv_launch.cpp: the shipped tiles, compiled by the C++ compiler. `Tile` calls it:
descriptors, work, copies. `illegal()` is what the driver asks of a descriptor, as cuTensorMapEncodeTiled and
cuTensorMapEncodeIm2col are documented (cuda.h).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch

import emulation
from emulation import ROOT, cutlass_headers, toolkit_headers

SHIPPED = sorted(ROOT.glob("csrc/cuda/conv_sm90_*.cu"))
SOURCE = ROOT / "tests/emulation/native/conv_launch.cpp"
# NDEBUG, as in the shipped build. permissive: g++ refuses a name of CUTLASS's that nvcc takes. Symbolic: torch brings
# CUDA's functions too.
FLAGS = ["-O0", "-Wno-psabi", "-fpermissive", "-Wl,-Bsymbolic", "-DNDEBUG", "-DFASTRES_CONV_SM90"]

BYTES = {1: 2, 3: 4, 6: 2, 7: 4, 9: 2, 11: 4}  # of CUtensorMapDataType: 16 and 32 bits, plain, fp, bf16, TF32
SWIZZLES = {0: None, 1: 32, 2: 64, 3: 128}


@cache
def library():
    """tests/emulation/native/conv_launch.cpp, compiled: half a minute of a core."""
    emulation.need_gcc()
    toolkit, cutlass = toolkit_headers(), cutlass_headers()
    own = [
        ROOT / "tests/emulation/native/hopper",
        ROOT / "tests/emulation/native",
        cutlass,
        cutlass.parent / "tools/util/include",
    ]
    folders = [*(f"-I{folder}" for folder in own), *(f"-isystem{folder}" for folder in dict.fromkeys(toolkit))]
    loaded = emulation.compiled("conv-launch", [SOURCE], [*FLAGS, *folders])
    for name in ("tile_count", "workspace", "descriptors", "work", "load"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.refusal.restype = ctypes.c_char_p
    return loaded


def numbers(*values):
    return torch.tensor(values, dtype=torch.int64)


def call(name, *arguments):
    """A function of the library; integers as int64, tensors as their memory."""
    converted = [ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in arguments]
    return getattr(library(), name)(*converted)


def rows_of(name, width, *arguments):
    """The rows that a function of the library lists."""
    none = torch.empty(0, dtype=torch.int64)
    rows = torch.empty(call(name, *arguments, none, 0), width, dtype=torch.int64)
    call(name, *arguments, rows, len(rows))
    return rows.tolist()


# ---- a convolution


@dataclass(frozen=True)
class Conv:
    """x [n, h, w, c], weight [k, r, s, c]; pairs are of the height and the width."""

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int = 1
    s: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def out(self, i):
        size, taps = ((self.h, self.r), (self.w, self.s))[i]
        return (size + 2 * self.padding[i] - self.dilation[i] * (taps - 1) - 1) // self.stride[i] + 1

    @property
    def p(self):
        return self.out(0)

    @property
    def q(self):
        return self.out(1)

    @property
    def pixels(self):
        return self.n * self.p * self.q

    @property
    def pointwise(self):
        return (self.r, self.s, self.stride, self.padding) == (1, 1, (1, 1), (0, 0))

    def numbers(self):
        shape = (self.n, self.h, self.w, self.c, self.k, self.r, self.s, self.p, self.q)
        return numbers(*shape, *self.stride, *self.padding, *self.dilation)


# ---- descriptors


@dataclass(frozen=True)
class Descriptor:
    im2col: bool
    type: int
    address: int
    dims: tuple
    strides: tuple  # in bytes, of dims[1:]
    box: tuple  # im2col: (channels, pixels)
    element_strides: tuple
    lower: tuple  # im2col: of w, h
    upper: tuple
    interleave: int
    swizzle: int
    promotion: int
    fill: int

    @staticmethod
    def of(row):
        rank, take = row[2], iter(row[4:])
        dims, strides, box, steps, lower, upper = ([next(take) for _ in range(n)] for n in (5, 4, 5, 5, 3, 3))
        im2col = bool(row[0])
        return Descriptor(
            im2col, row[1], row[3], tuple(dims[:rank]), tuple(strides[: rank - 1]), tuple(box[: 2 if im2col else rank]),
            tuple(steps[:rank]), tuple(lower[: rank - 2]), tuple(upper[: rank - 2]), *take,
        )  # fmt: skip


def illegal(d):
    """What the driver's documentation forbids about a descriptor; empty: nothing."""
    found, rank, width = [], len(d.dims), d.box[0] * BYTES.get(d.type, 1)

    def needs(condition, what):
        if not condition:
            found.append(what)

    needs(d.type in BYTES, f"type {d.type}")
    needs(3 <= rank <= 5, f"rank {rank}")  # 1 and 2 are for tiled without interleave; none here has so few
    needs(d.address > 0 and d.address % 16 == 0, f"address {d.address}")
    needs(all(1 <= v <= 2**32 for v in d.dims), f"dims {d.dims}")
    needs(all(0 <= v < 2**40 and v % 16 == 0 for v in d.strides), f"strides {d.strides}")
    needs(all(1 <= v <= 8 for v in d.element_strides[1:]), f"element strides {d.element_strides}")
    needs((d.interleave, d.fill) == (0, 0), "interleave or fill")
    span = SWIZZLES.get(d.swizzle, 0)
    needs(span is None or width <= span, f"a box {width} bytes wide for a swizzle of {span}")
    needs(width % 16 == 0, f"a box {width} bytes wide")
    if d.im2col:
        limit = {3: 2**15, 4: 2**7, 5: 2**4}[rank]
        needs(all(-limit <= v < limit for v in d.lower + d.upper), f"corners {d.lower}, {d.upper}")
        sides = [n + u - low for n, low, u in zip(d.dims[1:-1], d.lower, d.upper, strict=True)]
        needs(all(side > 0 for side in sides), f"a bounding box of {sides}")
        needs(1 <= d.box[0] <= 256 and 1 <= d.box[1] <= 1024, f"a column of {d.box}")
    else:
        needs(all(1 <= v <= 256 for v in d.box), f"a box of {d.box}")
    return found


# ---- copies


@dataclass(frozen=True)
class Copy:
    descriptor: int
    shared: int
    barrier: int
    coordinates: tuple
    offsets: tuple
    multicast: int


# ---- tiles


@dataclass(frozen=True)
class Work:
    block: int
    row_tile: int
    column_tile: int
    batch: int
    step: int
    steps: int
    last: int


@dataclass(frozen=True)
class Launch:
    grid: tuple
    x: Descriptor
    weight: Descriptor
    residual: Descriptor
    y: Descriptor


@dataclass(frozen=True)
class Tile:
    index: int
    type: int  # 0: float, 1: bf16, 2: fp16
    rows: int
    columns: int
    depth: int
    cluster: int
    stages: int
    threads: int
    shared_bytes: int
    splits_depth: int
    pingpong: int

    @property
    def size(self):
        return 4 if self.type == 0 else 2

    @property
    def name(self):
        kind = "streamk" if self.splits_depth else "pingpong" if self.pingpong else f"cluster{self.cluster}"
        return f"{('float', 'bfloat16', 'half')[self.type]}-{self.rows}x{self.columns}-{kind}"

    def refusal(self, conv):
        return call("refusal", self.index, conv.numbers()).decode()

    def workspace(self, conv, multiprocessors=132):
        return call("workspace", self.index, conv.numbers(), multiprocessors)

    def launch(self, conv, residual=False, bias=True, multiprocessors=132, clusters=0):
        """Addresses are made up: x is at 1, the weight at 2, … times 2^44. `clusters`: that fit the GPU, 0: any."""
        addresses = [(i + 1) << 44 if given else 0 for i, given in enumerate((True, True, bias, residual, True))]
        out = torch.zeros(7, dtype=torch.int64)
        call("launch", self.index, conv.numbers(), numbers(*addresses), multiprocessors, clusters, out)
        found = [Descriptor.of(row) for row in rows_of("descriptors", 33)]
        *grid, x, weight, source, y = out.tolist()
        assert len(found) == 4
        return Launch(tuple(grid), *(found[i] for i in (x, weight, source, y)))

    def work(self):
        """Of the last launch."""
        return [Work(*row) for row in rows_of("work", 7, self.index)]

    def load(self, row_tile, column_tile, step, steps, rank=0):
        """The copies of one piece of the last launch's work: x's and the weight's of each step."""
        found = torch.empty(2 * steps, 11, dtype=torch.int64)
        count = call("load", self.index, row_tile, column_tile, step, steps, rank, found, len(found))
        assert count == len(found)
        return [Copy(r[0], r[1], r[2], tuple(r[3:8]), tuple(r[8:10]), r[10]) for r in found.tolist()]


@cache
def tiles():
    found = []
    for i in range(call("tile_count")):
        out = torch.zeros(10, dtype=torch.int64)
        call("tile", i, out)
        found.append(Tile(i, *out.tolist()))
    return tuple(found)
