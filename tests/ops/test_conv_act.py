"""conv_act against conv2d, add, act: forward, backward, opcheck, gradcheck, compile, shapes, refusals."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastres
from conv_cases import (
    EAGER,
    GEOMETRY,
    assert_outputs_and_gradients_agree,
    convolutions,
    eager,
    problem,
    skip_if_refused,
)
from fastres._dispatch import OPERATORS, BackendError
from fastres.functional import conv_act
from fastres.ops._tensors import stats_dtype
from fastres.ops.conv_act import ACTS, _kind
from referee import LAYOUTS, assert_as_good, layout

BACKENDS = ("reference", "cpu", "onednn")
DTYPES = (torch.float32, torch.bfloat16)


WIDTHS = (1, 3, 8, 17, 33, 64, 65)


def pytest_generate_tests(metafunc):
    if "how" in metafunc.fixturenames:
        metafunc.parametrize("how", BACKENDS)


def scales(how):
    """Without a scale per channel and with one, which oneDNN's epilogue does not have."""
    return (False,) if how == "onednn" else (False, True)


def fits(size, geometry):
    kernel, _, padding, dilation = (v if isinstance(v, tuple) else (v, v) for v in geometry)
    return all(n + 2 * p > d * (k - 1) for n, k, p, d in zip(size, kernel, padding, dilation, strict=True))


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_integers_are_exact_over_kernels_strides_paddings_and_dilations(how, geometry):
    for i, (c, k) in enumerate(itertools.product(WIDTHS, repeat=2)):
        size = [(1, 1), (2, 5), (7, 7), (9, 4)][i % 4]
        if not fits(size, geometry):
            size = (11, 13)
        x, weight, bias, residual, call = problem(c, k, size, geometry, integer=True, kind=LAYOUTS[i % 2])
        got = conv_act(x, weight, bias, residual, **call, backend=how)
        want = eager(x.double(), weight.double(), bias.double(), residual.double(), **call)
        assert torch.equal(got.double(), want), (c, k, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_forward_against_fp64(how, dtype, act):
    for (c, k, groups), geometry, residual, bias in itertools.product(
        [(16, 24, 1), (6, 9, 3), (8, 8, 8)], [GEOMETRY[0], GEOMETRY[4], GEOMETRY[6]], (True, False), (True, False)
    ):
        x, weight, b, r, call = problem(c, k, (9, 10), geometry, dtype, groups=groups, residual=residual)
        b = b if bias else None
        skip_if_refused(how, x, weight, b, r, **call, act=act)
        got = conv_act(x, weight, b, r, **call, act=act, backend=how)
        doubles = [None if t is None else t.double() for t in (x, weight, b, r)]
        exact = eager(*doubles, **call, act=act)
        size = eager(*(None if t is None else t.abs() for t in doubles), **call, act="none")
        assert_as_good(got, eager(x, weight, b, r, **call, act=act), exact, size, f"{act} {geometry} {groups}")


def test_row10_nan_and_infinity_as_eager(how):
    values = float("nan"), float("inf"), -float("inf")
    for value, act, kind, scaled in itertools.product(values, ACTS, LAYOUTS[:2], scales(how)):
        x, weight, bias, residual, call = problem(4, 19, (5, 5), (3, 1, 1, 1), kind=kind)
        scale = torch.randn(19) if scaled else None
        x[0, 1, 2, 3] = residual[1, 7, 0, 0] = value
        if scaled:
            scale[3] = bias[5] = value
        got = conv_act(x, weight, bias, residual, scale, **call, act=act, backend=how)
        want = eager(x, weight, bias, residual, scale, **call, act=act)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf()), (value, act)


@pytest.mark.parametrize("wide", [False, True], ids=["own", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("through", ["reference", "cpu"])
def test_forward_with_a_scale_against_fp64(through, dtype, act, wide):
    """One rounding: not worse than eager's convolution, batch norm and addition, which round three times."""
    for (c, k, groups), kind, residual, bias in itertools.product(
        [(16, 24, 1), (6, 9, 3), (3, 1, 1)], LAYOUTS[:2], (True, False), (True, False)
    ):
        x, weight, b, r, call = problem(c, k, (9, 10), GEOMETRY[4], dtype, kind, groups=groups, residual=residual)
        stored = stats_dtype(x) if wide else dtype
        scale, b = torch.randn(k).to(stored), b.to(stored) if bias else None
        got = conv_act(x, weight, b, r, scale, **call, act=act, backend=through)
        assert got.stride() == conv_act(x, weight, None, r, **call, act=act, backend=through).stride()
        doubles = [None if t is None else t.double() for t in (x, weight, b, r, scale)]
        exact = eager(*doubles, **call, act=act)
        size = eager(*(None if t is None else t.abs() for t in doubles), **call, act="none")
        z = F.conv2d(x, weight, None, **call) * scale.to(dtype)[:, None, None]
        z = z if b is None else z + b.to(dtype)[:, None, None]
        assert_as_good(got, EAGER[act](z if r is None else z + r), exact, size, f"{act} {groups}")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_row6_views_and_row8_strides_are_eagers(how, kind):
    for (c, k), size, wkind in itertools.product(
        [(8, 16), (1, 4), (4, 1)], [(6, 5), (1, 1), (1, 4)], ("nchw", "channels_last")
    ):
        x, weight, bias, _, call = problem(c, k, size, (1, 1, 0, 1), kind=kind, residual=False)
        weight = layout(weight, wkind)
        got, want = conv_act(x, weight, bias, **call, backend=how), eager(x, weight, bias, **call)
        assert got.stride() == want.stride(), (c, k, size, wkind)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_row24_the_residual_may_share_storage_with_x_and_nothing_is_changed(how):
    x, weight, bias, _, call = problem(8, 8, (6, 6), (3, 1, 1, 1), residual=False)
    before = x.clone()
    want = eager(x, weight, bias, x, **call)
    torch.testing.assert_close(conv_act(x, weight, bias, x, **call, backend=how), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)
    wide = layout(torch.randn(2, 16, 6, 6), "channels_last")
    halves = wide[:, :8], wide[:, 8:]  # views of one storage
    want = eager(halves[0].clone(), weight, bias, halves[1].clone(), **call)
    got = conv_act(halves[0], weight, bias, halves[1], **call, backend=how)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_row45_bitwise_repeatable(how):
    x, weight, bias, residual, call = problem(33, 17, (9, 9), (3, 2, 1, 1))
    first = conv_act(x, weight, bias, residual, **call, backend=how)
    assert all(torch.equal(conv_act(x, weight, bias, residual, **call, backend=how), first) for _ in range(20))


# ---- backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_row50_gradients_and_only_those_asked_for(how, act):
    *given, call = problem(6, 8, (7, 7), (3, 2, 1, 1), groups=2)
    cases = [(given + [torch.randn(8)] * scaled, 4 + scaled) for scaled in scales(how)]
    for tensors, needs in ((tensors, n) for tensors, count in cases for n in itertools.product((0, 1), repeat=count)):
        ours = [t.clone().requires_grad_(bool(n)) for t, n in zip(tensors, needs, strict=True)]
        theirs = [t.detach().clone().requires_grad_(t.requires_grad) for t in ours]
        got = conv_act(*ours, **call, act=act, backend=how)
        want = eager(*theirs, **call, act=act)
        assert_outputs_and_gradients_agree(got, want, ours, theirs)


def test_row7_gradients_of_every_layout(how):
    x, weight, bias, residual, call = problem(6, 8, (7, 7), (3, 1, 1, 1))
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    plain = torch.randn(2, 8, 7, 7)
    for dy in (plain, layout(plain, "channels_last"), layout(plain, "transposed"), torch.ones(()).expand(2, 8, 7, 7)):
        got = torch.autograd.grad(conv_act(*leaves, **call, backend=how), leaves, dy)
        want = torch.autograd.grad(eager(*leaves, **call), leaves, dy)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_row24_what_changes_after_the_forward_is_noticed():
    x = torch.randn(1, 3, 4, 4, requires_grad=True) * 1
    weight = torch.randn(3, 3, 1, 1, requires_grad=True)
    y = conv_act(x, weight)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("act", ACTS)
def test_opcheck_over_layouts(act):
    for kind, residual in itertools.product(LAYOUTS, (True, False)):
        x, weight, bias, r, _ = problem(3, 5, (5, 6), (3, 2, 1, 1), kind=kind, residual=residual)
        leaves = [t if t is None else t.requires_grad_(act in ("relu", "none")) for t in (x, weight, bias, r)]
        opcheck(torch.ops.fastres.conv_act.default, (*leaves, None, [2, 2], [1, 1], [1, 1], 1, act))


@pytest.mark.parametrize(("act", "scaled"), [("relu", False), ("relu", True), ("none", True)])
def test_row19_gradcheck_to_second_order(act, scaled):
    *given, call = problem(4, 4, (4, 4), (3, 1, 1, 1), torch.float64, groups=2)
    leaves = [t.requires_grad_() for t in given + [torch.randn(4, dtype=torch.float64)] * scaled]
    assert torch.autograd.gradcheck(lambda *a: conv_act(*a, **call, act=act), leaves)
    assert torch.autograd.gradgradcheck(lambda *a: conv_act(*a, **call, act=act), leaves)
    opcheck(torch.ops.fastres.conv_act.default, (*leaves, *[None] * (not scaled), [1, 1], [1, 1], [1, 1], 2, act))


def test_row23_compile_fullgraph_equals_eager_without_recompiles(how, fresh_compiler):
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: conv_act(*a, padding=1, backend=how), fullgraph=True, backend=counter)
    weight, bias, scale = (torch.randn(shape, requires_grad=True) for shape in ((8, 4, 3, 3), (8,), (8,)))
    for scaled, n in itertools.product(scales(how), range(2, 12)):
        x = layout(torch.randn(n, 4, 6, 6), "channels_last").requires_grad_()
        given = x, weight, bias, None, scale if scaled else None
        got, want = compiled(*given), eager(*given, padding=1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        leaves = [t for t in given if t is not None]
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    assert counter.frame_count <= 2 * len(scales(how))
    assert any("fastres.conv_act" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row20_row21_autocast_casts_as_conv2d(dtype):
    x, weight, bias, residual, call = problem(4, 8, (6, 6), (3, 1, 1, 1))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype=dtype):
        got = conv_act(*leaves, residual, **call)
        assert got.dtype == F.conv2d(*leaves, **call).dtype == dtype
        with torch.autocast("cpu", enabled=False):
            assert conv_act(*leaves, **call).dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(got.sum(), leaves)] == [torch.float32] * 3
    torch.testing.assert_close(got.float(), eager(*leaves, residual, **call), rtol=3e-2, atol=0.2)


def test_row20_under_autocast_scale_and_bias_stay_float32():
    x, weight, bias, _, call = problem(4, 8, (6, 6), (3, 1, 1, 1))
    scale = torch.full((8,), 1.001)  # 1 in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = conv_act(x, weight, bias, None, scale, **call)
    want = eager(x.bfloat16(), weight.bfloat16(), bias, None, scale, **call)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("when", ["before", "after", "inside"])
def test_flops_are_counted_whenever_the_counter_is_loaded(when):
    code = f"""
import torch
order = ["import fastres.functional", "from torch.utils.flop_counter import FlopCounterMode"]
for line in order[:: -1 if {when!r} == "before" else 1]:
    exec(line)
x, weight = torch.randn(2, 8, 6, 6), torch.randn(16, 8, 3, 3)
if {when!r} == "after":
    fastres.functional.conv_act(x, weight.requires_grad_(), padding=1)
for _ in range(2):
    with FlopCounterMode(display=False) as counter:
        fastres.functional.conv_act(x, weight, padding=1)
    assert counter.get_total_flops() == 2 * 2 * 16 * 36 * 8 * 9, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- shapes and refusals ---------------------------------------------------------------------------------------------


def test_row3_no_images(how):
    weight = torch.randn(5, 3, 3, 3)
    x = torch.randn(0, 3, 8, 8)
    if how != "reference":
        with pytest.raises(BackendError, match="an empty tensor"):
            conv_act(x, weight, backend=how)
    assert conv_act(x, weight).shape == (0, 5, 6, 6)
    assert conv_act(x.to("meta"), weight.to("meta")).shape == (0, 5, 6, 6)


BAD = [
    ({"x": torch.zeros(4, 6, 6)}, ValueError, "x: got 3 dimensions"),
    ({"x": torch.zeros(2, 4, 6, 6).int()}, TypeError, "x: got dtype torch.int32"),
    ({"x": None}, TypeError, "x: got NoneType"),
    ({"x": torch.zeros(2, 5, 6, 6)}, ValueError, r"weight: got shape \[8, 4, 3, 3\], expected \[K, 5, R, S\]"),
    ({"x": torch.zeros(2, 4, 2, 6)}, ValueError, r"x: got images of 2x6, too small for a 3x3 kernel"),
    ({"weight": torch.zeros(8, 4, 3)}, ValueError, "weight: got 3 dimensions"),
    ({"weight": torch.zeros(8, 4, 0, 3)}, ValueError, "expected a kernel of at least 1x1"),
    ({"weight": torch.zeros(8, 4, 3, 3).half()}, TypeError, "weight: got dtype torch.float16, expected x's dtype"),
    ({"weight": torch.zeros(8, 4, 3, 3, device="meta")}, ValueError, "weight: got device meta, expected x's device"),
    ({"bias": torch.zeros(7)}, ValueError, r"bias: got shape \[7\], expected \[8\]"),
    ({"bias": torch.zeros(8).double()}, TypeError, "bias: got dtype torch.float64"),
    ({"residual": torch.zeros(2, 8, 4, 5)}, ValueError, r"residual: got shape \[2, 8, 4, 5\], expected \[2, 8, 4, 4\]"),
    ({"residual": torch.zeros(2, 8, 4, 4).half()}, TypeError, "residual: got dtype torch.float16"),
    ({"groups": 3}, ValueError, "groups: got 3, expected a divisor of x's 4"),
    ({"groups": 0}, ValueError, "groups: got 0"),
    ({"padding": -1}, ValueError, r"padding: got \(-1, -1\), expected two numbers of at least 0"),
    ({"stride": 0}, ValueError, r"stride: got \(0, 0\)"),
    ({"dilation": (1, 0)}, ValueError, r"dilation: got \(1, 0\)"),
    ({"stride": (1, 1, 1)}, ValueError, r"stride: got \(1, 1, 1\), expected a number or two"),
    ({"bias": torch.zeros(8).half(), "scale": torch.zeros(8)}, TypeError, "bias: got dtype torch.float16, expected"),
    ({"scale": torch.zeros(7)}, ValueError, r"scale: got shape \[7\], expected \[8\], weight's output channels"),
    ({"scale": torch.zeros(8).half()}, TypeError, "scale: got dtype torch.float16, expected x's dtype"),
    ({"scale": torch.zeros(8, device="meta")}, ValueError, "scale: got device meta, expected x's device"),
    ({"act": "gelu"}, ValueError, "act: got 'gelu'"),
    ({"backend": "nope"}, ValueError, "backend: got 'nope'"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input_names_both_sides_on_real_and_meta_tensors(change, error, words):
    given = {"x": torch.randn(2, 4, 6, 6), "weight": torch.randn(8, 4, 3, 3)} | change
    for need in (False, True):
        call = {k: t.clone().requires_grad_() if need and k == "weight" and t.ndim else t for k, t in given.items()}
        with pytest.raises(error, match=words):
            conv_act(**call)
    if "backend" not in change and not any(isinstance(t, torch.Tensor) and t.is_meta for t in change.values()):
        meta = {k: t.to("meta") if isinstance(t, torch.Tensor) else t for k, t in given.items()}
        with pytest.raises(error, match=words):
            conv_act(**meta)


NETWORKS = ("resnet18", "resnet50", "resnet152", "resnext50_32x4d", "mobilenet_v2")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_of_known_networks_is_taken(name):
    """The must-not-refuse table: all of them, in both layouts."""
    found = {(tuple(m.weight.shape), m.stride, m.padding, m.dilation, m.groups) for _, m in convolutions(name)}
    assert len(found) > 8
    for (shape, stride, padding, dilation, groups), residual in itertools.product(found, (True, False)):
        weight = torch.empty(shape, device="meta")
        for kind in ("nchw", "channels_last"):
            x = layout(torch.empty(2, shape[1] * groups, 14, 14), kind)
            r = torch.empty(0) if residual else None
            explanation = fastres.explain("conv_act", x, weight, None, r, None, stride, padding, dilation, groups)
            assert explanation.chosen in ("cpu", "winograd") and not explanation.refusals["onednn"]


def test_refusals_are_sentences():
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    explanation = fastres.explain("conv_act", x, weight)
    assert explanation.refusals["cudnn"] == ["x is on cpu, cuDNN runs on cuda"]
    half = fastres.explain("conv_act", x.bfloat16(), weight)
    assert "16-bit types in NCHW fail inside oneDNN; channels_last works" in half.refusals["onednn"]
    assert half.chosen == "cpu"
    assert fastres.explain("conv_act", x.double(), weight).chosen == "reference"
    with pytest.raises(BackendError, match="conv_act: backend 'onednn' refuses: dtype torch.float64"):
        conv_act(x.double(), weight.double(), backend="onednn")
    assert fastres.explain("conv_act", x, weight, scale=torch.ones(4)).chosen == "cpu"
    with pytest.raises(BackendError, match="conv_act: backend 'onednn' refuses: its epilogue has no scale per channel"):
        conv_act(x, weight, scale=torch.ones(4), backend="onednn")
    with torch.backends.mkldnn.flags(enabled=False):
        missing = fastres.explain("conv_act", x, weight).refusals["onednn"]
        assert missing == ["this build of torch has no oneDNN, or torch.backends.mkldnn.enabled is False"]


@pytest.mark.parametrize(
    ("which", "wanted", "absent"),
    [
        ("cpu", {"aten::conv2d", "fastres::_bn_act_native"}, {"aten::add", "aten::add_", "aten::relu", "aten::relu_"}),
        ("onednn", {"mkldnn::_convolution_pointwise", "aten::relu_"}, {"aten::add", "aten::add_", "aten::conv2d"}),
    ],
)
def test_launch_counts(which, wanted, absent):
    """One convolution; what follows it in one pass in place, no addition of its own."""
    x, weight, bias, residual, call = problem(8, 8, (6, 6), (3, 1, 1, 1))
    skip_if_refused(which, x, weight, bias, residual, **call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        conv_act(x, weight, bias, residual, **call, backend=which)
    names = {event.key: event.count for event in trace.key_averages()}
    assert all(names.get(name) == 1 for name in wanted), names
    assert not absent & set(names), names


@pytest.mark.parametrize("allowed", [True, False])
def test_row43_the_triton_products_follow_cudnns_tf32_switch(allowed, monkeypatch):
    kernels = pytest.importorskip("fastres.kernels.conv_act")
    seen = []
    monkeypatch.setattr(kernels, "conv_act_forward", lambda *args, **how: seen.append(how["tf32"]))
    x, weight, bias, residual, call = problem(8, 8, (6, 6), (1, 1, 0, 1))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
        OPERATORS["conv_act"].backends["triton"].forward(x, weight, bias, residual, None, _kind(x, weight))
    assert seen == [allowed]
