"""The Triton kernels without a GPU: every entry of the shipped configuration table compiles well for sm_80, 90 and 100.

The launchers run on meta tensors of real shapes with the launch itself replaced by a recorder, so what is compiled here
is what they would launch on that architecture. One launch for every entry of the table is compiled in the default run,
all dtypes and variants under the marker `full`.
"""

import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)

import fastres.kernels  # noqa: E402
from fastres.kernels import add_relu, bn_act, configs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
DTYPES = tuple(TYPES)
WRITTEN = {
    "add_relu_forward_kernel": ("y_ptr",),
    "bn_act_forward_kernel": ("y_ptr",),
    **dict.fromkeys(
        ("add_relu_backward_kernel", "bn_act_backward_sums_kernel", "bn_act_backward_kernel"),
        ("dx_ptr", "dresidual_ptr"),
    ),
}


@dataclass(frozen=True)
class Launch:
    """A recorded launch: what Triton's JIT would compile, for aligned tensors."""

    kernel: JITFunction
    arch: int
    shape_class: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    num_warps: int

    @property
    def entry(self):
        return self.kernel.__name__, self.arch, self.shape_class

    @property
    def constant(self):
        return dict(self.constants)

    def activations(self, names=None):
        """The [R, L] tensors among the arguments, or those of them that are in `names`."""
        per_channel = ("weight_ptr", "bias_ptr", "mean_ptr", "var_ptr", "scratch_ptr", "coefficients_ptr")
        return [n for n, t in self.signature if t[0] == "*" and n not in per_channel and (names is None or n in names)]

    @property
    def element_type(self):
        return next(t for n, t in self.signature if n in (self.activations() or [n]) and t[0] == "*")

    def __str__(self):
        absent = [n.removesuffix("_ptr") for n, v in self.constants if v is None]
        blocks = [str(v) for v in self.constant.values() if type(v) is int]
        without = "-without-" + "-".join(absent) if absent else ""
        name, kind = self.kernel.__name__.removesuffix("_kernel"), self.element_type.removeprefix("*")
        return f"{name}-sm{self.arch}-{self.shape_class}-{kind}-{'x'.join(blocks)}{without}"


@contextmanager
def recorded(arch):
    """Launches on meta tensors inside are appended to the list, as for that architecture."""
    launches, looked_up, real_config = [], {}, configs.config

    def config(kernel, at, shape_class):
        looked_up[kernel] = shape_class
        return real_config(kernel, at, shape_class)

    def run(self, *args, grid, warmup, num_warps, **constants):
        assert not warmup and len(grid) == 1 and 0 < grid[0] < 2**31
        bound = dict(zip(self.arg_names, args, strict=False)) | constants
        assert list(bound) == self.arg_names
        signature, fixed = [], []
        for parameter in self.params:
            name, value = parameter.name, bound[parameter.name]
            if parameter.is_constexpr or value is None:
                signature.append((name, "constexpr"))
                fixed.append((name, value))
            elif isinstance(value, torch.Tensor):
                signature.append((name, TYPES[value.dtype]))
            elif isinstance(value, float):
                signature.append((name, "fp32"))
            else:
                assert parameter.do_not_specialize, f"{self.__name__} is compiled again for some values of {name}"
                signature.append((name, "i32" if value < 2**31 else "i64"))
        name = self.__name__
        launches.append(Launch(self, arch, looked_up[name], tuple(signature), tuple(fixed), num_warps))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(configs, "config", config)
        for module in (add_relu, bn_act):
            patch.setattr(module, "architecture", lambda x: arch)
        yield launches


# (shape, channels_last): stages of ResNets at batch 256, small and odd ones, more than 2^31 elements
SHAPES = [
    ((256, 256, 56, 56), True),
    ((256, 256, 56, 56), False),
    ((256, 512, 7, 7), False),
    ((256, 1024, 14, 14), False),
    ((64, 3, 224, 224), True),
    ((1, 64, 14, 14), True),
    ((2, 64, 16, 16), False),
    ((1, 64, 7, 7), True),
    ((4096, 256, 56, 56), True),
]


def launch_everything(shape, channels_last, dtype):
    x = torch.empty(shape, dtype=dtype, device="meta")
    v = torch.empty(shape[1], dtype=torch.float32, device="meta")
    if channels_last:  # flat: the layout changes nothing
        add_relu.add_relu_forward(x, x, x)
        add_relu.add_relu_backward(x, x, x)
    layout = {"channels_last": channels_last, "eps": 1e-5}
    for relu in (True, False):
        act, y, w, r = ("relu", x, v, x) if relu else ("none", None, None, None)
        for training in (True, False):
            how = layout | {"training": training, "act": act}
            bn_act.bn_act_forward(x, w, w, r, x, v, v, **how)
            bn_act.bn_act_backward(x, x, y, w, v, v, x, v, v, r, **how)
        how = layout | {"training": True, "act": act}
        bn_act.bn_act_backward(x, x, y, w, v, v, None, v, v, None, **how)  # a frozen input
        bn_act.bn_act_backward(x, x, y, w, v, v, None, None, v, x, **how)  # sum g alone
    bn_act.bn_act_backward(x, x, x, v, v, v, x, None, None, None, **layout, training=True, act="relu")
    bn_act.bn_act_backward(x, x, x, v, v, v, x, None, None, x, **layout, training=False, act="relu")  # frozen weights
    bn_act.bn_act_backward(x, x, x, v, v, v, None, None, None, x, **layout, training=True, act="relu")


def all_launches():
    found = {}
    for arch in configs.ARCHITECTURES:
        for dtype in DTYPES:
            for shape, channels_last in SHAPES:
                with recorded(arch) as launches:
                    launch_everything(shape, channels_last, dtype)
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
PARAMS = [pytest.param(x, id=str(x), marks=marks) for xs, marks in ((FAST, ()), (REST, pytest.mark.full)) for x in xs]


@pytest.mark.parametrize("launch", PARAMS)
def test_compiles_well(launch, tmp_path):
    kernel = launch.kernel
    aligned = {(i,): [["tt.divisibility", 16]] for i, (_, t) in enumerate(launch.signature) if t[0] == "*"}
    source = ASTSource(kernel, dict(launch.signature), launch.constant, aligned)
    target = GPUTarget("cuda", launch.arch, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": launch.num_warps})
    ptx = compiled.asm["ptx"]

    # ptxas again, for what it says: registers, spills, warnings (C7510 and C7511: serialised wgmma)
    (tmp_path / "kernel.ptx").write_text(ptx)
    command = [get_ptxas(launch.arch).path, "-v", f"--gpu-name={sm_arch_from_capability(launch.arch)}"]
    command += [str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "kernel.cubin")]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spilled = int(re.search(r"Used (\d+) registers", log)[1]), re.findall(r"(\d+) bytes spill", log)
    assert spilled and not any(map(int, spilled)) and not re.search(r"(?i)warning|C751[01]", log), log
    assert registers <= 128, f"{registers}: fewer than 512 threads on an SM keep too few bytes in flight"

    assert ".f64" not in ptx, "double precision from a Python float (eps)"
    assert not re.search(r"\b(max|min)\.(?!NaN)(?:\w+\.)*b?f(?:16|32)", ptx), "drops NaN"
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
    # row 1: what leads from a tensor's base to a tile is int64
    assert all(", i64 " in line for line in activation_offsets(launch, compiled))


def activation_offsets(launch, compiled):
    """The TTIR's lines that move a base pointer of an activation."""
    names = "|".join(launch.activations()) or "none"
    return re.findall(rf"^.*tt\.addptr %(?:{names}), .*$", compiled.asm["ttir"], re.MULTILINE)


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
