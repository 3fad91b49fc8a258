"""add_relu against torch.relu(x + residual): forward, backward, opcheck, gradcheck, compile, shapes, refusals."""

import pytest
import torch
from torch.library import opcheck

import fastres
from fastres._dispatch import BackendError
from fastres.functional import add_relu
from referee import DTYPES, INTERPRETER_DTYPES, LAYOUTS, layout

INF, NAN = float("inf"), float("nan")
SHAPES = [(2, 3, 4, 5), (1, 1, 1, 1), (3, 17, 7, 7), (4, 64, 5, 3), (2, 129, 1, 1), (5, 1, 33, 1)]


def eager(x, residual):
    return torch.relu(x + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_forward_equals_eager_bitwise(backend, dtype, kind):
    if backend == "triton" and dtype not in INTERPRETER_DTYPES:
        pytest.skip("the interpreter's bfloat16 is wrong")
    for shape in SHAPES:
        x, r = layout(torch.randn(shape).to(dtype), kind), torch.randn(shape).to(dtype)
        y, want = add_relu(x, r, backend=backend), eager(x, r)
        assert torch.equal(y, want) and y.stride() == want.stride()


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("kind_r", LAYOUTS)
def test_row7_backward_of_every_layout_pair(backend, kind, kind_r):
    x0, r0 = torch.randn(2, 6, 5, 4), torch.randn(2, 6, 5, 4)
    for kind_dy in ("nchw", "channels_last", "transposed"):
        dy = layout(torch.randn(2, 6, 5, 4), kind_dy)
        got, want = (
            torch.autograd.grad(f(x, r), (x, r), dy)
            for f in (lambda x, r: add_relu(x, r, backend=backend), eager)
            for x, r in [[layout(t, k).requires_grad_() for t, k in ((x0, kind), (r0, kind_r))]]
        )
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)


def test_row10_nan_inf_and_signed_zero_at_every_lane(backend):
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])
    for n in (1, 3, 8, 17, 64, 67):
        for shift in range(0, len(special)):
            x = special.roll(shift).repeat(n)[: n + 9].clone().requires_grad_()
            r = torch.zeros_like(x)
            r[::2] = -0.0
            x2 = x.detach().clone().requires_grad_()
            y, want = add_relu(x, r, backend=backend), eager(x2, r)
            torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(torch.signbit(y), torch.signbit(want))
            dy = torch.randn_like(y)
            y.backward(dy)
            want.backward(dy)
            assert torch.equal(x.grad, x2.grad)  # the mask lets NaN's gradient through, as eager


def test_residual_is_x_and_a_view_of_x(backend):
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    (g,) = torch.autograd.grad(add_relu(x, x, backend=backend).sum(), x)
    assert torch.equal(g, 2.0 * (x > 0))
    view = x.detach().flip(0)[:]
    assert torch.equal(add_relu(x.detach(), view, backend=backend), eager(x.detach(), view))


def test_row24_input_changed_before_backward_is_seen(backend):
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    y = add_relu(x, x.detach(), backend=backend)
    y.mul_(2)  # y is what backward reads
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_the_gradients_asked_for(backend):
    x, r = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2, requires_grad=True)
    add_relu(x, r, backend=backend).sum().backward()
    assert x.grad is None and r.grad is not None


def test_opcheck_forward_and_backward():
    x, r = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    for kind in LAYOUTS:
        opcheck(torch.ops.fastres.add_relu.default, (layout(x.detach(), kind).requires_grad_(), r))
        y = layout(x.detach().relu(), kind)
        for dy in (r, layout(r, "channels_last"), torch.ones(()).expand(2, 3, 4, 5), layout(r, "transposed")):
            opcheck(torch.ops.fastres.add_relu_backward.default, (dy, y))


def test_gradcheck_to_second_order():
    x, r = (torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(add_relu, (x, r))
    assert torch.autograd.gradgradcheck(add_relu, (x, r))


def test_compile_fullgraph_equals_eager(backend):
    x, r = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4)
    step = torch.compile(lambda x, r: add_relu(x * 2, r, backend=backend), fullgraph=True, backend="aot_eager")
    y = step(x, r)
    (got,) = torch.autograd.grad(y.sum(), x)
    (want,) = torch.autograd.grad(eager(x * 2, r).sum(), x)
    assert torch.equal(y, eager(x * 2, r)) and torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3, 3), (0,)])
def test_row3_zero_size(backend, shape):
    x, r = torch.randn(shape, requires_grad=True), torch.randn(shape)
    y = add_relu(x, r, backend=backend)
    y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape and y.stride() == eager(x, r).stride()


def test_vmap_equals_eager():
    x, r = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    assert torch.equal(torch.vmap(add_relu)(x, r), eager(x, r))


def test_meta_tensors_have_shapes():
    x = torch.empty(2, 3, 4, 5, device="meta")
    assert add_relu(x, x).shape == x.shape


@pytest.mark.parametrize(
    ("x", "residual", "error", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3), ValueError, r"residual: got shape \[3\], expected x's shape \[2, 3\]"),
        (torch.zeros(2), torch.zeros(2).half(), TypeError, "residual: got dtype torch.float16, expected x's dtype"),
        (torch.zeros(2).int(), torch.zeros(2).int(), TypeError, "x: got dtype torch.int32"),
        (torch.zeros(2).cfloat(), torch.zeros(2).cfloat(), TypeError, "x: got dtype torch.complex64"),
        (torch.zeros(2), torch.zeros(2, device="meta"), ValueError, "residual: got device meta, expected x's device"),
        ([1.0], torch.zeros(1), TypeError, "x: got list, expected a Tensor"),
        (torch.zeros(1), None, TypeError, "residual: got NoneType, expected a Tensor"),
    ],
)
def test_row50_bad_input_names_argument_got_and_wanted(x, residual, error, words):
    with pytest.raises(error, match=words):
        add_relu(x, residual)


def test_refusals_are_data():
    with pytest.raises(ValueError, match="backend: got 'nope', expected one of"):
        add_relu(torch.zeros(2), torch.zeros(2), backend="nope")
    with pytest.raises(BackendError, match="'cpu' refuses: dtype torch.float64 runs through the reference"):
        add_relu(torch.zeros(2).double(), torch.zeros(2).double(), backend="cpu")
    explanation = fastres.explain("add_relu", torch.zeros(2).double())
    assert explanation.chosen == "reference" and explanation.refusals["cpu"] and "reference" in str(explanation)
