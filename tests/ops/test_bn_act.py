"""bn_act against batch_norm, add, relu: forward, backward, opcheck, gradcheck, compile, shapes, refusals.

The module contract (momentum, tracking, counters) is in test_bn_act_contract.py.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastres
from fastres._dispatch import BackendError
from fastres.functional import bn_act
from referee import DTYPES, INTERPRETER_DTYPES, LAYOUTS, assert_as_good, backward64, forward64, layout, statistics64

EPS = 1e-5
ROW9_CHANNELS = (1, 2, 3, 5, 7, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 1000)


def eager(x, mean, var, weight, bias, residual=None, act="relu", training=True):
    y = F.batch_norm(x, mean, var, weight, bias, training, 0.1, EPS)
    y = y if residual is None else y + residual
    return F.relu(y) if act == "relu" else y


def problem(shape, dtype=torch.float32, kind="nchw", residual=True, kind_r=None, affine=True, spread=1.0, center=0.0):
    """(x, running mean, running var, weight, bias, residual); statistics and parameters in fp32."""
    c = shape[1]
    x = layout((torch.randn(shape) * spread + center).to(dtype), kind)
    r = layout(torch.randn(shape).to(dtype), kind_r or kind) if residual else None
    weight, bias = (torch.randn(c), torch.randn(c)) if affine else (None, None)
    return x, torch.randn(c) + center, torch.rand(c) + 0.5, weight, bias, r


def exact(inputs, dy, y, act, training):
    """{name: (value, sum of the absolute values of its terms)} in fp64; the ReLU's mask is that of the tested y."""
    x, mean, var, weight, bias, residual = inputs
    mean, var = statistics64(x) if training else (mean, var)
    forward = {"y": forward64(x, weight, bias, residual, mean, var, EPS, act)}
    return forward | backward64(dy, x, y, weight, mean, var, training, EPS, act)


def run(f, inputs, dy):
    x, mean, var, *params = inputs
    leaves = [None if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in (x, *params)]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    mean, var = mean.clone(), var.clone()
    y = f(leaves[0], mean, var, *leaves[1:])
    y.backward(dy)
    grads = [None if t is None else t.grad for t in leaves]
    return dict(zip(("y", "dx", "dweight", "dbias", "dresidual"), (y.detach(), *grads), strict=True)), (mean, var)


def check(inputs, act, training, backend, dy_kind="nchw"):
    x = inputs[0]
    dy = layout(torch.randn(x.shape).to(x.dtype), dy_kind)
    ours, ours_stats = run(
        lambda x, m, v, w, b, r: bn_act(x, m, v, w, b, r, act=act, training=training, eps=EPS, backend=backend),
        inputs,
        dy,
    )
    theirs, their_stats = run(lambda *a: eager(*a, act=act, training=training), inputs, dy)
    wanted, their_wanted = (exact(inputs, dy, found["y"], act, training) for found in (ours, theirs))
    for name, got in ours.items():
        if got is None:
            assert theirs[name] is None, name
            continue
        # each against fp64 with its own mask: a rounding at z = 0 may fall on either side
        eager_as_ours = (theirs[name].double() - their_wanted[name][0] + wanted[name][0]).to(got.dtype)
        assert_as_good(got, eager_as_ours, *wanted[name], f"{name} {list(x.shape)} {x.dtype}")
    assert ours["y"].stride() == theirs["y"].stride()
    for got, want in zip(ours_stats, their_stats, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_against_fp64(backend, dtype, act, training):
    if backend == "triton" and dtype not in INTERPRETER_DTYPES:
        pytest.skip("the interpreter's bfloat16 is wrong")
    for shape, kind, residual in itertools.product([(3, 8, 5, 6), (2, 17, 7, 7)], LAYOUTS, [True, False]):
        check(problem(shape, dtype, kind, residual), act, training, backend)


@pytest.mark.parametrize("channels", ROW9_CHANNELS)
def test_row9_any_number_of_channels(backend, channels):
    for (h, w), kind in itertools.product([(1, 1), (1, 3), (7, 7)], ("nchw", "channels_last")):
        check(problem((3, channels, h, w), kind=kind), "relu", True, backend)


def test_row7_every_pair_of_layouts(backend):
    for kind, kind_r, kind_dy in itertools.product(LAYOUTS[:3], LAYOUTS[:3], ("nchw", "channels_last", "transposed")):
        check(problem((2, 6, 5, 4), kind=kind, kind_r=kind_r), "relu", True, backend, kind_dy)


def test_row6_views_equal_their_contiguous_copies_bitwise(backend):
    for kind in LAYOUTS:
        x, mean, var, weight, bias, r = problem((3, 9, 6, 5), kind=kind)
        base = "channels_last" if kind == "channels_last" else "nchw"
        got = bn_act(x, mean, var, weight, bias, r, training=True, backend=backend)
        want = bn_act(layout(x, base), mean, var, weight, bias, layout(r, base), training=True, backend=backend)
        assert torch.equal(got, want)
    expanded = torch.randn(1, 9, 1, 5).expand(3, 9, 6, 5)
    got = bn_act(expanded, None, None, training=True, backend=backend)
    assert torch.equal(got, bn_act(expanded.contiguous(), None, None, training=True, backend=backend))


def test_integer_valued_input_is_exact(backend):
    """Statistics and outputs that binary fractions hold exactly: no index, tail or padding error can hide."""
    for (n, c, h, w), kind in itertools.product(
        [(2, 5, 4, 4), (4, 33, 2, 2), (2, 65, 8, 1)], ("nchw", "channels_last")
    ):
        x = torch.randint(-8, 9, (n, c, h, w)).float()
        x = torch.cat([x, -x])  # mean exactly 0
        mean, var = torch.zeros(c), torch.full((c,), 3.75)
        weight, bias = torch.randint(-3, 4, (c,)).float(), torch.randint(-3, 4, (c,)).float()
        r = torch.randint(-8, 9, x.shape).float()
        y = bn_act(layout(x, kind), mean, var, weight, bias, layout(r, kind), eps=0.25, backend=backend)
        want = (x / 2 * weight[:, None, None] + bias[:, None, None] + r).relu()
        assert torch.equal(y, want)


def test_row11_cancellation_and_constant_channels(backend):
    for center, spread, kind in itertools.product([1e4, 1e6], [1.0, 0.1], ("nchw", "channels_last")):
        x = layout(torch.randn(4, 5, 9, 11) * spread + center, kind)
        want = torch.var(x.double(), (0, 2, 3), correction=0)
        _, _, var = torch.ops.fastres.bn_act(x, None, None, None, None, None, True, EPS, "none", backend)
        theirs = torch.zeros(5)
        F.batch_norm(x, torch.zeros(5), theirs, training=True, momentum=1.0)
        n = x.numel() / 5
        error, eager_error = (var.double() / want - 1).abs(), (theirs.double() * (n - 1) / n / want - 1).abs()
        assert (error <= 4 * eager_error.max() + 1e-6).all(), f"{error} against eager's {eager_error}"
    if backend == "reference":
        return  # eager's own kernel rounds a constant channel
    bias = torch.randn(5)
    constant = torch.full((2, 5, 3, 3), 7.25)
    y = bn_act(constant, None, None, torch.randn(5), bias, act="none", training=True, backend=backend)
    assert torch.equal(y, bias[:, None, None].expand_as(y))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_row10_row12_nan_and_inf_pattern_is_eagers(backend, value):
    for kind, training in itertools.product(("nchw", "channels_last"), (True, False)):
        x, mean, var, weight, bias, r = problem((2, 19, 3, 3), kind=kind)
        for c in range(19):
            poisoned = x.clone()
            poisoned[1, c, 2, c % 3] = value
            got = bn_act(poisoned, mean.clone(), var.clone(), weight, bias, r, training=training, backend=backend)
            want = eager(poisoned, mean.clone(), var.clone(), weight, bias, r, training=training)
            torch.testing.assert_close(got.isnan(), want.isnan(), msg=f"{c} {kind} {training}")
            torch.testing.assert_close(got.isinf(), want.isinf())


def test_row12_half_that_overflows_in_a_half_sum(backend):
    x = torch.full((4, 3, 16, 16), 6.0e4).half()
    x[::2] = 5.0e4
    y = bn_act(x, None, None, act="none", training=True, backend=backend)
    torch.testing.assert_close(y.float().abs(), torch.ones(4, 3, 16, 16), rtol=2e-3, atol=0)


def test_row24_residual_is_x_and_version_errors(backend):
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    bn_act(x, None, None, residual=x, training=True, backend=backend).square().sum().backward()
    eager(x2, None, None, None, None, x2).square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    z = torch.randn(2, 4, 3, 3, requires_grad=True) * 1
    y = bn_act(z, None, None, training=True, backend=backend)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_row45_bitwise_repeatable(backend):
    inputs = problem((4, 33, 9, 7), kind="channels_last")
    dy = torch.randn(4, 33, 9, 7)
    runs = [run(lambda *a: bn_act(*a, training=True, backend=backend), inputs, dy)[0] for _ in range(20)]
    for other in runs[1:]:
        assert all(torch.equal(other[name], runs[0][name]) for name in other)


def test_row50_only_the_gradients_asked_for(backend):
    x, mean, var, weight, bias, r = problem((2, 5, 3, 3))
    for needs in itertools.product([False, True], repeat=4):
        leaves = [t.clone().requires_grad_(n) for t, n in zip((x, weight, bias, r), needs, strict=True)]
        y = bn_act(leaves[0], mean.clone(), var.clone(), *leaves[1:], training=True, backend=backend)
        want_leaves = [t.detach().clone().requires_grad_(n) for t, n in zip(leaves, needs, strict=True)]
        want = eager(want_leaves[0], mean.clone(), var.clone(), *want_leaves[1:])
        if any(needs):
            y.sum().backward()
            want.sum().backward()
        for got, expected in zip(leaves, want_leaves, strict=True):
            assert (got.grad is None) == (expected.grad is None)
            if got.grad is not None:
                torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", "none"])
def test_opcheck_forward_and_backward_over_layouts(training, act):
    for kind, residual in itertools.product(LAYOUTS[:4], (True, False)):
        x, mean, var, weight, bias, r = problem((2, 3, 4, 5), kind=kind, residual=residual)
        leaves = [t if t is None else t.requires_grad_() for t in (x, weight, bias, r)]
        args = (leaves[0], leaves[1], leaves[2], mean, var, leaves[3], training, EPS, act)
        opcheck(torch.ops.fastres.bn_act.default, args)
        y, m, v = (t.detach() for t in torch.ops.fastres.bn_act(*args))
        if kind == "transposed":
            continue
        plain = torch.randn(2, 3, 4, 5)
        for dy in (plain, layout(plain, "channels_last"), torch.ones(()).expand(2, 3, 4, 5), layout(plain, "offset")):
            for needs in ([True] * 4, [False, True, True, False], [True, False, False, bool(residual)]):
                mask_from = y if act == "relu" else None
                args = (dy, x.detach(), mask_from, weight.detach(), m, v, training, EPS, act, needs)
                opcheck(torch.ops.fastres.bn_act_backward.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("training", [True, False])
def test_row18_row19_gradcheck_to_second_order(training):
    x, mean, var, weight, bias, r = (t.double() for t in problem((2, 3, 2, 3)))
    leaves = [t.requires_grad_() for t in (x, weight, bias, r)]

    def f(x, weight, bias, r):
        return bn_act(x, mean.clone(), var.clone(), weight, bias, r, training=training)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_row19_third_order_is_right(backend):
    """Against autograd of the formula: the third derivative of eager's own batch_norm is silently wrong."""
    x0, mean, var, weight, bias, r = problem((2, 3, 3, 3))

    def third(f):
        x = x0.clone().requires_grad_()
        out = f(x).square().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(out, x, create_graph=True)
            out = g.square().sum()
        return g

    got = third(lambda x: bn_act(x, None, None, weight, bias, r, training=True, backend=backend))

    def formula(x):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        x_hat = (x - mean) * torch.rsqrt(var + EPS)
        return F.relu(weight[:, None, None] * x_hat + bias[:, None, None] + r)

    want = third(formula)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_row23_compile_fullgraph_equals_eager_without_recompiles(backend, fresh_compiler):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(x, mean, var, weight, bias, r):
        return bn_act(x, mean, var, weight, bias, r, training=True, backend=backend)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for n in range(2, 12):
        inputs = problem((n, 8, 4, 4), kind="channels_last")
        dy = torch.randn(n, 8, 4, 4)
        got, want = run(compiled, inputs, dy), run(f, inputs, dy)
        for name in got[0]:
            torch.testing.assert_close(got[0][name], want[0][name])
        torch.testing.assert_close(got[1], want[1])
    assert counter.frame_count <= 2
    assert any("fastres.bn_act" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_row3_zero_size(backend, shape, training):
    x, mean, var, weight, bias, r = problem(shape)
    leaves = [t.requires_grad_() for t in (x, weight, bias, r)]
    before = mean.clone(), var.clone()
    y = bn_act(leaves[0], mean, var, *leaves[1:], training=training, backend=backend)
    y.sum().backward()
    assert y.shape == shape and torch.equal(mean, before[0]) and torch.equal(var, before[1])
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in leaves)


def test_row8_ambiguous_strides_are_eagers(backend):
    shapes = [(2, 1, 4, 4), (2, 3, 1, 1), (1, 3, 1, 1), (1, 1, 1, 2), (2, 3, 1, 5)]
    for shape, kind, kind_r, act in itertools.product(shapes, LAYOUTS[:4], (*LAYOUTS[:4], None), ("relu", "none")):
        x, mean, var, weight, bias, r = problem(shape, kind=kind, residual=kind_r is not None, kind_r=kind_r)
        args = (x, mean, var, weight, bias, r)
        got = bn_act(*args, act=act, backend=backend)
        assert got.stride() == eager(*args, act=act, training=False).stride(), (shape, kind, kind_r, act)


def test_row4_one_value_per_channel_moves_nothing(backend):
    mean, var, count = torch.zeros(3), torch.ones(3), torch.tensor(0)
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        bn_act(torch.randn(1, 3, 1, 1), mean, var, training=True, num_batches_tracked=count, backend=backend)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3)) and count == 0
    assert bn_act(torch.randn(1, 3, 1, 1), mean, var, backend=backend).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("off", [-1, 1])
def test_row5_per_channel_tensor_off_by_one(backend, name, off):
    given = {n: torch.ones(4) for n in ("running_mean", "running_var", "weight", "bias")} | {name: torch.ones(4 + off)}
    before = {n: t.clone() for n, t in given.items()}
    with pytest.raises(ValueError, match=rf"{name}: got shape \[{4 + off}\], expected \[4\]"):
        bn_act(torch.randn(2, 4, 3, 3), **given, training=True, backend=backend)
    assert all(torch.equal(given[n], before[n]) for n in given)


BAD = [
    ({"x": torch.zeros(2, 4, 3)}, ValueError, "x: got 3 dimensions"),
    ({"x": torch.zeros(2, 4, 3, 3, 3)}, ValueError, "x: got 5 dimensions"),
    ({"x": torch.zeros(2, 4, 3, 3).int()}, TypeError, "x: got dtype torch.int32"),
    ({"x": torch.zeros(2, 4, 3, 3).cfloat()}, TypeError, "x: got dtype torch.complex64"),
    ({"x": None}, TypeError, "x: got NoneType"),
    ({"residual": torch.zeros(2, 4, 3, 2)}, ValueError, r"residual: got shape \[2, 4, 3, 2\], expected x's shape"),
    ({"residual": torch.zeros(2, 4, 3, 3).half()}, TypeError, "residual: got dtype torch.float16, expected x's"),
    ({"weight": torch.zeros(4, 1)}, ValueError, r"weight: got shape \[4, 1\]"),
    ({"weight": torch.zeros(4).int()}, TypeError, "weight: got dtype torch.int32"),
    ({"weight": torch.zeros(4, device="meta")}, ValueError, "weight: got device meta, expected x's device cpu"),
    ({"act": "gelu"}, ValueError, "act: got 'gelu'"),
    ({"running_mean": None, "training": False}, ValueError, "running_mean and running_var: got None"),
    ({"momentum": None, "num_batches_tracked": None}, ValueError, "num_batches_tracked: got None"),
    ({"backend": "nope"}, ValueError, "backend: got 'nope'"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input_names_argument_and_moves_nothing(change, error, words):
    mean, var, count = torch.zeros(4), torch.ones(4), torch.tensor(0)
    good = {"x": torch.randn(2, 4, 3, 3), "running_mean": mean, "running_var": var, "training": True}
    with pytest.raises(error, match=words):
        bn_act(**{**good, "num_batches_tracked": count, **change})
    assert torch.equal(mean, torch.zeros(4)) and torch.equal(var, torch.ones(4)) and count == 0


def test_must_not_refuse_and_refusals_as_data():
    for dtype, kind in itertools.product(DTYPES, LAYOUTS):
        x = layout(torch.zeros(2, 3, 4, 5, dtype=dtype), kind)
        explanation = fastres.explain("bn_act", x)
        if not fastres.explain("bn_act", torch.zeros(1, 1, 1, 1)).refusals["cpu"]:
            assert explanation.chosen == "cpu" and explanation.refusals["cpu"] == []
        assert explanation.refusals["reference"] == []
    with pytest.raises(BackendError, match="bn_act: backend 'triton' refuses"):
        bn_act(torch.zeros(2, 3, 4, 5).double(), None, None, training=True, backend="triton")


def test_environment_picks_and_disables(settings):
    x = torch.zeros(2, 3, 4, 5)
    settings(FASTRES_BACKEND="reference")
    assert fastres.explain("bn_act", x).chosen == "reference"
    settings(FASTRES_BACKEND=None, FASTRES_DISABLE="cpu, triton")
    explanation = fastres.explain("bn_act", x)
    assert explanation.chosen == "reference" and explanation.refusals["cpu"] == ["disabled by FASTRES_DISABLE"]
