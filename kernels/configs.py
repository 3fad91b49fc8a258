"""Tile sizes and warps of every kernel: one table, by kernel, architecture and shape class.

The entries below follow from the compiled code (registers decide how many programs an SM holds) and from the bytes a
GPU needs in flight; entries measured on a GPU are in tuned.json and replace them (measured.py). The compile lane of the
tests compiles every entry of the table. A kernel processes `tile` elements at a time, at most 16 per thread: with all
the threads that an SM then holds, enough 16-byte loads are in flight to keep memory busy. `programs` of a reduction is
about the number that the GPU holds at once. It comes from this table and not from the device, so that the partition of
a tensor, and with it the last bit of every sum, depends only on its shape and the architecture.

Shape classes: "large" and "small" for flat arrays; "rows" (channels_last) and "planes" (NCHW) for images, plain, with
"_small", or with "_odd" where lines cannot be read in vectors; "many" and "few" for the partial results of a merge; for
GEMMs the classes of _gemm, with "_tf32" or "_ieee" in fp32.
"""

from dataclasses import dataclass, replace
from math import gcd

from . import measured

SMALL = 1 << 20  # elements; below, tiles shrink so that the tensor still spreads over the whole GPU
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Config:
    tile: int  # elements of a tile, BLOCK_R * BLOCK_L
    num_warps: int
    line: int = 0  # largest BLOCK_L, along the contiguous axis; BLOCK_R rows fill the tile
    programs: int = 0  # total number of programs, for reductions


@dataclass(frozen=True)
class GemmConfig:
    block_m: int  # output pixels
    block_n: int  # output channels
    block_k: int  # depth
    num_warps: int
    num_stages: int  # of the load pipeline
    group_m: int = 8  # tiles of pixels that run with all tiles of channels before the next group


def _flat(arch: int) -> dict[str, Config]:
    return {"large": Config(tile=2048, num_warps=4), "small": Config(tile=512, num_warps=4)}


def _normalize(arch: int) -> dict[str, Config]:
    return {
        "rows": Config(tile=2048, num_warps=4, line=512),
        "rows_small": Config(tile=512, num_warps=4, line=256),
        "planes": Config(tile=2048, num_warps=4, line=1024),
        "planes_small": Config(tile=512, num_warps=4, line=256),
        # one address per element instead of per vector: half the elements per thread, or registers run out
        "rows_odd": Config(tile=1024, num_warps=4, line=256),
        "planes_odd": Config(tile=1024, num_warps=4, line=256),
    }


def _gradient(arch: int) -> dict[str, Config]:
    # One more tensor and two more vectors than the forward: with 16 elements per thread some variants spill 8 bytes.
    return {
        "rows": Config(tile=2048, num_warps=8, line=512),
        "rows_small": Config(tile=512, num_warps=4, line=256),
        "planes": Config(tile=2048, num_warps=8, line=1024),
        "planes_small": Config(tile=512, num_warps=4, line=256),
        "rows_odd": Config(tile=1024, num_warps=8, line=256),
        "planes_odd": Config(tile=1024, num_warps=8, line=256),
    }


# Lines of 128 channels in reductions: wider tiles would write more partial results, narrower ones would read less than
# two 128-byte lines per row in fp32. `programs` is what the GPU's registers hold at once: one wave, nothing queues.


def _statistics(arch: int) -> dict[str, Config]:
    sm_count = _SM_COUNT[arch]
    return {
        "rows": Config(tile=2048, num_warps=4, line=128, programs=6 * sm_count),
        "rows_small": Config(tile=1024, num_warps=4, line=64, programs=2 * sm_count),
        "rows_odd": Config(tile=1024, num_warps=4, line=128, programs=6 * sm_count),
        "planes": Config(tile=2048, num_warps=4, line=1024, programs=6 * sm_count),
        "planes_small": Config(tile=1024, num_warps=4, line=512, programs=2 * sm_count),
        "planes_odd": Config(tile=1024, num_warps=4, line=512, programs=6 * sm_count),
    }


def _sums(arch: int) -> dict[str, Config]:
    sm_count = _SM_COUNT[arch]
    # Up to five tensors at a time: half as many elements per thread as in the statistics.
    return {
        "rows": Config(tile=2048, num_warps=8, line=128, programs=3 * sm_count),
        "rows_small": Config(tile=1024, num_warps=4, line=64, programs=2 * sm_count),
        "rows_odd": Config(tile=1024, num_warps=8, line=128, programs=3 * sm_count),
        "planes": Config(tile=2048, num_warps=8, line=1024, programs=3 * sm_count),
        "planes_small": Config(tile=1024, num_warps=4, line=512, programs=2 * sm_count),
        "planes_odd": Config(tile=1024, num_warps=8, line=512, programs=3 * sm_count),
    }


def _merge(arch: int) -> dict[str, Config]:
    # 8 channels are one 32-byte sector: few channels per program, so that a 64-channel tensor still uses 8 SMs.
    return {"many": Config(tile=1024, num_warps=4, line=8), "few": Config(tile=512, num_warps=4, line=64)}


# Implicit GEMMs: an iteration takes 128 bytes of depth, the longest swizzle of shared memory. The epilogue limits the
# tile, because sums and residual are in registers at once: 255 per thread without a spill allow 128 x 128 for 256
# threads, and 128 x 256, which reads a quarter less from the L2 cache, where there is no residual.


def _gemm(arch: int) -> dict[str, GemmConfig]:
    rows = {
        # mma.sync of sm_80 also has its operands in registers: 128 x 256 spills 8 bytes there
        "deep": GemmConfig(128, 256, 64, num_warps=8, num_stages=4) if arch >= 90 else GemmConfig(128, 128, 64, 8, 4),
        "wide": GemmConfig(128, 128, 64, num_warps=8, num_stages=4),
        # mostly memory-bound: two or three programs per SM, so that one's loads overlap another's epilogue
        "narrow": GemmConfig(128, 64, 64, num_warps=4, num_stages=3),
        # latency-bound: many programs with few, long iterations
        "few": GemmConfig(64, 32, 128, num_warps=4, num_stages=4),
        # one address per element instead of per vector, and loads that pass through registers
        "odd": GemmConfig(64, 64, 32, num_warps=4, num_stages=3),
    }
    tf32 = {name: replace(entry, block_k=entry.block_k // 2) for name, entry in rows.items()}
    if arch >= 100:
        tf32["deep"] = tf32["wide"]  # fp32 outputs of 128 x 256 spill 108 bytes there
    # CUDA cores: each thread computes block_m * block_n / threads outer products, 16 here, from registers
    ieee = {name: GemmConfig(64, 64, 16, num_warps=8, num_stages=3) for name in ("deep", "wide", "narrow")}
    ieee |= {name: GemmConfig(64, 32, 16, num_warps=4, num_stages=3) for name in ("few", "odd")}
    return (
        rows
        | {f"{name}_tf32": entry for name, entry in tf32.items()}
        | {f"{name}_ieee": entry for name, entry in ieee.items()}
    )


_KERNELS = {
    "add_relu_forward_kernel": _flat,
    "add_relu_backward_kernel": _flat,
    "bn_statistics_kernel": _statistics,
    "bn_statistics_merge_kernel": _merge,
    "bn_act_forward_kernel": _normalize,
    "bn_act_backward_sums_kernel": _sums,
    "bn_act_backward_merge_kernel": _merge,
    "bn_act_backward_kernel": _gradient,
    "conv_act_forward_kernel": _gemm,
}
_SM_COUNT = {80: 108, 90: 132, 100: 148}  # A100, H100 and H200, B200

# (kernel, architecture) -> shape class -> configuration
TABLE: dict[tuple[str, int], dict[str, Config | GemmConfig]] = {
    (kernel, arch): rows(arch) for kernel, rows in _KERNELS.items() for arch in ARCHITECTURES
}
measured.load(measured.PATH, TABLE)


def config(kernel: str, arch: int, shape_class: str) -> Config:
    """The entry of the newest known architecture up to `arch`, or of the oldest one."""
    known = max((a for a in ARCHITECTURES if a <= arch), default=ARCHITECTURES[0])
    return TABLE[kernel, known][shape_class]


def size_class(numel: int) -> str:
    return "small" if numel < SMALL else "large"


def image_class(numel: int, length: int, channels_last: bool) -> str:
    suffix = "_odd" if alignment_unit(length) < 4 else "_small" if numel < SMALL else ""
    return ("rows" if channels_last else "planes") + suffix


def merge_class(parts: int) -> str:
    return "few" if parts <= 8 else "many"


FEW = 1 << 21  # outputs of a GEMM: 128 tiles of 128 x 128, about one for every SM
MANY = 1 << 23  # 256 tiles of 128 x 256, about two


@dataclass(frozen=True)
class Gemm:
    """The size of a GEMM, which decides its class: `groups` times pixels x out_channels x depth."""

    pixels: int
    out_channels: int
    depth: int  # of one tap, or of all taps where they are one axis
    groups: int
    vectors: bool  # inputs and outputs move in vectors of at least 8 bytes, along the depth and the output channels
    residual: bool
    precision: str  # "": 16-bit products; "_tf32"; "_ieee"

    @property
    def shape_class(self) -> str:
        outputs = self.pixels * self.out_channels * self.groups
        if not self.vectors:
            shape = "odd"
        elif outputs < FEW:
            shape = "few"
        elif self.out_channels <= 64:
            shape = "narrow"
        else:
            shape = "deep" if outputs >= MANY and self.out_channels % 256 == 0 and not self.residual else "wide"
        return shape + self.precision


def gemm(kernel: str, arch: int, shape: Gemm) -> GemmConfig:
    """The entry of a GEMM, with blocks no larger than a narrow or shallow one fills."""
    if arch >= 120:
        arch = 80  # GeForce has 99 KB of shared memory and mma.sync: the entries of sm_80 fit, as on sm_86 and sm_89
    entry = config(kernel, arch, shape.shape_class)
    return replace(
        entry,
        block_n=min(entry.block_n, max(next_power_of_2(shape.out_channels), 16)),
        block_k=min(entry.block_k, max(next_power_of_2(shape.depth), 16)),
    )


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def alignment_unit(length: int) -> int:
    """The largest power of two up to 16 that divides the length of a line. As a constant it lets a kernel read lines of
    196 or 24 elements in vectors; by itself Triton recognizes only multiples of 16."""
    return gcd(length, 16)


def blocks(config: Config, rows: int | None, length: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_L) for lines of `length` elements; `rows` is an upper limit of BLOCK_R.

    A line longer than the tile is split so that the last block has the fewest empty elements. BLOCK_R * length stays
    below 2^31, because offsets within a tile are int32.
    """
    if length <= config.line:
        block_l = next_power_of_2(length)
    else:
        candidates = [max(config.line >> shift, 1) for shift in range(3)]
        block_l = min(candidates, key=lambda b: (-(-length // b) * b, -b))
    block_r = max(config.tile // block_l, 1)
    if rows is not None:
        block_r = min(block_r, next_power_of_2(rows))
    while block_r > 1 and block_r * length >= 2**31:
        block_r //= 2
    return block_r, block_l
