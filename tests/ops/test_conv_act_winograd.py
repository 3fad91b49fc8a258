"""The backend "winograd" of conv_act: F(2x2, 3x3) on the weight as it is, its gradients, swapped blocks that take it.

The kernels by themselves are in test_conv_winograd.py, every backend's behavior in test_conv_act.py. Longer than 400
lines: one backend, from its values to the blocks that run it.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastres
from conv_cases import EAGER, eager, problem
from fastres._dispatch import BackendError
from fastres._extension import build_info, native_cpu  # noqa: F401  (`run_on` asks the module)
from fastres.functional import conv_act
from fastres.ops import _conv_native as native
from fastres.verify import verify
from guards import guarded, run_on
from referee import assert_as_good, layout
from swap_cases import scramble

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(native_cpu() is None, reason="the C++ extension is not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTS = ("none", "relu", "relu6", "hardswish")
SIZES = [(16, 16, (5, 7)), (17, 40, (9, 4)), (64, 33, (14, 14))]  # C, K, the images: tails of each
PADDINGS = (0, 1, 2, (2, 0))


def given(c, k, size, padding, dtype=torch.float32, **how):
    return problem(c, k, size, (3, 1, padding, 1), dtype, **how)


def own(x, weight, bias=None, residual=None, scale=None, **how):
    return conv_act(x, weight, bias, residual, scale, **how, backend="winograd")


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_forward_against_fp64(act, dtype):
    for (c, k, size), padding, scaled in itertools.product(SIZES, PADDINGS, (False, True)):
        x, weight, bias, residual, call = given(c, k, size, padding, dtype)
        scale = torch.randn(k) if scaled else None
        for after in ((bias, residual), (None, None)):
            doubles = [None if t is None else t.double() for t in (x, weight, *after, scale)]
            exact = eager(*doubles, **call, act=act)
            magnitude = eager(*(None if t is None else t.abs() for t in doubles), **call, act="none")
            got = own(x, weight, *after, scale, **call, act=act)
            want = eager(x, weight, *after, scale, **call, act=act)
            assert_as_good(got, want, exact, magnitude, f"{c} {k} {size} {padding} {act}")


@pytest.mark.parametrize("kind", ["nchw", "channels_last", "every_second", "transposed", "offset"])
def test_integers_are_exact_and_strides_are_eagers(kind):
    for (c, k, size), padding, last in itertools.product(SIZES, PADDINGS, (True, False)):
        x, weight, bias, residual, call = given(c, k, size, padding, integer=True)
        x = layout(x, kind)
        weight = weight.contiguous(memory_format=LAST if last or kind != "channels_last" else torch.contiguous_format)
        got = own(x, weight, bias, residual, **call)
        assert torch.equal(got.double(), eager(x.double(), weight.double(), bias.double(), residual.double(), **call))
        assert got.stride() == eager(x, weight, bias, residual, **call).stride()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_row10_nan_and_infinity_at_every_place_of_a_tile_as_eager(value):
    """A tile would spread one to its neighbors: such a call runs direct."""
    x, weight, bias, residual, call = given(16, 16, (6, 6), 1)
    for place in itertools.product((0, 1), range(6), range(6)):
        n, h, w = place
        spoiled = x.clone()
        spoiled[n, 5, h, w] = value
        got, want = own(spoiled, weight, bias, residual, **call), eager(spoiled, weight, bias, residual, **call)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf()), place
    spoiled = residual.clone()
    spoiled[1, 7, 3, 2] = bias[4] = value
    got, want = own(x, weight, bias, spoiled, **call), eager(x, weight, bias, spoiled, **call)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


# ---- backward --------------------------------------------------------------------------------------------------------


def gradients(run, tensors, dy, **how):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    run(*leaves, **how).backward(dy)
    return [None if t is None else t.grad for t in leaves]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
def test_gradients_against_fp64(act, dtype):
    for (c, k, size), padding, scaled in itertools.product(SIZES, PADDINGS, (False, True)):
        x, weight, bias, residual, call = given(c, k, size, padding, dtype)
        tensors = [x, weight, bias, residual, torch.randn(k) if scaled else None]
        doubles = [None if t is None else t.double() for t in tensors]
        # the sign of ReLU is the same in every precision where no sum is near 0
        y = eager(*doubles, **call, act="none")
        dy = torch.randn(y.shape, dtype=dtype) * ((y.abs() > 0.1) & ((y - 6).abs() > 0.1))
        how = call | {"act": act}
        exact = gradients(eager, doubles, dy.double(), **how)
        magnitude = gradients(
            eager, [None if t is None else t.abs() for t in doubles], dy.double().abs(), **call, act="none"
        )
        ours, stock = gradients(own, tensors, dy, **how), gradients(eager, tensors, dy, **how)
        for name, mine, theirs, true, size_of in zip(
            ("x", "weight", "bias", "residual", "scale"), ours, stock, exact, magnitude, strict=True
        ):
            if true is not None:
                assert_as_good(mine, theirs, true, size_of, f"{name} {c} {k} {size} {padding} {act} {scaled}")


@pytest.mark.parametrize("last", [True, False], ids=["weight channels_last", "weight nchw"])
def test_integer_gradients_are_exact(last):
    for (c, k, size), padding in itertools.product([*SIZES, (40, 16, (30, 31))], PADDINGS):
        x, weight, bias, _, call = given(c, k, size, padding, integer=True, residual=False)
        weight = weight.contiguous(memory_format=LAST if last else torch.contiguous_format)
        y = eager(x, weight, bias, **call, act="none")
        for dy in (torch.randint(-2, 3, y.shape).float(), torch.ones(()).expand(y.shape)):
            ours = gradients(own, (x, weight, bias), dy, **call, act="none")
            stock = gradients(eager, (x, weight, bias), dy, **call, act="none")
            exact = gradients(eager, (x.double(), weight.double(), bias.double()), dy.double(), **call, act="none")
            for mine, theirs, true in zip(ours, stock, exact, strict=True):
                assert torch.equal(mine.double(), true) and mine.stride() == theirs.stride(), (c, k, size, padding)


def test_many_tiles_sum_as_exactly_as_eager():
    x, dy = (torch.randn(6, 32, 60, 58).contiguous(memory_format=LAST) for _ in range(2))
    stock = torch.ops.aten.convolution_backward.default
    where = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    want, eagers = (
        stock(g, t, torch.empty(32, 32, 3, 3, dtype=t.dtype), [32], *where)[1]
        for g, t in ((dy.double(), x.double()), (dy, x))
    )
    got = native.weight_gradient(x, dy, 1, 1, True)
    error, its = (float((t - want).norm() / want.norm()) for t in (got, eagers))
    assert error < 2 * its


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_of_what_is_not_finite_are_eagers(value):
    x, weight, bias, _, call = given(16, 20, (6, 7), 1, residual=False)
    dy = torch.randn(2, 20, 6, 7)
    for spoil in (x, dy):
        spoil[1, 3, 2, 4] = value
        ours, stock = (gradients(run, (x, weight, bias), dy, **call, act="none") for run in (own, eager))
        for mine, theirs in zip(ours, stock, strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan()) and torch.equal(mine.isinf(), theirs.isinf())
        spoil[1, 3, 2, 4] = 1.0


def test_only_the_needed_gradients_are_computed():
    x, weight, bias, _, call = given(16, 16, (8, 8), 1, residual=False)
    for leaf in (x, weight):
        leaf.requires_grad_()
        y = own(x, weight, bias, **call)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            y.sum().backward()
        names = [event.name for event in seen.events()]
        assert names.count("fastres::_conv_winograd_once_native") == (leaf is x)
        assert names.count("fastres::_conv_winograd_weight_native") == (leaf is weight)
        assert "aten::convolution_backward" not in names
        leaf.requires_grad_(False)


def test_gradients_of_gradients_and_transforms():
    x, weight, bias, _, call = given(16, 16, (5, 5), 1, residual=False)
    found = []
    for run in (own, eager):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        (da,) = torch.autograd.grad(run(a, w, bias, **call).square().sum(), a, create_graph=True)
        da.square().sum().backward()
        found.append((a.grad, w.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3 * float(theirs.abs().max()))
    how = call | {"act": "none"}
    total = torch.func.grad(lambda w: conv_act(x, w, bias, **how).square().sum())(weight)
    want = torch.func.grad(lambda w: eager(x, w, bias, **how).square().sum())(weight)
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("act", ["relu", "none"])
def test_opcheck(act):
    x, weight, bias, residual, call = given(16, 16, (5, 6), 1)
    tensors = [t.requires_grad_() for t in (x, weight, bias, residual)]
    args = (*tensors, None, *([call[name]] * 2 for name in ("stride", "padding", "dilation")), 1, act, "winograd")
    torch.library.opcheck(torch.ops.fastres.conv_act.default, args, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("act", ["relu", "none"])
def test_compiled(act):
    x, weight, bias, residual, call = given(16, 16, (7, 6), 1)
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, weight, bias, residual, **call, act=act), own(x, weight, bias, residual, **call, act=act)
    )


# ---- memory, threads, instruction sets -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_its_tensors_is_read(dtype):
    for c, k, size in SIZES:
        x, weight, bias, residual, _ = given(c, k, size, 1, dtype)
        want = native.once(x, weight, bias, residual, None, 1, 1, "relu", False)
        dy = torch.randn(want.shape).to(dtype).contiguous(memory_format=LAST)
        wanted = (
            native.once(dy, weight, None, None, None, 1, 1, "none", True),
            native.weight_gradient(x, dy, 1, 1, True),
        )
        x, weight, bias, residual, dy = (guarded(t)[0] for t in (x, weight, bias, residual, dy))
        assert torch.equal(native.once(x, weight, bias, residual, None, 1, 1, "relu", False), want)
        got = native.once(dy, weight, None, None, None, 1, 1, "none", True), native.weight_gradient(x, dy, 1, 1, True)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("n, c, k, size", [(1, 48, 64, 14), (3, 32, 96, 30), (9, 16, 40, 60)])
def test_threads_change_no_bit(n, c, k, size):
    x, dy = (torch.randn(n, m, size, size).contiguous(memory_format=LAST) for m in (c, k))
    weight, before = torch.randn(k, c, 3, 3), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            y = native.once(x, weight, None, None, None, 1, 1, "none", False)
            dx = native.once(dy, weight, None, None, None, 1, 1, "none", True)
            found.append((y, dx, native.weight_gradient(x, dy, 1, 1, False)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_instruction_sets(isa):
    calls = """
    tests.test_forward_against_fp64("relu", tests.torch.float32)
    tests.test_gradients_against_fp64("relu", tests.torch.float32)
    for last in (True, False):
        tests.test_integer_gradients_are_exact(last)
    for dtype in tests.DTYPES:
        tests.test_nothing_outside_its_tensors_is_read(dtype)
    """
    run_on(isa, "test_conv_act_winograd", calls)


# ---- refusals, the cost model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"stride": 2}, r"stride \(2, 2\) and dilation \(1, 1\), Winograd's are 1"),
        ({"dilation": 2}, r"stride \(1, 1\) and dilation \(2, 2\), Winograd's are 1"),
        ({"padding": 3}, r"padding \(3, 3\), Winograd's is at most 2"),
        ({"act": "silu"}, "act is 'silu': the kernels have none, relu, relu6, hardswish"),
    ],
)
def test_a_forced_backend_says_why_not(change, reason):
    x, weight, *_ = given(16, 16, (9, 9), 1)
    with pytest.raises(BackendError, match=f"conv_act: backend 'winograd' refuses: {reason}"):
        own(x, weight, **change)
    assert reason.replace("\\", "") in fastres.explain("conv_act", x, weight, **change).refusals["winograd"]


def test_other_refusals():
    x, weight, *_ = given(32, 32, (9, 9), 1)
    asked = [
        (x, weight[:, :16], {"groups": 2}, "2 groups, the kernels have 1"),
        (x[:, :8], weight[:, :8], {}, "8 to 32 channels: below 16 the transforms cost more than they save"),
        (x, weight[..., :2], {}, "the kernel is 3x2, Winograd's is 3x3"),
        (x.contiguous(), weight, {}, "NCHW: the kernel reads channels_last"),
        (x.double(), weight.double(), {}, "dtype torch.float64 runs through the reference"),
        (x[:0], weight, {}, "an empty tensor runs through the reference"),
    ]
    for images, kernel, how, reason in asked:
        assert reason in fastres.explain("conv_act", images, kernel, **how).refusals["winograd"], reason


def test_the_cost_model_takes_large_calls_and_leaves_small_ones(monkeypatch):
    weight = torch.empty(64, 64, 3, 3)
    large, small = (torch.empty(n, 64, s, s).contiguous(memory_format=LAST) for n, s in ((8, 56), (1, 7)))
    assert fastres.explain("conv_act", large, weight, padding=1).chosen == "winograd"
    found = fastres.explain("conv_act", small, weight, padding=1)
    assert found.chosen == "cpu" and not found.refusals["winograd"]
    monkeypatch.setenv("FASTRES_DISABLE", "winograd")
    fastres._dispatch.reload_environment()
    try:
        assert fastres.explain("conv_act", large, weight, padding=1).chosen == "cpu"
    finally:
        monkeypatch.undo()
        fastres._dispatch.reload_environment()


# ---- swapped blocks --------------------------------------------------------------------------------------------------


def names_of(run):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return [event.name for event in seen.events()]


def networks():
    torch.manual_seed(0)
    stock = scramble(torchvision.models.resnet18(num_classes=10)).to(memory_format=LAST)
    ours = copy.deepcopy(stock)
    fastres.swap(ours)
    return stock, ours, torch.randn(4, 3, 112, 112).contiguous(memory_format=LAST)


def test_a_swapped_network_trains_through_it():
    _, ours, x = networks()
    ours.train()
    names = names_of(lambda: ours(x).sum().backward())
    # 13 of ResNet-18's 20 convolutions are 3x3 of stride 1; those at 7x7 and 4x4 are too small
    assert names.count("fastres::conv_act") >= 7 and names.count("fastres::_conv_winograd_weight_native") >= 6
    assert names.count("fastres::_conv_winograd_once_native") >= 12
    assert names.count("fastres::conv_act") + names.count("aten::mkldnn_convolution") == 20


def test_a_swapped_network_evaluates_in_one_pass_and_follows_every_write():
    stock, ours, x = networks()
    stock.eval()
    ours.eval()
    with torch.no_grad():
        names = names_of(lambda: ours(x))
        fused = names.count("fastres::_conv_winograd_once_native")
        assert fused >= 7 and names.count("fastres::_bn_act_native") == 20 - fused
        for _ in range(2):
            got, want = ours(x), stock(x)
            assert float((got - want).norm() / want.norm()) < 1e-5
            for net in (stock, ours):
                for t in (*net.parameters(), *net.buffers()):
                    t.data.mul_(1.01 if t.is_floating_point() else 1)


@pytest.mark.parametrize("training", [True, False])
def test_the_referee_takes_outputs_and_gradients(training):
    stock, ours, x = networks()
    for net in (stock, ours):
        net.train(training)
    assert verify(ours, stock, (x[:2],), backward=False)
    block, alike = stock.layer1[0], ours.layer1[0]
    given = torch.randn(4, 64, 56, 56).contiguous(memory_format=LAST)
    assert "fastres::_conv_winograd_weight_native" in names_of(lambda: copy.deepcopy(alike)(given).sum().backward())
    assert verify(alike, block, (given[:2],), backward=True)


@pytest.mark.parametrize("eps, bias, affine", [(1e-5, True, True), (0.1, False, False)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_eval_mode_against_fp64(eps, bias, affine, with_residual):
    conv, bn = nn.Conv2d(32, 48, 3, padding=1, bias=bias), nn.BatchNorm2d(48, eps, affine=affine)
    net = scramble(nn.ModuleList([conv, bn])).eval()
    x = torch.randn(8, 32, 40, 40).contiguous(memory_format=LAST)
    residual = torch.randn(8, 48, 40, 40) if with_residual else None
    with torch.no_grad():
        names = names_of(lambda: fastres.nn.conv_norm_act(x, conv, bn, nn.ReLU(), residual))
        assert "fastres::_conv_winograd_once_native" in names and "fastres::_bn_act_native" not in names
        got = fastres.nn.conv_norm_act(x, conv, bn, nn.ReLU(), residual)
        z = bn(conv(x))
        want = F.relu(z if residual is None else z + residual)
        exact = copy.deepcopy(net).double()
        z = exact[1](exact[0](x.double()))
        true = F.relu(z if residual is None else z + residual.double())
    assert_as_good(got, want, true, true.abs() + 1, "eval")
    assert got.stride() == want.stride()


def test_hooks_autocast_and_odd_modules_keep_the_stock_convolution():
    conv, bn, act = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
    x = torch.randn(8, 32, 40, 40).contiguous(memory_format=LAST)
    step = fastres.nn.conv_norm_act

    def own_calls(given, module):
        return names_of(lambda: step(given, module, bn, act)).count("fastres::_conv_winograd_once_native")

    assert own_calls(x, conv) == 1
    seen = []
    handle = conv.register_forward_hook(lambda *args: seen.append(1))
    assert own_calls(x, conv) == 0 and seen
    handle.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert own_calls(x, conv) == 0
    assert own_calls(x.contiguous(), conv) == 0  # NCHW
    assert own_calls(x, nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")) == 0
    assert own_calls(x, nn.Conv2d(32, 32, 3, padding="same")) == 0
    with torch.no_grad(), pytest.raises(ValueError, match=r"bn_act: weight: got shape \[31\], expected \[32\]"):
        step(x, conv, nn.BatchNorm2d(31).eval(), act)
    with pytest.raises(RuntimeError, match="expected input"):  # PyTorch's own words
        step(x[:, :16], conv, bn, act)


def test_a_backend_of_the_environment_that_refuses_leaves_swapped_blocks_alone(monkeypatch):
    step, x = fastres.nn.conv_norm_act, torch.randn(2, 8, 9, 9).contiguous(memory_format=LAST)
    monkeypatch.setenv("FASTRES_BACKEND", "winograd")
    fastres._dispatch.reload_environment()
    try:
        assert step(x, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).shape == (2, 8, 7, 7)
    finally:
        monkeypatch.undo()
        fastres._dispatch.reload_environment()


def test_activation_names_are_the_kernels():
    assert set(native.ACTS) < set(EAGER)
