"""conv_act with a scale per channel, a batch norm's: against stock PyTorch and fp64, forward, gradients, refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastres
from conv_cases import EAGER, GEOMETRY, assert_outputs_and_gradients_agree, problem, scaled, skip_if_refused
from fastres._dispatch import BackendError
from fastres.functional import conv_act
from fastres.ops._tensors import stats_dtype
from fastres.ops.conv_act import ACTS
from referee import LAYOUTS, assert_as_good

BACKENDS = pytest.mark.parametrize("how", ["reference", "cpu"])


@BACKENDS
@pytest.mark.parametrize("wide", [False, True], ids=["own", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTS)
def test_forward_with_a_scale_against_fp64(how, dtype, act, wide):
    """One rounding: not worse than eager's convolution, batch norm and addition, which round three times."""
    for (c, k, groups), kind, residual, bias in itertools.product(
        [(16, 24, 1), (6, 9, 3), (3, 1, 1)], LAYOUTS[:2], (True, False), (True, False)
    ):
        x, weight, b, r, call = problem(c, k, (9, 10), GEOMETRY[4], dtype, kind, groups=groups, residual=residual)
        scale, b = torch.randn(k).to(stats_dtype(x) if wide else dtype), b.to(stats_dtype(x)) if wide else b
        b = b if bias else None
        skip_if_refused(how, x, weight, b, r, scale, **call, act=act)
        got = conv_act(x, weight, b, r, scale, **call, act=act, backend=how)
        assert got.stride() == conv_act(x, weight, None, r, **call, act=act, backend=how).stride()
        doubles = [None if t is None else t.double() for t in (x, weight, b, r, scale)]
        exact = scaled(*doubles, **call, act=act)
        size = scaled(*(None if t is None else t.abs() for t in doubles), **call, act="none")
        b, s = (None if t is None else t.to(dtype) for t in (b, scale))
        z = F.conv2d(x, weight, None, **call) * s[:, None, None]
        z = z if b is None else z + b[:, None, None]
        assert_as_good(got, EAGER[act](z if r is None else z + r), exact, size, f"{act} {groups}")


@BACKENDS
def test_row10_nan_and_infinity_with_a_scale(how):
    for value, act, kind in itertools.product((float("nan"), float("inf"), -float("inf")), ACTS, LAYOUTS[:2]):
        x, weight, bias, residual, call = problem(4, 19, (5, 5), (3, 1, 1, 1), kind=kind)
        scale = torch.randn(19)
        scale[3] = bias[5] = x[0, 1, 2, 3] = residual[1, 7, 0, 0] = value
        got = conv_act(x, weight, bias, residual, scale, **call, act=act, backend=how)
        want = scaled(x, weight, bias, residual, scale, **call, act=act)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf()), (value, act)


@pytest.mark.parametrize("act", ACTS)
def test_row50_gradients_with_a_scale_and_only_those_asked_for(act):
    x, weight, bias, residual, call = problem(6, 8, (7, 7), (3, 2, 1, 1), groups=2)
    scale = torch.randn(8)
    for needs in itertools.product((False, True), repeat=5):
        ours = [t.clone().requires_grad_(n) for t, n in zip((x, weight, bias, residual, scale), needs, strict=True)]
        theirs = [t.detach().clone().requires_grad_(n) for t, n in zip(ours, needs, strict=True)]
        got, want = conv_act(*ours, **call, act=act), scaled(*theirs, **call, act=act)
        assert_outputs_and_gradients_agree(got, want, ours, theirs)


@pytest.mark.parametrize("act", ["relu", "none"])
def test_opcheck_and_gradcheck_to_second_order(act):
    x, weight, bias, r, call = problem(4, 4, (4, 4), (3, 1, 1, 1), torch.float64, groups=2)
    leaves = [t.requires_grad_() for t in (x, weight, bias, r, torch.randn(4, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *a: conv_act(*a, **call, act=act), leaves)
    assert torch.autograd.gradgradcheck(lambda *a: conv_act(*a, **call, act=act), leaves)
    opcheck(torch.ops.fastres.conv_act.default, (*leaves, [1, 1], [1, 1], [1, 1], 2, act))


@BACKENDS
def test_row23_compiled_fullgraph(how):
    weight, bias = torch.randn(8, 4, 3, 3, requires_grad=True), torch.randn(8, requires_grad=True)
    x, scale = torch.randn(2, 4, 6, 6), torch.randn(8, requires_grad=True)
    call = {"padding": 1}
    got = torch.compile(lambda *a: conv_act(*a, **call, backend=how), fullgraph=True, backend="aot_eager")(
        x, weight, bias, None, scale
    )
    want = scaled(x, weight, bias, None, scale, **call)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), (weight, bias, scale)) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_row20_under_autocast_scale_and_bias_stay_float32():
    x, weight, bias, _, call = problem(4, 8, (6, 6), (3, 1, 1, 1))
    scale = torch.full((8,), 1.001)  # 1 in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = conv_act(x, weight, bias, None, scale, **call)
    want = scaled(x.bfloat16(), weight.bfloat16(), bias, None, scale, **call)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


BAD = [
    ({"bias": torch.zeros(8).half(), "scale": torch.zeros(8)}, TypeError, "bias: got dtype torch.float16, expected"),
    ({"scale": torch.zeros(7)}, ValueError, r"scale: got shape \[7\], expected \[8\], weight's output channels"),
    ({"scale": torch.zeros(8).half()}, TypeError, "scale: got dtype torch.float16, expected x's dtype"),
    ({"scale": torch.zeros(8, device="meta")}, ValueError, "scale: got device meta, expected x's device"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input_names_both_sides(change, error, words):
    with pytest.raises(error, match=words):
        conv_act(**{"x": torch.randn(2, 4, 6, 6), "weight": torch.randn(8, 4, 3, 3)} | change)


def test_refusals_are_sentences():
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    assert fastres.explain("conv_act", x, weight, scale=torch.ones(4)).chosen == "cpu"
    with pytest.raises(BackendError, match="conv_act: backend 'onednn' refuses: its epilogue has no scale per channel"):
        conv_act(x, weight, scale=torch.ones(4), backend="onednn")
