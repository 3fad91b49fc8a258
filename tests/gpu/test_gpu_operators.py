"""The Triton and the CUDA C++ kernels on a GPU: real shapes in every dtype against fp64, above 2^31 elements, streams,
graphs, repeats. Each test runs once per backend; what the C++ alone has is in test_gpu_native.py."""

import pytest
import torch
import torch.nn.functional as F

import fastres.ops  # noqa: F401  (declares the operators that fastres._C_cuda implements)
from fastres import _dispatch
from gpu_device import captured, late_on_another_stream, memory_for, shifted
from referee import assert_as_good, backward64, forward64, statistics64

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
RESNET = [(64, 64, 112, 112), (64, 256, 56, 56), (64, 128, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7)]
ODD = [(3, 3, 17, 19), (2, 65, 7, 7), (5, 129, 1, 1), (2**17 + 1, 1, 1, 1), (1, 100_003, 1, 2), (2, 7, 300, 301)]
EPS = 1e-5


@pytest.fixture(autouse=True, params=("triton", "cuda"))
def kernels(request):
    """Every test runs on both; `chosen` is the backend that it runs on."""
    global chosen
    chosen = {name: _dispatch.OPERATORS[name].backends[request.param] for name in ("add_relu", "bn_act")}
    reasons = _dispatch.refusals(chosen["bn_act"], torch.empty(1, 1, 1, 1, device="cuda"))
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


def random(shape, dtype, layout, scale=1.0, shift=0.0):
    return (torch.randn(shape, device="cuda") * scale + shift).to(dtype).contiguous(memory_format=layout)


def how(layout, training, act="relu"):
    return {"channels_last": layout is torch.channels_last, "training": training, "eps": EPS, "act": act}


def forward(x, weight, bias, residual, mean=None, var=None, layout=torch.channels_last, act="relu"):
    y, training = torch.full_like(x, NAN), mean is None
    if training:
        mean, var = (torch.full((x.shape[1],), NAN, device="cuda") for _ in range(2))
    chosen["bn_act"].forward(x, weight, bias, residual, y, mean, var, **how(layout, training, act))
    return y, mean, var


def backward(dy, x, y, weight, mean, var, training, layout=torch.channels_last):
    dx, dresidual = torch.full_like(x, NAN), torch.full_like(x, NAN)
    dweight, dbias = torch.full_like(mean, NAN), torch.full_like(mean, NAN)
    chosen["bn_act"].backward(dy, x, y, weight, mean, var, dx, dweight, dbias, dresidual, **how(layout, training))
    return dx, dweight, dbias, dresidual


def eager(x, weight, bias, residual, mean, var, dy):
    """torch's own operators, in x's dtype -> y and the gradients of x, weight, bias, residual."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    stats = (mean.clone(), var.clone()) if mean is not None else (None, None)
    z = F.batch_norm(leaves[0], *stats, *leaves[1:3], training=mean is None, eps=EPS)
    y = torch.relu(z + leaves[3])
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("layout", LAYOUTS, ids=("nhwc", "nchw"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", RESNET + ODD, ids=str)
def test_bn_act_is_as_good_as_eager(shape, dtype, layout, training):
    c = shape[1]
    x, residual, dy = (random(shape, dtype, layout, 2.0, 0.5) for _ in range(3))
    weight, bias = torch.randn(c, device="cuda"), torch.randn(c, device="cuda")
    stats = (None, None) if training else (torch.randn(c, device="cuda"), torch.rand(c, device="cuda") + 0.1)
    y, mean, var = forward(x, weight, bias, residual, *stats, layout=layout)
    eager_y, *eager_grads = eager(x, weight, bias, residual, *stats, dy)
    exact = statistics64(x) if training else stats
    if training:
        assert (mean - exact[0]).abs().max() <= 1e-6 * (exact[0].abs() + exact[1].sqrt()).max()
        assert ((var - exact[1]).abs() <= 2e-6 * exact[1]).all()
    assert_as_good(y, eager_y, *forward64(x, weight, bias, residual, *exact, EPS, "relu"), "y")

    # Gradients: all three take the mask from our y, so that an element at the threshold does not decide.
    ours = backward(dy, x, y, weight, mean, var, training, layout)
    open_gate = torch.full_like(residual, 1e4)  # relu passes everything: eager's backward of g
    _, *eager_grads = eager(x, weight, bias, open_gate, *stats, torch.where(y <= 0, torch.zeros_like(dy), dy))
    wanted = backward64(dy, x, y, weight, *exact, training, EPS, "relu")
    for got, theirs, (name, (gradient, size)) in zip(ours, eager_grads, wanted.items(), strict=True):
        assert_as_good(got, theirs, gradient, size, name)


@pytest.mark.parametrize("offset", (0, 1))
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_relu_equals_eager(dtype, offset):
    for numel in (1, 2047, 2048, 100_003, 2**22 + 5):
        x, residual, dy = (torch.randn(numel + offset, device="cuda").to(dtype)[offset:] for _ in range(3))
        y, dx = torch.full_like(x, NAN), torch.full_like(x, NAN)
        chosen["add_relu"].forward(x, residual, y)
        chosen["add_relu"].backward(dy, y, dx)
        assert torch.equal(y, torch.relu(x + residual))
        assert torch.equal(dx, torch.ops.aten.threshold_backward(dy, y, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row10_nan_and_inf_pass_in_compiled_code(dtype):
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 2.0, -3.0], device="cuda").to(dtype)
    for layout in LAYOUTS:
        x = special.repeat(3 * 64 * 8 * 8)[: 3 * 64 * 8 * 8].view(3, 64, 8, 8).contiguous(memory_format=layout)
        stats = torch.zeros(64, device="cuda"), torch.full((64,), 1 - EPS, device="cuda")
        y, *_ = forward(x, None, None, None, *stats, layout=layout)
        torch.testing.assert_close(y, torch.relu(x), rtol=1e-6, atol=0, equal_nan=True)
        dx, *_, dresidual = backward(torch.ones_like(x), x, y, None, *stats, False, layout)
        assert torch.equal(dresidual, torch.where(y <= 0, 0.0, 1.0).to(dtype))
    flat, y = special.repeat(1000), torch.empty(7000, device="cuda", dtype=dtype)
    chosen["add_relu"].forward(flat, torch.zeros_like(flat), y)
    torch.testing.assert_close(y, torch.relu(flat), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=("nhwc", "nchw"))
def test_row11_mean_far_above_std(layout):
    for shift, std in ((1e6, 0.1), (1e4, 1.0)):
        x = random((32, 64, 28, 28), torch.float32, layout, std, shift)
        _, mean, var = forward(x, None, None, None, layout=layout)
        var64, mean64 = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        _, _, rstd = torch.native_batch_norm(x, None, None, None, None, True, 0.0, EPS)
        eager_error = (rstd.double() ** -2 - EPS - var64).abs().max()
        assert (var - var64).abs().max() <= 4 * eager_error + 4 * torch.finfo(torch.float32).eps * var64.max()
        assert ((mean - mean64).abs() <= torch.finfo(torch.float32).eps * mean64).all()
    bias = torch.randn(64, device="cuda")
    x = torch.full((8, 64, 14, 14), 1e6 + 0.3, device="cuda").contiguous(memory_format=layout)
    y, *_ = forward(x, bias, bias, None, layout=layout, act="none")
    assert torch.equal(y, bias.view(1, -1, 1, 1).expand_as(y))


@pytest.mark.parametrize("layout", LAYOUTS, ids=("nhwc", "nchw"))
@pytest.mark.parametrize("c", (1, 2, 3, 5, 7, 9, 15, 17, 31, 33, 63, 65, 127, 129, 255, 257, 1000))
def test_row9_any_number_of_channels_and_misaligned_tensors(c, layout):
    for size, offset, dtype in ((7, 0, torch.float16), (5, 1, torch.float16), (8, 1, torch.float32)):
        shape = (3, c, size, size)
        x, residual, dy = (shifted(random(shape, dtype, layout), offset) for _ in range(3))
        weight, bias = torch.randn(2, c, device="cuda")
        y, mean, var = forward(x, weight, bias, residual, layout=layout)
        want, _ = forward64(x, weight, bias, residual, *statistics64(x), EPS, "relu")
        ulps = 32 if dtype is torch.float32 else 4  # as in native_case.check
        assert (y - want).abs().max() <= ulps * torch.finfo(dtype).eps * want.abs().max()
        dx, dweight, dbias, dresidual = backward(dy, x, y, weight, mean, var, True, layout)
        exact = {n: t for n, (t, _) in backward64(dy, x, y, weight, mean, var, True, EPS, "relu").items()}
        assert torch.equal(dresidual, exact["dresidual"].to(dtype))
        torch.testing.assert_close(dbias.double(), exact["dbias"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(dweight.double(), exact["dweight"], rtol=1e-5, atol=1e-4)
        assert (dx - exact["dx"]).abs().max() <= ulps * torch.finfo(dtype).eps * exact["dx"].abs().max()


@pytest.mark.parametrize("layout", LAYOUTS, ids=("nhwc", "nchw"))
def test_row27_graph_capture_and_replay(layout):
    x, dy, residual = (random((8, 64, 28, 28), torch.float16, layout) for _ in range(3))
    weight = torch.randn(64, device="cuda")

    def step():
        y, mean, var = forward(x, weight, weight, residual, layout=layout)
        return [y, mean, var, *backward(dy, x, y, weight, mean, var, True, layout)]

    graph, found = captured(step)
    for seed in range(5):
        torch.manual_seed(seed)
        x.normal_(seed)
        dy.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=("nhwc", "nchw"))
def test_row45_twenty_repeats_are_bitwise_equal(layout):
    x, dy, residual = (random((64, 256, 56, 56), torch.float16, layout) for _ in range(3))
    weight = torch.randn(256, device="cuda")
    first = None
    for _ in range(20):
        y, mean, var = forward(x, weight, weight, residual, layout=layout)
        results = [y, mean, var, *backward(dy, x, y, weight, mean, var, True, layout)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_row30_current_stream():
    x = random((64, 256, 56, 56), torch.float16, torch.channels_last)
    want, *_ = forward(x, None, None, None)
    assert torch.equal(late_on_another_stream(x, lambda late: forward(late, None, None, None)[0]), want)


@pytest.mark.full
@pytest.mark.parametrize("numel", (2**31 + 4096, 2**32 + 4096))
def test_row1_add_relu_above_two_to_the_31(numel):
    memory_for(8 * numel / 2**30 + 4)
    x, residual, y = (torch.empty(numel, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    x.normal_(), residual.normal_(), y.fill_(NAN)
    chosen["add_relu"].forward(x, residual, y)
    for start in range(0, numel, 2**28):
        part = slice(start, start + 2**28)
        assert torch.equal(y[part], torch.relu(x[part] + residual[part]))
    chosen["add_relu"].backward(x, y, residual)
    for start in range(0, numel, 2**28):
        part = slice(start, start + 2**28)
        assert torch.equal(residual[part], torch.where(y[part] <= 0, torch.zeros_like(y[part]), x[part]))


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS, ids=("nhwc", "nchw"))
@pytest.mark.parametrize("shape", ((2**15 + 1, 64, 32, 32), (3, 2, 2**15, 2**14)), ids=str)
def test_row1_bn_act_above_two_to_the_31(shape, layout):
    numel = torch.Size(shape).numel()
    memory_for(12 * numel / 2**30 + 8)
    c = shape[1]
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_()
    x[-1] += 100  # the end counts: its statistics would be missed by a wrapped offset
    y, mean, var = forward(x, None, None, None, layout=layout)
    images = range(0, shape[0], max(shape[0] // 64, 1))
    parts = [slice(i, i + images.step) for i in images]
    mean64 = sum(x[p].double().sum((0, 2, 3)) for p in parts) / (numel // c)
    var64 = sum((x[p].double() - mean64.view(1, -1, 1, 1)).square().sum((0, 2, 3)) for p in parts) / (numel // c)
    torch.testing.assert_close(mean.double(), mean64, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), var64, rtol=1e-5, atol=0)
    rstd = (var64 + EPS).rsqrt().view(1, -1, 1, 1)
    for p in parts:
        want = torch.relu((x[p] - mean64.view(1, -1, 1, 1)) * rstd)
        torch.testing.assert_close(y[p].double(), want, rtol=2**-8, atol=1e-4)
    dx = torch.full_like(x, NAN)
    chosen["bn_act"].backward(x, x, y, None, mean, var, dx, None, None, None, **how(layout, False))
    for p in parts:
        want = torch.where(y[p] <= 0, 0.0, x[p].double()) * rstd
        torch.testing.assert_close(dx[p].double(), want, rtol=2**-8, atol=1e-6)
