"""The Triton kernels without a GPU: every entry of the shipped configuration table compiles well for sm_80, 90 and 100.

The launchers run on meta tensors of real shapes with the launch itself replaced by a recorder, so what is compiled here
is what they would launch on that architecture. One launch for every entry of the table is compiled in the default run,
all dtypes and variants under the marker `full`.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import fastres.kernels  # noqa: E402
from fastres.kernels import add_relu, bn_act, configs, conv_act  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from triton_launches import CONVS, FAST, NCHW, NHWC, REST, WRITTEN, Conv, recorded  # noqa: E402  (skips, too)

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

    # ptxas again, for what it says: registers, spills, warnings (C7510 and C7511: serialised wgmma)
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


def test_every_kernel_has_entries():
    functions = {}
    for info in pkgutil.iter_modules(fastres.kernels.__path__):
        module = importlib.import_module(f"fastres.kernels.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
                functions[name] = inspect.getsource(value.fn)
    kernels = {name for name in functions if name.endswith("_kernel")}
    assert kernels == {kernel for kernel, _ in configs.TABLE}
    for helper in functions.keys() - kernels:  # everything else is called by a kernel
        assert any(f"{helper}(" in text for name, text in functions.items() if name != helper), helper


def test_launch_counts():
    x, v = torch.empty((8, 64, 56, 56), dtype=torch.float16, device="meta"), torch.empty(64, device="meta")

    def count(function, *args, **how):
        with recorded(90) as launches:
            function(*args, **how)
        return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]

    assert count(add_relu.add_relu_forward, x, x, x) == ["add_relu_forward"]
    assert count(add_relu.add_relu_backward, x, x, x) == ["add_relu_backward"]
    sums = ["bn_act_backward_sums", "bn_act_backward_merge"]
    for channels_last in (True, False):
        train, evaluate = ({"channels_last": channels_last, "eps": 1e-5, "act": "relu", "training": t} for t in (1, 0))
        forward = (bn_act.bn_act_forward, x, v, v, x, x, v, v)
        assert count(*forward, **train) == ["bn_statistics", "bn_statistics_merge", "bn_act_forward"]
        assert count(*forward, **evaluate) == ["bn_act_forward"]
        backward = (bn_act.bn_act_backward, x, x, x, v, v, v)
        assert count(*backward, x, v, v, x, **train) == [*sums, "bn_act_backward"]
        assert count(*backward, x, None, None, None, **train) == [*sums, "bn_act_backward"]
        assert count(*backward, x, v, v, x, **evaluate) == sums
        assert count(*backward, None, v, v, x, **train) == sums
        assert count(*backward, x, None, None, x, **evaluate) == ["bn_act_backward"]
        assert count(*backward, None, None, None, x, **train) == ["bn_act_backward"]
        assert count(*backward, None, None, None, None, **train) == []
        with recorded(90) as launches:  # the second pass reads g, which the first has written, and neither y nor dy
            bn_act.bn_act_backward(x, x, x, v, v, v, x, v, v, x, **train)
        assert launches[-1].constant["y_ptr"] is None and launches[-1].constant["dresidual_ptr"] is None


def test_conv_act_is_one_launch_and_empty_outputs_are_none():
    for conv in CONVS:
        with recorded(90) as launches:
            conv.launch(torch.float16, False)
        assert [launch.kernel.__name__ for launch in launches] == ["conv_act_forward_kernel"]
    with recorded(90) as launches:
        Conv(0, 64, 56, 64).launch(torch.float16, False)
    assert launches == []


def test_resnets_convolutions_are_not_refused():
    """Every convolution of ResNet-18 to 152 in both layouts; of ResNeXt-50 32x4d the groups of fewer than 16 are."""
    for stage, width in enumerate((64, 128, 256, 512)):
        size, c = 56 >> stage, max(width // 2, 64)
        convs = [Conv(2, 3, 224, 64, kernel=7, stride=2)]
        for k, outer, stride in ((width, 4 * width, 1), (width, 4 * width, 2)):
            convs += [Conv(2, c, size, k, kernel=3, stride=stride), Conv(2, 4 * c, size, k, stride=stride)]
            convs += [
                Conv(2, k, size, k, kernel=3),
                Conv(2, k, size, outer),
                Conv(2, 4 * c, size, outer, stride=stride),
            ]
        for conv in convs:
            for format in (NHWC, NCHW):
                with recorded(80) as launches:
                    replace(conv, x_format=format, y_format=format, weight_format=format).launch(torch.float32, True)
                assert len(launches) == 1
        x = torch.empty(2, 2 * width, size, size, device="meta")
        weight = torch.empty(2 * width, width // 16, 3, 3, device="meta")
        reasons = conv_act.why_not(x, weight, (1, 1), (1, 1), (1, 1), 32)
        assert bool(reasons) == (width // 16 < 16) and all("a matrix product needs 16" in r for r in reasons)


def test_refusals_of_conv_act_are_sentences():
    def reasons(x, weight, padding=(0, 0), groups=1):
        return conv_act.why_not(x, weight, (1, 1), padding, (1, 1), groups)

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight = meta(2, 16, 8, 8), meta(16, 16, 3, 3)
    assert reasons(x, weight) == []
    assert "2-d convolutions" in reasons(x[0], weight)[0]
    assert "torch.float64" in reasons(x.double(), weight.double())[0]
    assert "torch.float16" in reasons(x, weight.half())[0]
    assert "strides" in reasons(meta(2, 16, 8, 9)[..., ::2], weight)[0]
    assert reasons(x, meta(32, 16, 3, 6)[..., ::2]) == []  # weights of any strides
    assert "groups of 1 to 1 channels" in reasons(x, meta(16, 1, 3, 3), groups=16)[0]
    assert "plane" in reasons(meta(1, 16, 2**16, 2**15), meta(16, 16, 1, 1))[0]
    assert "products" in reasons(meta(1, 2**21, 32, 32), meta(1, 2**21, 32, 32))[0]


def test_gemms_of_newer_geforces_take_sm_80_s_entries():
    wide = configs.Gemm(2**20, 128, 64, groups=1, vectors=True, residual=True, precision="")
    table = {arch: configs.TABLE["conv_act_forward_kernel", arch]["wide"] for arch in configs.ARCHITECTURES}
    for arch, known in ((0, 80), (80, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80), (121, 80)):
        assert configs.gemm("conv_act_forward_kernel", arch, wide) == table[known]


def test_an_unknown_architecture_takes_the_nearest_older_entry():
    rows = {a: configs.TABLE["bn_statistics_kernel", a]["rows"] for a in configs.ARCHITECTURES}
    for arch, known in ((0, 80), (75, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 100)):
        assert configs.config("bn_statistics_kernel", arch, "rows") is rows[known]


def test_row49_import_queries_no_device_and_only_by_its_own_name():
    code = "import torch, fastres.kernels.add_relu, fastres.kernels.bn_act; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    path = Path(fastres.kernels.__file__)
    spec = importlib.util.spec_from_file_location("kernels", path)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)  # transformers imports what it takes for that package: no error here,
    with pytest.raises(AttributeError, match="this is fastres.kernels, found as 'kernels'"):
        _ = other.get_kernel  # but nothing is found in it
