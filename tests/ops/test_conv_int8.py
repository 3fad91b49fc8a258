"""The int8 operators: exact against integers in float64, and every way that runs them against the reference."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastres.ops  # noqa: F401
from fastres._dispatch import OPERATORS, Argument
from fastres._extension import build_info, native_cpu  # noqa: F401  (`run_on` asks the module)
from fastres.ops import _int8_conv as conv
from guards import run_on

LAST = torch.channels_last
OPS = torch.ops.fastres
# N, C, H, W, K, kernel, stride, padding, dilation, groups
CASES = {
    "stem": (2, 3, 15, 17, 16, 7, 2, 3, 1, 1),
    "one channel": (1, 1, 9, 8, 8, 3, 1, 1, 1, 1),
    "two channels": (2, 2, 7, 9, 5, 3, 1, 1, 1, 1),
    "1x1": (2, 40, 6, 7, 24, 1, 1, 0, 1, 1),
    "1x1 stride": (1, 32, 9, 9, 48, 1, 2, 0, 1, 1),
    "3x3": (2, 32, 8, 9, 32, 3, 1, 1, 1, 1),
    "3x3 stride": (3, 17, 9, 7, 19, 3, 2, 1, 1, 1),
    "dilated": (1, 16, 9, 9, 16, 3, 1, 2, 2, 1),
    "grouped": (2, 24, 7, 7, 36, 3, 1, 1, 1, 3),
    "depthwise": (2, 32, 8, 8, 32, 3, 2, 1, 1, 32),
    "depthwise dilated": (1, 24, 9, 9, 24, 3, 1, 2, 2, 24),
    "padding beyond the kernel": (1, 16, 5, 5, 8, 3, 1, 4, 1, 1),
    "one pixel": (4, 32, 1, 1, 16, 1, 1, 0, 1, 1),
    "one output": (2, 8, 5, 5, 1, 3, 1, 1, 1, 1),
}
# x's zero point, the residual's or None, act, y's scale (times the output's deviation) and zero point or None
EPILOGUES = {
    "relu": (0, None, "relu", 0),
    "zero points": (121, None, "none", 77),
    "relu6": (9, None, "relu6", 0),
    "hardswish": (0, None, "hardswish", 30),
    "silu": (0, None, "silu", 30),
    "residual": (0, 0, "relu", 0),
    "residual with a zero point": (130, 101, "none", 90),
    "float32": (13, None, "none", None),
}


def drawn(shape, low, high, dtype):
    return torch.randint(low, high, shape, dtype=torch.int32).to(dtype)


def arguments(case, epilogue, batch=None):
    """Arguments of conv_int8 in channels_last."""
    n, c, h, w, k, kernel, stride, padding, dilation, groups = CASES[case]
    zero, other, act, y_zero = EPILOGUES[epilogue]
    x = drawn((batch or n, c, h, w), 0, 256, torch.uint8).contiguous(memory_format=LAST)
    weight = drawn((k, c // groups, kernel, kernel), -127, 128, torch.int8)
    scale, bias = torch.rand(k) * 1e-3 + 1e-4, torch.randn(k)
    where = [stride] * 2, [padding] * 2, [dilation] * 2, groups
    z = F.conv2d(x.double() - zero, weight.double(), None, *where) * (0.02 * scale.double())[:, None, None]
    residual = None
    if other is not None:
        residual = drawn(z.shape, 0, 256, torch.uint8).contiguous(memory_format=LAST)
    y_scale = None if y_zero is None else float((z.std() + 1) / 40)
    head = x, weight, scale, bias, residual, 0.02, zero, 0.03, other or 0
    return (*head, *where, act, y_scale, y_zero)


def integers(x, weight, scale, bias, residual, x_scale, x_zero, r_scale, r_zero, *rest):
    """The output before it is rounded, in float64: every product and sum of integers is exact there."""
    *where, act, y_scale, y_zero = rest
    acc = F.conv2d(x.double() - x_zero, weight.double(), None, *where)
    assert torch.equal(acc, acc.round())
    z = acc * (x_scale * scale.double())[:, None, None] + bias.double()[:, None, None]
    if residual is not None:
        z = z + (residual.double() - r_zero) * r_scale
    acts = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu, "none": lambda t: t}
    return acts[act](z)


def assert_rounds(y, a, y_scale, y_zero):
    """`y` is `a` rounded: to the other side only where `a` is a tie but for float32's rounding."""
    assert y.is_contiguous(memory_format=LAST)
    if y_scale is None:
        torch.testing.assert_close(y.double(), a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
        return
    exact = a / y_scale + y_zero
    off = (y.double() - exact.round().clamp(0, 255)).abs()
    tie = ((exact - exact.floor()) - 0.5).abs() < 1e-4 * exact.abs().clamp_min(1)
    assert bool((off[~tie] == 0).all()) and bool((off <= 1).all()), f"off by {off.max()}, {int((off > 0).sum())} wrong"


def bound(args):
    """The call as a frozen network runs it: the default way, and over the residual where there is that."""
    choices = OPERATORS["conv_int8"].bind(*args)
    assert choices is not None
    prepared = next(iter(choices.ways.values()))()
    ways = [prepared] + ([prepared.instead] if prepared.instead is not None else [])

    def call(way):
        given = [a.clone(memory_format=torch.preserve_format) if isinstance(a, torch.Tensor) else a for a in args]
        return way.function(*(given[a.place] if isinstance(a, Argument) else a for a in way.args))

    return [call(way) for way in ways]


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("case", CASES)
def test_the_reference_and_onednn_are_the_integer_model(case, epilogue):
    if not conv.has_onednn():
        pytest.skip("this torch has no int8 convolution of oneDNN's")
    for batch in (1, 5):
        args = arguments(case, epilogue, batch)
        a, scales = integers(*args), args[-2:]
        assert_rounds(OPS.conv_int8.default(*args), a, *scales)
        refused = case == "padding beyond the kernel" and EPILOGUES[epilogue][0]
        if conv.weight_limit() == 127 and not refused:
            for y in bound(args):
                assert_rounds(y, a, *scales)


def test_windows_of_padding_alone_are_not_onednns():
    """With a zero point its border is wrong there (oneDNN 3.10): the reference runs them."""
    args = arguments("padding beyond the kernel", "zero points")
    assert OPERATORS["conv_int8"].bind(*args) is None
    assert OPERATORS["conv_int8"].bind(*args[:6], 0, *args[7:]) is not None


def test_a_residual_is_written_over_only_where_that_is_asked_for():
    args = arguments("3x3", "residual")
    before = args[4].clone()
    prepared = OPERATORS["conv_int8"].bind(*args).ways[conv.ONEDNN]()
    y = prepared.function(*(args[a.place] if isinstance(a, Argument) else a for a in prepared.args))
    assert torch.equal(args[4], before) and y.data_ptr() != args[4].data_ptr()
    over = prepared.instead.function(*(args[a.place] if isinstance(a, Argument) else a for a in prepared.instead.args))
    assert over.data_ptr() == args[4].data_ptr() and torch.equal(over, y)


def test_any_layout_of_x():
    args = arguments("3x3", "zero points")
    y = bound(args)[0]
    other = (args[0].contiguous(), *args[1:])
    assert torch.equal(bound(other)[0], y) and torch.equal(OPS.conv_int8.default(*other), OPS.conv_int8.default(*args))


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "AVX2_VNNI", "AVX512_CORE_VNNI"])
def test_cpus_without_vnni_have_smaller_weights(isa):
    """oneDNN asked for another CPU: where sums of two products saturate, that is found, and never computed with."""
    code = f"""
import sys
sys.path[:0] = {[p for p in sys.path if "tests" in p]!r}
import torch
torch.manual_seed(0)
import test_conv_int8 as tests
from fastres.ops import _int8_conv as conv
limit = conv.weight_limit()
print("limit", limit)
args = tests.arguments("3x3", "relu")
if limit == 64:
    assert tests.OPERATORS["conv_int8"].bind(*args) is None
args = (args[0], args[1].clamp(-limit, limit), *args[2:])
for y in tests.bound(args):
    tests.assert_rounds(y, tests.integers(*args), *args[-2:])
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    if "VNNI" not in isa:
        assert "limit 64" in done.stdout


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_and_dequantize(layout, dtype):
    for shape in ((2, 3, 9, 37), (1, 1, 1, 1), (3, 64, 5, 5), (1, 17, 40, 16)):
        x = (torch.randn(shape) * 3).to(dtype).contiguous(memory_format=layout)
        for scale, zero in ((0.03, 0), (0.0171, 117), (1e-4, 255), (5.0, 3)):
            want = ((x.float() * (1 / scale)).round() + zero).clamp(0, 255).to(torch.uint8)
            for y in (OPS.quantize.default(x, scale, zero), way("quantize", x, scale, zero)):
                assert torch.equal(y, want) and y.is_contiguous(memory_format=LAST)
            back = (want.float() - zero) * scale
            for y in (OPS.dequantize.default(want, scale, zero, torch.float32), way("dequantize", want, scale, zero)):
                assert torch.equal(y, back) and y.dtype is torch.float32


def way(name, x, *rest):
    """The call as a frozen network runs it."""
    rest = (*rest, torch.float32) if name == "dequantize" else rest
    choices = OPERATORS[name].bind(x, *rest)
    if choices is None:
        assert native_cpu() is None
        return OPERATORS[name].call(x, *rest)
    prepared = next(iter(choices.ways.values()))()
    return prepared.function(*(x if isinstance(a, Argument) else a for a in prepared.args))


def test_quantize_saturates_and_has_a_rule_for_nan():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.5, 1.5, 2.5, -0.0])
    want = torch.tensor([0, 255, 0, 255, 0, 0, 2, 2, 0], dtype=torch.uint8)
    for y in (OPS.quantize.default(x, 1.0, 0), way("quantize", x.view(1, 1, 1, -1), 1.0, 0).view(-1)):
        assert torch.equal(y, want)


@pytest.mark.parametrize("channels", [1, 3, 16, 70, 200])
def test_pools_are_exact(channels):
    x = drawn((2, channels, 13, 11), 0, 256, torch.uint8).contiguous(memory_format=LAST)
    for window in (([3, 3], [2, 2], [1, 1]), ([2, 2], [2, 2], [0, 0]), ([3, 5], [1, 2], [1, 2])):
        for ceil in (False, True):
            given = x, *window, [1, 1], ceil
            want = F.max_pool2d(x.double(), *window, 1, ceil).to(torch.uint8)
            for y in (OPS.max_pool_int8.default(*given), way("max_pool_int8", *given)):
                assert torch.equal(y, want)
    for scales in ((0.1, 0, None, None), (0.1, 101, None, None), (0.1, 0, 0.07, 0), (0.1, 101, 0.03, 90)):
        a = (x.double() - scales[1]).sum((2, 3), keepdim=True) * (scales[0] / (13 * 11))
        want = a.float() if scales[2] is None else ((a / scales[2]).round() + scales[3]).clamp(0, 255).to(torch.uint8)
        ys = OPS.mean_int8.default(x, *scales), way("mean_int8", x, *scales)
        assert torch.equal(*ys)
        assert int((ys[0].double() - want.double()).abs().gt(1e-5 if scales[2] is None else 1).sum()) == 0


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets(isa):
    calls = """
    [tests.test_pools_are_exact(channels) for channels in (3, 70)]
    [tests.test_quantize_and_dequantize(f, tests.torch.float32) for f in (tests.LAST, tests.torch.contiguous_format)]
    tests.test_quantize_saturates_and_has_a_rule_for_nan()
    """
    run_on(isa, "test_conv_int8", calls)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_the_first_convolution_with_its_quantizing(channels, layout):
    """In blocks of 2x2 pixels and apart: kernels of odd and even size, padding on every side."""
    for kernel, padding, size in ((7, 3, (20, 23)), (3, 1, (9, 8)), (6, 2, (40, 21)), (5, 0, (7, 5)), (4, 5, (3, 3))):
        x = torch.randn(3, channels, *size).contiguous(memory_format=layout)
        weight = drawn((16, channels, kernel, kernel), -64, 65, torch.int8)
        scale, bias = torch.rand(16) * 1e-3 + 1e-4, torch.randn(16)
        where, columns = ([2, 2], [padding] * 2, [1, 1], 1), (size[1] + 2 * padding - kernel) // 2 + 1
        for act, y_scale, y_zero in (("relu", 0.05, 0), ("none", 0.05, 120), ("none", None, None)):
            args = x, weight, scale, bias, 0.03, 119, *where, act, y_scale, y_zero
            want = OPS.quantize_conv_int8.default(*args)
            q = OPS.quantize.default(x, 0.03, 119)
            a = integers(q, weight, scale, bias, None, 0.03, 119, 1.0, 0, *where, act, y_scale, y_zero)
            assert_rounds(want, a, y_scale, y_zero)
            choices = OPERATORS["quantize_conv_int8"].bind(*args)
            if choices is None:
                assert channels > 4 and (padding > kernel or columns == 1)  # what oneDNN computes wrong
                continue
            apart = {"apart"} if padding < kernel and columns > 1 else set()
            assert set(choices.ways) == apart | ({"blocks"} if channels <= 4 else set())
            for prepare in choices.ways.values():
                assert_rounds(prepare().function(x), a, y_scale, y_zero)


# ---- opcheck, stock operators ----------------------------------------------------------------------------------------


def test_opcheck():
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x = torch.randn(2, 3, 5, 7)
    q = OPS.quantize.default(x, 0.02, 100)
    opcheck(OPS.quantize.default, (x, 0.02, 100), test_utils=checks)
    opcheck(OPS.dequantize.default, (q, 0.02, 100, torch.float32), test_utils=checks)
    opcheck(OPS.max_pool_int8.default, (q, [3, 3], [2, 2], [1, 1], [1, 1], False), test_utils=checks)
    opcheck(OPS.mean_int8.default, (q, 0.02, 100, 0.01, 3), test_utils=checks)
    stem = torch.randn(2, 3, 9, 9), torch.ones(4, 3, 3, 3, dtype=torch.int8), torch.ones(4), torch.zeros(4), 0.02, 100
    rest = [2, 2], [1, 1], [1, 1], 1, "relu", 0.5, 0
    opcheck(OPS.quantize_conv_int8.default, (*stem, *rest), test_utils=checks)
    for epilogue in ("zero points", "residual", "float32"):
        opcheck(OPS.conv_int8.default, arguments("3x3 stride", epilogue), test_utils=checks)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_stock_operators_give_the_same(epilogue):
    args = arguments("3x3 stride", epilogue)
    y = OPERATORS["conv_int8"].stock(*args)
    assert_rounds(y.contiguous(memory_format=LAST), integers(*args), *args[-2:])
    q = args[0]
    window = [3, 3], [2, 2], [1, 1], [1, 1], False
    assert torch.equal(OPERATORS["max_pool_int8"].stock(q, *window), OPS.max_pool_int8.default(q, *window))
    scales = 0.1, 7, 0.05, 3
    off = OPERATORS["mean_int8"].stock(q, *scales).int() - OPS.mean_int8.default(q, *scales).int()
    assert int(off.abs().max()) <= 1


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "error", "words"),
    [
        (0, torch.zeros(2, 17, 9, 7), TypeError, "x: got dtype torch.float32, expected torch.uint8"),
        (0, torch.zeros(2, 5, 9, 7, dtype=torch.uint8), ValueError, "x: got shape"),
        (0, torch.zeros(2, 17, 0, 7, dtype=torch.uint8), ValueError, "too small for the kernel"),
        (1, torch.zeros(19, 17, 3, 3), TypeError, "weight: got torch.float32"),
        (2, torch.zeros(3), ValueError, "weight_scale: got"),
        (3, torch.zeros(3), ValueError, "bias: got"),
        (5, 0.0, ValueError, "x_scale: got 0.0, expected a positive finite number"),
        (6, 256, ValueError, "x_zero: got 256, expected an integer from 0 to 255"),
        (9, [0, 1], ValueError, r"stride: got \(0, 1\), expected two numbers of at least 1"),
        (10, [-1, 0], ValueError, r"padding: got \(-1, 0\)"),
        (13, "gelu", ValueError, "act: got 'gelu'"),
    ],
)
def test_refusals(place, value, error, words):
    args = list(arguments("3x3 stride", "relu"))
    args[place] = value
    for call in (OPS.conv_int8.default, OPERATORS["conv_int8"].bind):  # a file's arguments come to both
        with pytest.raises(error, match=words):
            call(*args)
    with pytest.raises(TypeError, match="quantize: x: got dtype torch.uint8"):
        OPS.quantize.default(torch.zeros(1, dtype=torch.uint8), 1.0, 0)
