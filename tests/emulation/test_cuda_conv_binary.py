"""The convolutions without a GPU, read from the binary: tensor-core instructions, no serialization, no spills.

ptxas serializes wgmma, with a warning (C7510), where it cannot prove that nobody touches the sums in between: then
there is a wait behind each product. Here there is one behind each step of the depth.
"""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

import cuda_binary
from fastres import _extension

if _extension.why_not_cuda():
    pytest.skip(f"the compiled CUDA kernels are not here: {_extension.why_not_cuda()}", allow_module_level=True)
if cuda_binary.tool("cuobjdump") is None or shutil.which("c++filt") is None:
    pytest.skip("cuobjdump (Triton's wheel brings it) or c++filt is not here", allow_module_level=True)
ROWS = _extension.conv_kernels()
if not ROWS:
    pytest.skip("this build has no convolutions: CUTLASS's headers were not there", allow_module_level=True)

BUILD = _extension.build_info_cuda()
FOUND = cuda_binary.kernels(cuda_binary.binary())
TYPES = {"float16": "F32", "bfloat16": r"F32\.BF16", "float32": r"F32\.TF32"}  # as an instruction's name ends


def of(generation):
    """(row, kernel) of one generation, in every architecture that has it."""
    rows = [row for row in ROWS if row["architecture"] == generation]
    architectures = [arch for arch in FOUND if generation == 80 or arch == "sm_90a"]
    return [
        pytest.param(row, cuda_binary.of_convolution(FOUND[arch], row), id=f"{arch}-{row['element']}-{row['name']}")
        for arch in architectures
        for row in rows
    ]


BOTH = [*of(90), *of(80)]


def products(kernel):
    """Where the tensor-core instructions are in the code."""
    return [i for i, name in enumerate(kernel.order) if re.match("HGMMA|HMMA", name)]


def test_the_binary_has_every_kernel_once_and_no_other():
    for arch, found in FOUND.items():
        rows = [row for row in ROWS if row["architecture"] == 80 or arch == "sm_90a"]
        names = [cuda_binary.of_convolution(found, row).name for row in rows]
        assert sorted(names) == sorted(k.name for k in found.values() if k.is_convolution), arch
    by_chip = {row["architecture"] for row in ROWS}
    assert by_chip == {80, 90} if "sm_90a" in FOUND else by_chip == {80}
    assert len([row for row in ROWS if row["architecture"] == 90]) <= 18, "the build stays below eight minutes"
    for row in ROWS:
        assert row["element"] in TYPES and row["shared_bytes"] <= 232_448


def test_every_type_has_a_kernel_for_many_tiles_and_one_for_few():
    for generation in {row["architecture"] for row in ROWS}:
        for element in TYPES:
            rows = [r for r in ROWS if r["architecture"] == generation and r["element"] == element]
            areas = [r["pixels"] * r["channels"] for r in rows]
            assert max(areas) >= 128 * 128 and min(areas) <= 128 * 64, (generation, element)


@pytest.mark.parametrize(("row", "kernel"), BOTH)
def test_no_spills_no_doubles_no_maximum(row, kernel):
    assert kernel.stack == 0 and kernel.local == 0 and kernel.count(r"LDL|STL") == 0, "local memory"
    assert kernel.count(r"D(ADD|MUL|FMA|SETP|MNMX)\b|\w+\.F64") == 0, "double precision"
    assert kernel.count(r"FMNMX") == 0, "a maximum drops NaN: the bounds are comparisons and selects"
    assert kernel.registers * row["threads"] <= 65536
    if not row["splits_depth"]:
        assert kernel.count(r"RED|ATOM") == 0, "atomics: the order of a sum would change from run to run"


@pytest.mark.parametrize(("row", "kernel"), of(90))
def test_sm90_multiplies_by_wgmma_without_serialization(row, kernel):
    groups = 1 if "pingpong" in row["name"] else 2  # warpgroups on one tile
    step = 32 // {"float16": 2, "bfloat16": 2, "float32": 4}[row["element"]]  # of depth, in one instruction
    each = row["pixels"] // 64 // groups * row["depth"] // step  # instructions of a step
    at = products(kernel)
    assert len(at) == 2 * each, "the loop's start and its body"
    name = rf"HGMMA\.64x{row['channels']}x{step}\.{TYPES[row['element']]}$"
    assert all(re.match(name, kernel.order[i]) for i in at), {kernel.order[i] for i in at}
    assert kernel.count(r"WARPGROUP\.ARRIVE") == 2 and kernel.count(r"WARPGROUP\.DEPBAR") == 2
    for first in (0, each):
        between = kernel.order[at[first] : at[first + each - 1]]
        assert not [name for name in between if re.match(r"WARPGROUP|BAR|SYNCS|F(ADD|MUL|FMA)", name)]
    assert kernel.count(r"USETMAXREG") == 2, "registers go from the warps that load to those that multiply"


@pytest.mark.parametrize(("row", "kernel"), of(90))
def test_sm90_moves_everything_by_the_copy_engine(row, kernel):
    assert kernel.count(r"UTMALDG\.4D\.IM2COL$") == 1, "x, gathered"
    multicast = r"UTMALDG\.4D\.MULTICAST$" if row["cluster"] > 1 else r"UTMALDG\.4D$"
    assert kernel.count(multicast) == 1, "the weights"
    assert kernel.count(r"UTMALDG\.3D") >= 1 and kernel.count(r"UTMASTG\.3D") >= 1, "the residual and y"
    if not row["splits_depth"]:
        assert kernel.count(r"STG") == 0 and kernel.count(r"LDG") <= 16, "the bias alone is read by threads"
    # y is written by threads and read by the copy engine: a fence of each thread between
    assert kernel.count(r"FENCE\.VIEW\.ASYNC") >= kernel.count(r"UTMASTG")


@pytest.mark.parametrize(("row", "kernel"), of(80))
def test_sm80_multiplies_by_mma_sync_from_asynchronous_copies(row, kernel):
    instruction = "1688" if row["element"] == "float32" else "16816"
    at = products(kernel)
    assert all(re.match(rf"HMMA\.{instruction}\.{TYPES[row['element']]}$", kernel.order[i]) for i in at)
    depth = 8 if row["element"] == "float32" else 16
    warps = row["threads"] // 32
    assert len(at) == row["pixels"] // 16 * row["channels"] // 8 * row["depth"] // depth // warps
    assert kernel.count(r"LDGSTS\.E.*\.128$") == kernel.count("LDGSTS") > 0, "16 bytes at a time"
    assert kernel.count(r"LDSM\.16\.M88\.4") > 0 and kernel.count(r"STG\.E\.128") > 0
    assert kernel.registers <= 255


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_ptxas_has_nothing_to_say():
    """No warning C7510 (wgmma serialized) or C7508 (setmaxnreg ignored), nor any other; no spill."""
    root = cuda_binary.DOCS.parent.parent
    source = Path(find_spec("cutlass_library").origin).parents[1] / "cutlass_library/source"
    folders = root / "csrc", source / "include", source / "tools/util/include"
    command = ["nvcc", *BUILD["flags"].split(), "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", *(f"-I{folder}" for folder in folders)]
    command += ["-o", "/dev/null", str(root / "csrc/cuda/conv_sm90_64x128.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "warning" not in said.lower() and said.count("0 bytes spill stores, 0 bytes spill loads") == 2, said[-3000:]


def test_the_parsers_see_a_serialized_loop():
    """A wait behind each product, as ptxas leaves it where it serializes, fails the test above."""
    row, kernel = of(90)[0].values
    at = set(products(kernel))
    order = [part for i, name in enumerate(kernel.order) for part in [name, *["WARPGROUP.DEPBAR.LE"] * (i in at)]]
    counts = kernel.instructions + cuda_binary.Counter({"WARPGROUP.DEPBAR.LE": len(at)})
    bad = cuda_binary.Kernel(kernel.name, 98, 0, 0, 0, counts, tuple(order))
    with pytest.raises(AssertionError):
        test_sm90_multiplies_by_wgmma_without_serialization(row, bad)
