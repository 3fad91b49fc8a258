"""The CUDA kernels without a GPU, read from the binary: no spills, vector access, no double precision, no atomics.

Also that a build holds code for the architectures it names, and that docs/kernels-cuda.md says what the binary holds.
The convolutions have a file of their own, test_cuda_conv_binary.py.
"""

import re
import shutil

import pytest

import cuda_binary
from fastres import _extension

if _extension.why_not_cuda():
    pytest.skip(f"the compiled CUDA kernels are not here: {_extension.why_not_cuda()}", allow_module_level=True)
if cuda_binary.tool("cuobjdump") is None or shutil.which("c++filt") is None:
    pytest.skip("cuobjdump (Triton's wheel brings it) or c++filt is not here", allow_module_level=True)

BUILD = _extension.build_info_cuda()
WHOLE = cuda_binary.kernels(cuda_binary.binary())
FOUND = {arch: {n: k for n, k in found.items() if not k.is_convolution} for arch, found in WHOLE.items()}
ALL = [pytest.param(kernel, id=f"{arch}-{name}") for arch, found in FOUND.items() for name, kernel in found.items()]
KINDS = ("flat", "statistics", "statistics_merge", "forward", "sums", "sums_merge", "backward")

# Vector loads and stores of a kernel that moves vectors, at the least: tensors read at once times vectors of each in
# flight, and tensors written.
VECTORS = {"flat": (2, 1), "statistics": (4, 0), "forward": (4, 4), "sums": (6, 4), "backward": (4, 4)}


def kind(kernel):
    return kernel.name.partition("_kernel")[0]


def test_the_binary_has_every_kernel_for_the_architectures_it_names():
    named = BUILD["architectures"].replace(" ", ";").split(";")
    assert set(FOUND) == {"sm_" + name.partition("+")[0].replace(".", "") for name in named}
    listed = cuda_binary.run("cuobjdump", "--list-ptx", cuda_binary.binary())
    wanted = {"sm_" + name.partition("+")[0].replace(".", "") for name in named if name.endswith("+PTX")}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", listed)) == wanted
    for found in FOUND.values():
        assert {kind(kernel) for kernel in found.values()} == set(KINDS)
        for element, lanes in (("float", 4), ("Half", 8), ("BFloat16", 8)):
            for name in set(KINDS) - {"statistics_merge", "sums_merge"}:
                variants = [k for k in found.values() if kind(k) == name and re.search(rf"\b{element}\b", k.name)]
                assert {k.lanes for k in variants} == {1, lanes}, (name, element)


@pytest.mark.parametrize("kernel", ALL)
def test_no_spills_no_doubles_no_atomics(kernel):
    assert kernel.stack == 0 and kernel.local == 0
    assert kernel.registers <= 128, "fewer than 512 threads on a multiprocessor keep too few bytes in flight"
    assert kernel.count(r"LDL|STL") == 0, "local memory"
    assert kernel.count(r"D(ADD|MUL|FMA|SETP|MNMX)\b|\w+\.F64") == 0, "double precision"
    assert kernel.count(r"RED|ATOM") == 0, "atomics: the order of a sum would change from run to run"
    assert kernel.count(r"FMNMX") == 0, "a maximum drops NaN: ReLU is a comparison and a select"
    if kind(kernel) in ("flat", "forward", "backward"):
        assert kernel.shared == 0 and kernel.count(r"BAR") == 0


@pytest.mark.parametrize("kernel", [p for p in ALL if kind(p.values[0]) in VECTORS])
def test_vector_access(kernel):
    loads, stores = kernel.count(r"LDG\.E\.128"), kernel.count(r"STG\.E\.128")
    if kernel.lanes == 1:
        assert loads == stores == 0
        return
    least_loads, least_stores = VECTORS[kind(kernel)]
    if kind(kernel) == "flat" and kernel.name.endswith(", 4>"):
        least_loads, least_stores = 8, 4
    if kind(kernel) in ("forward", "backward") and kernel.name.endswith("true>"):  # with a residual; in training
        least_loads = {"forward": 8, "backward": 6}[kind(kernel)]
    assert loads >= least_loads and stores >= least_stores, (loads, stores)


def in_flight(kernel):
    """The vectors that a thread loads before it uses the first; 0 where branches stand between them."""
    if kernel.lanes == 1 or kernel.name.endswith(", 1>"):
        return 0
    return {"flat": 8, "statistics": 4, "forward": 8 if kernel.name.endswith("true>") else 4}.get(kind(kernel), 0)


@pytest.mark.parametrize("kernel", [p for p in ALL if in_flight(p.values[0])])
def test_all_loads_are_under_way_before_the_first_value_is_used(kernel):
    """Between the loads of a row tile there is address arithmetic, no store and no arithmetic on elements.

    A loop may be there twice: for lines that are cut into chunks, and for those that are not.
    """
    at, group = [i for i, name in enumerate(kernel.order) if name.startswith("LDG.E.128")], in_flight(kernel)
    assert at and len(at) % group == 0
    for first in range(0, len(at), group):
        between = kernel.order[at[first] : at[first + group - 1]]
        assert not [name for name in between if re.match(r"(FADD|FMUL|FFMA|FSETP|HADD2|F2FP|STG)", name)]


def test_the_table_in_the_docs_is_the_binary_s():
    if not cuda_binary.DOCS.exists():
        pytest.skip("the tests lie outside a source tree")
    written = cuda_binary.DOCS.read_text()
    if f"CUDA {BUILD['cuda']}," not in written or cuda_binary.DOCUMENTED not in FOUND:
        pytest.skip(f"{cuda_binary.DOCUMENTED} is not built, or not by the table's release of CUDA")
    if not BUILD["cutlass"]:
        pytest.skip("this build has no convolutions")
    table = cuda_binary.table(cuda_binary.binary(), BUILD, _extension.conv_kernels())
    assert written == table, "python tests/emulation/cuda_binary.py writes it again"
