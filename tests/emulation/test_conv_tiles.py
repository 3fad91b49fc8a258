"""The CUDA C++ backend of conv_act without a GPU: what it must not refuse and what it must, how a kernel is chosen, and
what the measured table does to the order of backends."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conv_cases import convolutions
from emulation import on_gpu
from fastres import _dispatch, _extension
from fastres.ops import _conv_backends, _conv_tiles
from fastres.ops._conv_backends import Conv, output_size, why_not_conv_cuda
from fastres.ops._conv_tiles import Problem
from fastres.ops.conv_act import _kind, conv_act
from referee import assert_as_good
from shapes import CONVS

OPERATOR = _dispatch.OPERATORS["conv_act"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d")
NETWORKS += ("densenet121", "densenet161", "densenet201")
needs_kernels = pytest.mark.skipif(
    not _conv_tiles.kernels(),
    reason=f"no CUDA convolutions here: {_extension.why_not_cuda() or 'built without CUTLASS'}",
)


def problem(n=8, size=(14, 14), c=64, k=64, kernel=3, stride=1, padding=1, dilation=1, **others):
    """A square convolution on a GPU of compute capability 9.0 in fp16."""
    pair = [(v, v) if isinstance(v, int) else v for v in (kernel, stride, padding, dilation)]
    p, q = output_size(size, *pair)
    shape = n, *size, c, k, *pair[0], p, q, *pair[1], *pair[2], *pair[3]
    how = {"capability": (9, 0), "dtype": torch.float16, "residual": False} | others
    return Problem(how["capability"], how["dtype"], shape, how["residual"])


def call(n, size, weight, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, act="relu", **others):
    how = {"channels_last": True, "empty": False, "residual": False, "tf32": True} | others
    return Conv(how["channels_last"], how["empty"], (n, *size), weight, stride, padding, dilation, groups, act,
                how["residual"], how["tf32"])  # fmt: skip


# ---- refusals --------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_of_known_networks_is_taken(name, gpu):
    """The must-not-refuse table, asked of CUTLASS's own can_implement: all but the stem and grouped ones."""
    layers, refused = convolutions(name), set()
    assert len(layers) > 15
    for capability, dtype, n in itertools.product([(9, 0), (8, 0), (12, 0)], DTYPES, (1, 32, 256)):
        gpu(capability)
        for size, m in layers:
            weight = tuple(m.weight.shape)
            kind = call(n, size, weight, m.stride, m.padding, m.dilation, m.groups, residual=n == 32)
            reasons = why_not_conv_cuda(on_gpu(dtype), kind)
            if not reasons:
                continue
            refused.add((weight, m.groups))
            large = n * weight[0] * size[0] * size[1] * dtype.itemsize >= 2**31
            sentence = "groups: the kernels have 1" if m.groups > 1 else "x has 3 channels: must be a multiple of"
            if weight[1] == 3 or m.groups > 1:
                assert sentence in reasons[0], reasons
            else:  # the older kernels have 32-bit offsets
                assert large and capability != (9, 0) and "must be smaller than 2 GiB" in reasons[0], (reasons, weight)
    assert {(w, g) for w, g in refused if w[1] == 3 or g > 1} == {
        (tuple(m.weight.shape), m.groups) for _, m in layers if m.weight.shape[1] == 3 or m.groups > 1
    }


@needs_kernels
def test_refusals_are_sentences(gpu):
    gpu()
    taken = call(8, (14, 14), (64, 64, 3, 3), padding=(1, 1))
    assert why_not_conv_cuda(on_gpu(), taken) == []
    for kind, dtype, words in (
        (call(8, (14, 14), (64, 64, 3, 3), channels_last=False), torch.float16, "NCHW: the kernels read channels_last"),
        (call(8, (14, 14), (64, 2, 3, 3), groups=32), torch.float16, "32 groups: the kernels have 1"),
        (call(8, (14, 14), (64, 64, 3, 3), act="silu"), torch.float16, "act is 'silu': the kernels have relu, none"),
        (call(8, (14, 14), (64, 64, 3, 3), tf32=False), torch.float32, "TF32, which torch.backends.cudnn forbids"),
        (call(8, (14, 14), (64, 64, 3, 3), empty=True), torch.float16, "an empty tensor runs through the reference"),
        (call(8, (14, 14), (64, 3, 3, 3)), torch.float16, "x has 3 channels: must be a multiple of 8, 16 bytes"),
        (call(8, (14, 14), (65, 64, 3, 3)), torch.float16, "y has 65 channels: must be a multiple of 8, 16 bytes"),
        (call(8, (14, 14), (66, 64, 3, 3)), torch.float32, "y has 66 channels: must be a multiple of 4, 16 bytes"),
        (call(2**20, (64, 64), (64, 64, 1, 1)), torch.float16, "every side must be below 2^31"),
        (call(8, (14, 14), (64, 64, 3, 3)), torch.float64, "dtype torch.float64 runs through the reference"),
    ):
        (reason,) = why_not_conv_cuda(on_gpu(dtype), kind)
        assert words in reason, reason
    assert why_not_conv_cuda(on_gpu(), call(8, (14, 14), (64, 64, 3, 3), act="none")) == []
    assert why_not_conv_cuda(on_gpu(torch.float32), call(8, (14, 14), (68, 4, 3, 3))) == []
    assert why_not_conv_cuda(torch.empty(1), taken) == ["x is on cpu, the kernel runs on cuda"]


@needs_kernels
def test_where_the_copy_engine_cannot_gather_the_older_kernels_do():
    far = problem(size=(300, 300), kernel=3, padding=130)
    can, reasons = _conv_tiles.taken_by(far)
    assert {kernel.architecture for kernel in can} == {80}
    assert reasons == ("padding of 130 for a kernel that reaches over 3 pixels: too far to be gathered",)
    wide = problem(size=(300, 300), stride=9)
    assert {kernel.architecture for kernel in _conv_tiles.taken_by(wide)[0]} == {80}
    assert "a stride of 9" in _conv_tiles.taken_by(wide)[1][0]
    assert _conv_tiles.why_not(far) == [] and _conv_tiles.why_not(wide) == []


def test_a_build_without_cutlass_says_how_to_get_it(monkeypatch, gpu):
    gpu()
    monkeypatch.setattr(_conv_tiles, "kernels", lambda: ())
    (reason,) = why_not_conv_cuda(on_gpu(), call(8, (14, 14), (64, 64, 3, 3)))
    assert "built without CUTLASS's headers: pip install --no-deps nvidia-cutlass" in reason


@pytest.mark.parametrize("allowed", [True, False])
def test_row43_cudnns_switch_rules_by_either_interface(allowed):
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
        assert _conv_backends.tf32_allowed() is allowed  # allow_tf32 would raise here
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
        assert _conv_backends.tf32_allowed() is allowed


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A table of these entries: (problem, milliseconds by name)."""

    def make(*rows):
        entries = [
            {"arch": 90, "dtype": str(p.dtype)[6:], "shape": list(p.shape), "residual": p.residual, "ms": ms}
            for p, ms in rows
        ]
        path = tmp_path / "measured.json"
        path.write_text(json.dumps({"schema": _conv_tiles.SCHEMA, "schema_version": 1, "entries": entries}))
        monkeypatch.setattr(_conv_tiles, "MEASURED", _conv_tiles.load(path))
        _conv_tiles.choose.cache_clear()

    yield make
    _conv_tiles.choose.cache_clear()


@needs_kernels
def test_the_fastest_measured_kernel_is_taken_also_for_sizes_nearby(measured):
    here = problem(n=32)
    guess = _conv_tiles.choose(here, 132).name
    other = next(k.name for k in _conv_tiles.taken_by(here)[0] if k.name != guess)
    measured((here, {"cudnn": 2.0, "triton": 3.0, guess: 1.5, other: 1.0}))
    assert _conv_tiles.choose(here, 132).name == other
    assert _conv_tiles.choose(problem(n=64), 132).name == _conv_tiles.choose(problem(n=16), 132).name == other
    for elsewhere in (problem(n=65), problem(n=15), problem(n=32, c=72), problem(n=32, residual=True)):
        assert _conv_tiles._nearest(elsewhere) == {}
    assert _conv_tiles._nearest(problem(n=32, capability=(8, 0))) == {}


@needs_kernels
def test_a_measured_kernel_that_this_build_lacks_is_passed_over(measured):
    here = problem(n=32)
    guess = _conv_tiles.choose(here, 132).name
    measured((here, {"cudnn": 2.0, "triton": 3.0, "sm90_gone": 0.5}))
    assert _conv_tiles.choose(here, 132).name == guess
    assert _conv_tiles.measured_order(here) == ("cudnn", "triton", "cuda")


@needs_kernels
def test_the_measured_order_of_backends(measured, gpu, monkeypatch):
    here, kernel = problem(n=32), _conv_tiles.choose(problem(n=32), 132).name
    gpu()
    kind = call(32, (14, 14), (64, 64, 3, 3), padding=(1, 1))
    monkeypatch.setattr(OPERATOR, "chosen", {})
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert OPERATOR.order["cuda"] == ("cudnn", "triton", "cuda") and _conv_backends.measured(on_gpu(), kind) == ()
    assert _dispatch._choose(OPERATOR, "auto", on_gpu(), kind).name == "cudnn"
    measured((here, {"cudnn": 2.0, "triton": 3.0, kernel: 1.0}))
    assert _conv_backends.measured(on_gpu(), kind) == ("cuda", "cudnn", "triton")
    assert _dispatch._choose(OPERATOR, "auto", on_gpu(), kind).name == "cuda"
    measured((here, {"cudnn": 0.5, "triton": 3.0, kernel: 1.0}))
    assert _dispatch._choose(OPERATOR, "auto", on_gpu(), kind).name == "cudnn"
    measured((here, {"cudnn": 2.0, kernel: 1.0}))  # Triton was not, or was wrong: last
    assert _conv_backends.measured(on_gpu(), kind) == ("cuda", "cudnn", "triton")
    measured((here, {"cudnn": 2.0}), (replace(here, dtype=torch.float32), {"cudnn": 2.0, "triton": 1.0}))
    assert _conv_backends.measured(on_gpu(), kind) == ()
    assert _conv_backends.measured(on_gpu(torch.float32), kind) == ("triton", "cudnn", "cuda")
    assert _conv_backends.measured(on_gpu(torch.float32), replace(kind, tf32=False)) == ()
    grouped = call(32, (14, 14), (64, 2, 3, 3), groups=32)
    assert _conv_backends.measured(on_gpu(), grouped) == ()
    assert _conv_backends.measured(torch.empty(1), replace(kind, stride=(2, 2))) == ()  # a CPU's is no table: its model


@needs_kernels
def test_without_measurements_the_bounds_choose():
    """Not one kernel for everything: small tiles where pixels are few, large ones where products bound it."""
    by_batch = {}
    for n in (1, 256):
        for c in (c for c in CONVS if c.inputs > 3):
            p = problem(n, (c.size, c.size), c.inputs, c.outputs, c.kernel, c.stride, c.padding, residual=c.residual)
            kernel = _conv_tiles.choose(p, 132)
            by_batch.setdefault(n, []).append(kernel)
            assert kernel.runs_on((9, 0)) and kernel.element == "float16"
            ideal = 2 * p.pixels * c.outputs * c.inputs * c.kernel**2 / 4096 / 132
            assert _conv_tiles.cost(kernel, p, 132) >= ideal
            assert _conv_tiles.choose(replace(p, capability=(8, 0)), 108).architecture == 80
    few = [k.pixels * k.channels for k in by_batch[1] if not k.splits_depth]
    assert max(few) <= 128 * 64 and any(k.splits_depth for k in by_batch[1])
    assert all(k.pixels * k.channels >= 128 * 64 for k in by_batch[256])
    assert len({k.name for k in by_batch[256]}) >= 4


BAD = [
    ({"schema": "x"}, "expected the schema 'fastres.conv', version 1"),
    ({"entries": {}}, "entries: got dict, expected a list"),
    ({"entries": [3]}, "entries[0]: got int, expected an object"),
    ({"arch": "90"}, "arch, dtype: got '90', 'float16'"),
    ({"dtype": "float64"}, "arch, dtype: got 90, 'float64'"),
    ({"shape": [1, 2]}, "shape: got [1, 2], expected 15 sizes"),
    ({"shape": [-1] * 15}, "expected 15 sizes"),
    ({"residual": 1}, "residual: got 1, expected true or false"),
    ({"ms": {}}, "ms: got {}, expected milliseconds by name"),
    ({"ms": {"cudnn": 0}}, "ms: got {'cudnn': 0}"),
    ({"twice": True}, "is there twice"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_a_file_that_is_wrong_names_what_is(change, words, tmp_path):
    entry = {"arch": 90, "dtype": "float16", "shape": [1] * 15, "residual": False, "ms": {"cudnn": 1.0}}
    data = {"schema": "fastres.conv", "schema_version": 1, "entries": [entry]}
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(data))
    assert len(_conv_tiles.load(path)) == 1
    if "twice" in change:
        data["entries"] = [entry, entry]
    else:
        (data if change.keys() & data.keys() else entry).update(change)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError) as error:
        _conv_tiles.load(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_what_ships_is_right_and_no_file_is_no_measurement(tmp_path):
    assert _conv_tiles.load(tmp_path / "none.json") == {}
    assert _conv_tiles.MEASURED == _conv_tiles.load(_conv_tiles.PATH)


def test_choices_of_inputs_that_never_repeat_are_forgotten(monkeypatch):
    monkeypatch.setattr(_dispatch, "_CHOSEN", 8)
    monkeypatch.setattr(OPERATOR, "chosen", {})
    weight = torch.randn(4, 4, 1, 1)
    for size in range(2, 30):
        x = torch.empty(1, 4, size, size)
        _dispatch.choose(OPERATOR, "auto", x, _kind(x, weight))
    assert 0 < len(OPERATOR.chosen) <= 8


# ---- the call --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch, gpu):
    """The native operator on CPU tensors, by PyTorch's own convolution; what it was called with."""
    calls = []

    def native(x, weight, bias, residual, *where_act_tile):
        *where, act, tile = where_act_tile
        calls.append(SimpleNamespace(x=x, weight=weight, bias=bias, residual=residual, tile=tile, act=act))
        z = F.conv2d(x, weight, bias, where[:2], where[2:4], where[4:])
        return _conv_backends.ACTIVATIONS[act](z if residual is None else z.add_(residual))

    gpu()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.ops.fastres._conv_act_native, "default", native)
    return calls


@needs_kernels
@pytest.mark.parametrize("act", _conv_tiles.ACTS)
def test_the_kernel_gets_dense_aligned_channels_last_tensors(stand_in, act):
    """Whatever the layout and the address of weight, bias and residual: copied where they have to be, not else."""
    last = torch.channels_last
    x = torch.randn(2, 16, 9, 7).contiguous(memory_format=last)
    flat = torch.randn(24 * 16 * 9 + 1)
    weights = torch.randn(24, 16, 3, 3), torch.randn(24, 16, 3, 3).contiguous(memory_format=last)
    weights += (flat[1:].view(24, 3, 3, 16).permute(0, 3, 1, 2),)  # 4 bytes off
    for weight, kind in itertools.product(weights, ("nchw", "last", "off", None)):
        residual = torch.randn(2, 24, 5, 4)
        if kind == "off":
            residual = torch.randn(2 * 24 * 20 + 1)[1:].view(2, 5, 4, 24).permute(0, 3, 1, 2)
        elif kind == "last":
            residual = residual.contiguous(memory_format=last)
        bias = torch.randn(25)[1:] if kind else None
        residual = residual if kind else None
        how = (2, 2), (1, 1), (1, 1), 1
        arguments = x, weight, bias, residual
        y = _conv_backends.cuda(*arguments, None, _kind(*arguments, None, *how, act))
        z = F.conv2d(x, weight, bias, *how)
        torch.testing.assert_close(y, _conv_backends.ACTIVATIONS[act](z if residual is None else z + residual))
        got = stand_in[-1]
        for t in (got.x, got.weight, got.residual):
            assert t is None or (t.is_contiguous(memory_format=last) and t.data_ptr() % 16 == 0)
        assert got.bias is None or (got.bias.is_contiguous() and got.bias.data_ptr() % 16 == 0)
        assert got.x is x and (got.weight is weight) == (weight is weights[1]) and got.act == act
        assert _conv_tiles.kernels()[got.tile].element == "float32"
        if kind == "last":
            assert got.residual is residual


@needs_kernels
def test_the_operator_is_registered_and_refuses_by_name():
    assert "fastres::_conv_act_native" in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
    with pytest.raises(_dispatch.BackendError, match="conv_act: backend 'cuda' refuses: x is on cpu, the kernel runs"):
        conv_act(x, weight, backend="cuda")
    assert [k.index for k in _conv_tiles.kernels()] == list(range(len(_conv_tiles.kernels())))


def test_the_referee_tells_tf32_from_fp32():
    """What the GPU tests of float32 rest on: TF32 products are no fp32 ones."""
    x, w = torch.randn(2, 64, 8, 8), torch.randn(64, 64, 3, 3)
    rounded = [((t.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32) for t in (x, w)]
    exact = F.conv2d(x.double(), w.double())
    size = F.conv2d(x.double().abs(), w.double().abs())
    with pytest.raises(AssertionError):
        assert_as_good(F.conv2d(*rounded), F.conv2d(x, w), exact, size, "tf32")
    assert_as_good(F.conv2d(*rounded), F.conv2d(*rounded), exact, size, "tf32")
