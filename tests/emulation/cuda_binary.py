"""What the compiled CUDA kernels are made of, read from the binary: registers, memory, kinds of instructions.

`python tests/emulation/cuda_binary.py` writes docs/kernels-cuda.md from the fastres._C_cuda that is built; Triton's
wheel brings cuobjdump and nvdisasm.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs/kernels-cuda.md"
DOCUMENTED = "sm_90a"
SCHEDULES = ("cooperative", "pingpong", "streamk")
HEAD = """# The CUDA kernels, as compiled

Written by `python tests/emulation/cuda_binary.py` from the built `fastres._C_cuda`;
`tests/emulation/test_cuda_binary.py` fails when it no longer says what the binary holds. {architecture}, CUDA {cuda},
`{flags}`.

The number behind the type is how many elements a thread moves at once: 8 or 4 are 16 bytes, 1 is the path for lines or
addresses that do not divide. Blocks: how many fit a multiprocessor by registers, threads and shared memory
(65,536 registers, 2,048 threads, 228 KB). Loads and stores of 128 bits are counted in the code, where a loop is
written once. No kernel spills, uses local memory, double precision or atomics.

| kernel | registers | shared memory, B | threads | blocks | 128-bit loads | 128-bit stores |
| --- | --- | --- | --- | --- | --- | --- |
"""
CONVOLUTIONS = """
## The convolutions

`conv_act` with CUTLASS {cutlass}. The sm_90 ones load by the copy engine (TMA, im2col mode) and multiply by wgmma
(HGMMA); the sm_80 ones, which every newer GPU runs too, by cp.async and mma.sync (HMMA). Registers are what a block
is launched with: the sm_90 kernels move most of the loading warps' to the multiplying ones. Products are in the code:
the loop over the depth is written twice on sm_90, its start and its body, each with one wait. No kernel spills, uses
local memory or double precision; stream-K alone has atomics, for its counters and to add up the parts of a tile that
three blocks or more share, each after the one before it.

| kernel | element | tile | depth | cluster | registers | shared memory, B | threads | blocks | products | waits |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def tool(name):
    """A program of CUDA's binary utilities: Triton's, or one on PATH; None where there is none."""
    spec = find_spec("triton")
    own = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec and spec.origin else None
    return str(own) if own is not None and own.exists() else shutil.which(name)


def binary():
    """The path of fastres._C_cuda, or None where it is not built."""
    spec = find_spec("fastres._C_cuda")
    return None if spec is None else spec.origin


def run(name, *arguments):
    return subprocess.run([tool(name) or name, *arguments], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Kernel:
    name: str  # statistics_kernel<Half, 8, true>
    registers: int
    shared: int
    stack: int
    local: int
    instructions: Counter[str]  # opcodes with their modifiers: LDG.E.128
    order: tuple[str, ...]  # the same as they follow each other

    @property
    def is_convolution(self):
        return self.name.startswith("conv_sm")

    @property
    def lanes(self):
        """Elements that a thread moves at once."""
        numbers = re.findall(r"\b\d+\b", self.name.partition("<")[2])
        return int(numbers[0]) if numbers else 1

    @property
    def threads(self):
        return 512 if "merge" in self.name else 256

    @property
    def blocks(self):
        by_registers = 65536 // (-(-self.registers // 8) * 8 * self.threads)
        by_memory = 228 * 1024 // (self.shared + 1024)
        return min(by_registers, by_memory, 2048 // self.threads)

    def count(self, pattern):
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def readable(mangled):
    """Mangled names to ours: flat_kernel<AddRelu, Half, 8, 4>."""
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    short = []
    for name in names.splitlines():
        name = re.sub(r"fastres::|_GLOBAL__N__\w+::|\(anonymous namespace\)::|^void ", "", name)
        name = re.sub(r"\(Schedule\)(\d)", lambda found: SCHEDULES[int(found[1])], name)  # conv_sm90.cuh's
        short.append(
            re.sub(r"\(.*", "", name.replace("(int)", "").replace("(bool)0", "false").replace("(bool)1", "true"))
        )
    return short


def by_architecture(text):
    """The parts of cuobjdump's output, by architecture: one per source file and architecture."""
    parts = {}
    for part in re.split(r"^Fatbin (?:elf|ptx) code:$", text, flags=re.M)[1:]:
        arch = re.search(r"^arch = (\S+)$", part, re.M)[1]
        parts.setdefault(arch, []).append(part)
    return {arch: "\n".join(found) for arch, found in parts.items()}


@cache
def kernels(path):
    """{architecture: {name: Kernel}} of a binary."""
    usage, code = (
        by_architecture(run("cuobjdump", "-res-usage", path)),
        by_architecture(run("cuobjdump", "-sass", path)),
    )
    found = {}
    for arch, text in usage.items():
        resources = {
            m[1]: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", m[2])}
            for m in re.finditer(r"Function (\S+):\n\s*(.*)", text)
        }
        sass = {}
        for part in re.split(r"^\s*Function : ", code[arch], flags=re.M)[1:]:
            name, _, body = part.partition("\n")
            pattern = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
            sass[name.strip()] = tuple(re.findall(pattern, body, re.M))
        assert resources.keys() == sass.keys()
        names = dict(zip(resources, readable(list(resources)), strict=True))
        assert len(set(names.values())) == len(names)
        found[arch] = {
            names[m]: Kernel(names[m], r["REG"], r["SHARED"], r["STACK"], r["LOCAL"], Counter(sass[m]), sass[m])
            for m, r in resources.items()
        }
    return found


def of_convolution(found, row):
    """The kernel in the binary of a row of `_extension.conv_kernels()`: by its type and tile."""
    element = {"float16": "Half", "bfloat16": "BFloat16", "float32": "float"}[row["element"]]
    generation, size, *others = row["name"].split("_")
    schedule = next((name for name in SCHEDULES if name in others), SCHEDULES[0])
    wanted = f"{generation.capitalize()}<{element}, {row['pixels']}, {row['channels']}, "
    if generation == "sm90":
        wanted += f"{row['cluster']}, {schedule}>"
    (kernel,) = [k for k in found.values() if wanted in k.name]
    return kernel


def table(path, build, convolutions):
    """The text of docs/kernels-cuda.md."""
    found = kernels(path)[DOCUMENTED]
    rows = []
    for _, k in sorted(found.items()):
        if not k.is_convolution:
            loads, stores = k.count(r"LDG\.E\.128"), k.count(r"STG\.E\.128")
            rows.append(
                f"| `{k.name}` | {k.registers} | {k.shared} | {k.threads} | {k.blocks} | {loads} | {stores} |\n"
            )
    text = HEAD.format(architecture=DOCUMENTED, cuda=build["cuda"], flags=build["flags"]) + "".join(rows)
    if not convolutions:
        return text
    rows = []
    for row in convolutions:
        k = of_convolution(found, row)
        blocks = min(65536 // (-(-k.registers // 8) * 8 * row["threads"]), 228 * 1024 // (row["shared_bytes"] + 1024))
        cells = f"`{row['name']}`", row["element"], f"{row['pixels']}x{row['channels']}", row["depth"], row["cluster"]
        counts = k.count("HGMMA|HMMA"), k.count(r"WARPGROUP\.DEPBAR") or "-"
        cells = *cells, k.registers, f"{row['shared_bytes']:,}", row["threads"], blocks, *counts
        rows.append("| " + " | ".join(map(str, cells)) + " |\n")
    return text + CONVOLUTIONS.format(cutlass=build["cutlass"]) + "".join(rows)


if __name__ == "__main__":
    from fastres import _extension

    if _extension.why_not_cuda():
        sys.exit(_extension.why_not_cuda())
    DOCS.write_text(table(binary(), _extension.build_info_cuda(), _extension.conv_kernels()))
