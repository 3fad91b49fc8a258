"""The Triton kernels without a GPU: every entry of the shipped configuration table compiles well for sm_80, 90 and 100.

What is compiled here is what the launchers would launch (triton_launches.py). One launch for every entry of the table
is compiled in the default run, all dtypes and variants under the marker `full`.
"""

import re
import subprocess

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from fastres.kernels import configs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from triton_launches import CONVS, DTYPES, SHAPES, TYPES, launch_everything, recorded  # noqa: E402

BACKWARD = "add_relu_backward_kernel", "bn_act_backward_sums_kernel", "bn_act_backward_kernel"
WRITTEN = dict.fromkeys(("add_relu_forward_kernel", "bn_act_forward_kernel"), ("y_ptr",))
WRITTEN |= dict.fromkeys(BACKWARD, ("dx_ptr", "dresidual_ptr"))


def all_launches():
    found = {}
    for arch in configs.ARCHITECTURES:
        for dtype in DTYPES:
            with recorded(arch) as launches:
                for shape, channels_last in SHAPES:
                    launch_everything(shape, channels_last, dtype)
                for conv in CONVS:
                    for tf32 in {False, dtype == DTYPES[0]}:
                        conv.launch(dtype, tf32)
            found.update(dict.fromkeys(launches))
    return list(found)


def one_for_each_entry(launches):
    """The launch with most tensors of every entry, the dtypes in turn."""
    chosen = {}
    for launch in launches:
        chosen.setdefault(launch.entry, []).append(launch)
    for i, (entry, choices) in enumerate(sorted(chosen.items())):
        wanted = TYPES[DTYPES[i % 3]]
        of_type = [c for c in choices if c.element_type == wanted] or choices
        chosen[entry] = max(of_type, key=lambda c: sum(t[0] == "*" for _, t in c.signature))
    return list(chosen.values())


ALL = all_launches()
FAST = one_for_each_entry(ALL)
REST = [x for x in ALL if x not in set(FAST)]
FULL = pytest.mark.full


def parameters(kernels):
    """pytest's parameters: the kernels' launches, those that are not in the default run marked."""
    default, full = ([x for x in xs if x.kernel.__name__.startswith(kernels)] for xs in (FAST, REST))
    return [pytest.param(x, id=str(x)) for x in default] + [pytest.param(x, id=str(x), marks=FULL) for x in full]


def compiled_well(launch, tmp_path):
    """-> what Triton makes of a launch, its PTX, its registers; asserts what holds for every kernel."""
    aligned = {(i,): [["tt.divisibility", 16]] for i, (_, t) in enumerate(launch.signature) if t[0] == "*"}
    source = ASTSource(launch.kernel, dict(launch.signature), launch.constant, aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=options)
    ptx = compiled.asm["ptx"]

    # ptxas again, for what it says: registers, spills, warnings (C7510 and C7511: serialized wgmma)
    (tmp_path / "kernel.ptx").write_text(ptx)
    command = [get_ptxas(launch.arch).path, "-v", f"--gpu-name={sm_arch_from_capability(launch.arch)}"]
    command += [str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "kernel.cubin")]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spilled = int(re.search(r"Used (\d+) registers", log)[1]), re.findall(r"(\d+) bytes spill", log)
    assert spilled and not any(map(int, spilled)) and not re.search(r"(?i)warning|C751[01]", log), log

    assert ".f64" not in ptx, "double precision from a Python float"
    assert not re.search(r"\b(max|min)\.(?!NaN)(?:\w+\.)*b?f(?:16|32)", ptx), "drops NaN"
    # row 1: what leads from a tensor's base to a tile is int64
    assert all(", i64 " in line or "xi64>" in line for line in activation_offsets(launch, compiled))
    return compiled, ptx, registers


@pytest.mark.parametrize("launch", parameters(("add_relu", "bn_")))
def test_compiles_well(launch, tmp_path):
    kernel = launch.kernel
    compiled, ptx, registers = compiled_well(launch, tmp_path)
    assert registers <= 128, f"{registers}: fewer than 512 threads on an SM keep too few bytes in flight"
    # the only comparisons are ReLU's z < 0 and its gradient's y <= 0, or their negations: those that let NaN pass
    compares = set(re.findall(r"setp\.(\w+)\.b?f(?:16|32)", ptx))
    relu = launch.constant.get("RELU", kernel.__name__.startswith("add_relu"))
    masked = any(n == "y_ptr" and t[0] == "*" for n, t in launch.signature) and "backward" in kernel.__name__
    if "forward" in kernel.__name__:
        assert compares <= {"lt", "geu"} and (not relu or compares)
    else:
        assert compares <= {"le", "gtu"} and (not masked or compares)

    if "merge" not in kernel.__name__:
        assert_vector_access(launch, ptx)
        assert len(activation_offsets(launch, compiled)) >= len(launch.activations())


# what every architecture multiplies matrices with, and the shared memory of a program: 80 stands for 86, 89 and 120 too
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize("launch", parameters(("conv_act",)))
def test_convolutions_compile_well(launch, tmp_path):
    compiled, ptx, _ = compiled_well(launch, tmp_path)
    assert compiled.metadata.shared <= SHARED[launch.arch]
    assert len(activation_offsets(launch, compiled)) >= len(launch.activations())

    kind, precision, act = launch.element_type.removeprefix("*"), launch.constant["PRECISION"], launch.constant["ACT"]
    multiplies = re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[.\w:]*", ptx)
    if (kind, precision) == ("fp32", "ieee"):
        assert not multiplies and "fma.rn.f32" in ptx
    else:
        assert multiplies and all(m.startswith(PRODUCTS[launch.arch]) for m in multiplies), set(multiplies)
        types = {"fp32": "tf32", "fp16": "f16", "bf16": "bf16"}
        # tcgen05 has the types in a descriptor, and a kind for both 16-bit ones
        wanted = r"\.kind::(tf32|f16)" if launch.arch == 100 else rf"\.{types[kind]}\.{types[kind]}\b"
        assert all(re.search(wanted, m) for m in multiplies), set(multiplies)

    compares = set(re.findall(r"setp\.(\w+)\.b?f(?:16|32)", ptx))  # with 0, and with 6: those that let NaN pass
    zero, six = {"lt", "geu"}, {"gt", "leu"}
    assert compares <= {"relu": zero, "relu6": zero | six, "hardswish": zero | six}.get(act, set())
    assert bool(compares) == (act not in ("none", "silu"))

    if "odd" not in launch.shape_class:
        assert_pipelined_vectors(launch, ptx)


def assert_pipelined_vectors(launch, ptx):
    """Both operands come through cp.async 16 or 8 bytes at a time, for every stage of the pipeline; y likewise."""
    constant, size = launch.constant, 4 if launch.element_type == "*fp32" else 2
    width = min(16, size * constant["UNIT"])
    lanes = (constant["BLOCK_M"], constant["BLOCK_N"])
    copies = sum(lane * constant["BLOCK_K"] * size // width // (32 * launch.num_warps) for lane in lanes)
    found = len(re.findall(rf"cp\.async\.c[ag]\.shared\.global [^;]*, 0x{width:x}, ", ptx))
    assert found >= copies * (launch.num_stages - 1), f"{found} of {copies} copies of {width} bytes a stage"
    outputs = constant["BLOCK_M"] * constant["BLOCK_N"] * size // (32 * launch.num_warps)
    width = min(16, size * constant["OUT_UNIT"], outputs)
    words = {16: r"\.v4\.b32", 8: r"\.v2\.b32"}[width]
    assert len(re.findall(rf"st\.global[\w.:]*{words}\b", ptx)) >= outputs // width


def activation_offsets(launch, compiled):
    """The TTIR's lines that move a base pointer of an activation, or one spread over a tile's rows."""
    names, ttir = "|".join(launch.activations()) or "none", compiled.asm["ttir"]
    names = "|".join([names, *re.findall(rf"^ *%(\w+) = tt\.splat %(?:{names}) ", ttir, re.MULTILINE)])
    return re.findall(rf"^.*tt\.addptr %(?:{names}), .*$", ttir, re.MULTILINE)


def assert_vector_access(launch, ptx):
    """Every tensor is read and written 16 bytes at a time, or by what divides its lines."""
    constant, size = launch.constant, 4 if launch.element_type == "*fp32" else 2
    tile = constant["BLOCK"] if "BLOCK" in constant else constant["BLOCK_R"] * constant["BLOCK_L"]
    per_thread = tile // (32 * launch.num_warps)
    width = min(16, size * constant.get("UNIT", 16), size * per_thread)
    words = {16: r"\.v4\.b32", 8: r"\.v2\.b32", 4: r"\.b32", 2: r"\.b16"}[width]
    accesses = per_thread * size // width
    written = launch.activations(WRITTEN.get(launch.kernel.__name__, ()))
    read = [n for n in launch.activations() if n not in written]
    for what, tensors in (("ld", read), ("st", written)):
        found = len(re.findall(rf"{what}\.global[\w.:]*{words}\b", ptx))
        assert found >= accesses * len(tensors), f"{found} of {accesses * len(tensors)} {what} of {width} bytes"


def test_every_entry_of_the_table_is_compiled():
    table = {(kernel, arch, c) for (kernel, arch), classes in configs.TABLE.items() for c in classes}
    assert {launch.entry for launch in FAST} == table
