"""The Triton launchers without a GPU: launch counts, refusals, which entry of the table a launch takes, the import."""

import importlib
import importlib.util
import inspect
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import fastres.kernels  # noqa: E402
from fastres.kernels import add_relu, bn_act, configs, conv_act  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from triton_launches import CONVS, NCHW, NHWC, Conv, recorded  # noqa: E402


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


def test_an_unknown_architecture_takes_the_nearest_older_entry():
    rows = {a: configs.TABLE["bn_statistics_kernel", a]["rows"] for a in configs.ARCHITECTURES}
    for arch, known in ((0, 80), (75, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 100)):
        assert configs.config("bn_statistics_kernel", arch, "rows") is rows[known]
    # but matrix products of newer GeForces take sm_80's
    wide = configs.Gemm(2**20, 128, 64, groups=1, vectors=True, residual=True, precision="")
    table = {arch: configs.TABLE["conv_act_forward_kernel", arch]["wide"] for arch in configs.ARCHITECTURES}
    for arch, known in ((0, 80), (80, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80), (121, 80)):
        assert configs.gemm("conv_act_forward_kernel", arch, wide) == table[known]


def test_row49_import_queries_no_device_and_only_by_its_own_name():
    code = "import torch, fastres.kernels.add_relu, fastres.kernels.bn_act; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    path = Path(fastres.kernels.__file__)
    spec = importlib.util.spec_from_file_location("kernels", path)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)  # transformers imports what it takes for that package: no error here,
    with pytest.raises(AttributeError, match="this is fastres.kernels, found as 'kernels'"):
        _ = other.get_kernel  # but nothing is found in it
