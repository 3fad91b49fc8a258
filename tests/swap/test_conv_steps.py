"""Convolution, BN, addition and ReLU as one step in eval mode: answers, every write followed, who is left alone."""

import copy
import itertools
from collections import Counter

import pytest
import torch
from torch import nn

import fastres
from fastres import _dispatch
from fastres._extension import why_not_cpu
from fastres.nn import BasicBlock, Bottleneck, ConvBNReLU, conv_bn_act, conv_norm_act, conv_steps
from referee import LAYOUTS, assert_as_good, layout
from swap_cases import projection, scramble, tiny

pytestmark = pytest.mark.skipif(bool(why_not_cpu()), reason="without fastres._C nothing is written over")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def parts(c=8, k=16, bias=False, **options):
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(c, k, 3, padding=1, bias=bias, **options), scramble(nn.BatchNorm2d(k))
    return conv, bn.eval(), torch.randn(2, c, 9, 9)


def stock(x, conv, bn, residual=None, act="relu"):
    y = bn(conv(x))
    y = y if residual is None else y + residual
    return torch.relu(y) if act == "relu" else y


@pytest.fixture
def written(monkeypatch):
    """How many convolutions' outputs were written over: the answers alone would not show it, so the call is watched."""
    real, found = conv_steps.bn_act_over, Counter()

    def watched(*args, **kwargs):
        y = real(*args, **kwargs)
        assert y is None or y is args[0]
        found[y is not None] += 1
        return y

    monkeypatch.setattr(conv_steps, "bn_act_over", watched)
    return lambda: found.pop(True, 0)


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_answers(written, dtype, bias, act, residual):
    conv, bn, x = parts(bias=bias, stride=2)
    conv, x = conv.to(dtype), x.to(dtype)
    exact = copy.deepcopy(conv).double(), copy.deepcopy(bn).double()
    size = copy.deepcopy(exact)
    size[0].weight.abs_()
    size[1].weight.abs_()
    bn = bn.to(dtype)
    for kind in LAYOUTS:
        given = layout(x, kind)
        r = layout(torch.randn(2, 16, 5, 5).to(dtype), kind) if residual else None
        y = conv_bn_act(given, conv, bn, r, act)
        eager = stock(given, conv, bn, r, act)
        assert written() == (r is None or r.stride() == eager.stride())  # others are made dense first
        assert y.stride() == eager.stride()
        r64 = None if r is None else r.double()
        truth = stock(x.double(), *exact, r64, act)
        magnitude = stock(x.double().abs(), *size, None if r64 is None else r64.abs(), "none").abs() + 1
        assert_as_good(y, eager, truth, magnitude)


@pytest.mark.parametrize("block", [BasicBlock(8, 8), BasicBlock(8, 16, 2, projection(8, 16, 2)), Bottleneck(8, 2),
                                   Bottleneck(8, 4, 2, projection(8, 16, 2)), ConvBNReLU(8, 16)])  # fmt: skip
def test_blocks_write_over_every_convolution(written, block):
    torch.manual_seed(0)
    block, x = scramble(block).eval(), torch.randn(2, 8, 7, 7)
    y = block(x)
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    shortcut = [] if getattr(block, "downsample", None) is None else list(block.downsample)
    assert written() == sum(bn not in shortcut for bn in norms)
    torch.testing.assert_close(y, copy.deepcopy(block).double()(x.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_swapped_network_is_its_convolutions_and_one_pass_over_each(dtype):
    net = tiny(torch.float32).eval().to(dtype)
    x = torch.randn(2, 3, 16, 16).to(dtype)
    wanted = net(x)
    fastres.swap(net)
    got = net(x)
    torch.testing.assert_close(
        got, wanted, rtol=1e-5 if dtype is torch.float32 else 0.05, atol=1e-5 if dtype is torch.float32 else 0.05
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        again = net(x)
    names = {event.key: event.count for event in trace.key_averages()}
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert names["fastres::_bn_act_native"] == norms == names["aten::conv2d"]
    assert not any(part in name for name in names for part in ("batch_norm", "aten::relu", "fastres::bn_act"))
    assert names.keys().isdisjoint({"aten::add", "aten::add_"})
    assert torch.equal(again, got)


def test_row10_nan_and_infinity_pass():
    conv, bn, x = parts()
    for value in (float("nan"), float("inf"), float("-inf")):
        x[0, 0, 4, 4] = value
        y, wanted = conv_bn_act(x, conv, bn), stock(x, conv, bn)
        assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())


def test_residuals_that_only_eager_adds(written):
    conv, bn, x = parts()
    for r in (torch.randn(16, 1, 1), torch.randn(1, 16, 9, 9), torch.randn(2, 16, 9, 9).double(), torch.randn(9, 9)):
        y = conv_bn_act(x, conv, bn, r)
        assert not written() and y.dtype is torch.float32
        torch.testing.assert_close(y, stock(x, conv, bn, r).float())


def test_the_residual_and_the_input_stay_untouched():
    conv, bn, x = parts(8, 8)
    before = x.clone()
    torch.testing.assert_close(conv_bn_act(x, conv, bn, x), stock(before, conv, bn, before))
    assert torch.equal(x, before)


def test_other_norms_and_activations_run_as_they_are():
    conv, bn, x = parts()
    wanted = nn.functional.silu(bn(conv(x)))
    torch.testing.assert_close(conv_norm_act(x, conv, bn, nn.SiLU()), wanted)
    assert torch.equal(conv_norm_act(x, conv, nn.Identity(), None), conv(x))


# ---- every write is followed -----------------------------------------------------------------------------------------


def change_weight(conv, bn):
    conv.weight.mul_(2)


def change_statistics(conv, bn):
    bn.running_var.mul_(3)


def change_affine(conv, bn):
    bn.weight.add_(1)
    bn.bias.sub_(1)


def change_eps(conv, bn):
    bn.eps = 0.5


def load(conv, bn):
    bn.load_state_dict({k: v + 1 for k, v in bn.state_dict().items()})


def assign(conv, bn):
    conv.load_state_dict({k: v + 1 for k, v in conv.state_dict().items()}, assign=True)


def replace(conv, bn):
    conv.weight = nn.Parameter(torch.full_like(conv.weight, 0.25))


def set_data(conv, bn):
    conv.weight.data = conv.weight.data * 3


def add_bias(conv, bn):
    conv.bias = nn.Parameter(torch.ones(16))


def drop_affine(conv, bn):
    bn.weight = bn.bias = None


def geometry(conv, bn):
    conv.padding, conv.dilation = (2, 2), (2, 2)


def padding_mode(conv, bn):
    conv.padding_mode, conv._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]


def no_statistics(conv, bn):
    bn.running_mean = bn.running_var = None


def hook(conv, bn):
    conv.register_forward_hook(lambda module, args, y: y + 1)


def copy_data(conv, bn):
    conv.weight.data.copy_(torch.randn_like(conv.weight))


def scale_data(conv, bn):
    bn.weight.data.mul_(1.5)


def one_element(conv, bn):
    conv.weight.data[3, 2, 1, 1] = 7.0


def numpy_view(conv, bn):
    conv.weight.detach().numpy()[:] += 1


def set_storage(conv, bn):
    conv.weight.set_(torch.randn_like(conv.weight))


def buffer_data(conv, bn):
    bn.running_mean.data.add_(1)
    bn.running_var.data.copy_(bn.running_var * 2)


CHANGES = [change_weight, change_statistics, change_affine, change_eps, load, assign, replace, set_data, add_bias,
           drop_affine, geometry, padding_mode, no_statistics, hook, copy_data, scale_data, one_element, numpy_view,
           set_storage, buffer_data]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_are_followed(change):
    conv, bn, x = parts()
    before = conv_bn_act(x, conv, bn)
    change(conv, bn)
    got, wanted = conv_bn_act(x, conv, bn), stock(x, conv, bn)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, before, rtol=1e-3, atol=1e-3)


def test_row41_one_bn_behind_two_convolutions():
    conv, bn, x = parts()
    other = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    for _, c in itertools.product(range(3), (conv, other)):
        torch.testing.assert_close(conv_bn_act(x, c, bn), stock(x, c, bn))


# ---- who is left alone -----------------------------------------------------------------------------------------------


def test_gradients_keep_the_convolutions_output(written):
    for wants in ("x", "weight", "gamma", "residual"):
        conv, bn, x = parts()
        r = torch.randn(2, 16, 9, 9)
        conv.requires_grad_(False), bn.requires_grad_(False)
        {"x": x, "weight": conv.weight, "gamma": bn.weight, "residual": r}[wants].requires_grad_()
        with torch.enable_grad():
            y = conv_bn_act(x, conv, bn, r)
            assert y.requires_grad and not written()
            y.sum().backward()
    conv, bn, x = parts()
    conv.requires_grad_(False), bn.requires_grad_(False)
    with torch.enable_grad():
        assert not conv_bn_act(x, conv, bn).requires_grad and written()


def test_train_mode_moves_the_statistics(written):
    conv, bn, x = parts()
    bn.train()
    before = bn.running_mean.clone()
    conv_bn_act(x, conv, bn)
    assert not torch.equal(before, bn.running_mean) and not written()


@pytest.mark.parametrize("case", ["float64", "a named backend", "FASTRES_BACKEND", "autocast", "global hook",
                                  "functional_call", "bad variance", "compile", "fx", "meta", "dtype"])  # fmt: skip
def test_unusual_calls(case, monkeypatch, written):
    conv, bn, x = parts()
    handle, backend, call = None, "auto", conv_bn_act
    if case == "float64":
        conv, bn, x = conv.double(), bn.double(), x.double()
    elif case == "a named backend":
        backend = "reference"
    elif case == "FASTRES_BACKEND":
        monkeypatch.setenv("FASTRES_BACKEND", "reference")
        _dispatch.reload_environment()
    elif case == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    elif case == "bad variance":
        bn.running_var.fill_(-1)
    elif case == "meta":
        conv, bn, x = conv.to("meta"), bn.to("meta"), x.to("meta")
    elif case == "dtype":
        conv, x = conv.half(), x.half()
    try:
        if case in ("functional_call", "compile", "fx"):
            net = ConvBNReLU(8, 16).eval()
            net[0], net[1] = conv, bn
            if case == "functional_call":
                y = torch.func.functional_call(net, {k: v.detach().clone() for k, v in net.state_dict().items()}, (x,))
            else:
                run = torch.fx.symbolic_trace(net) if case == "fx" else torch.compile(net, backend="aot_eager")
                y = run(x)
        elif case == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                y = call(x, conv, bn)
        else:
            y = call(x, conv, bn, None, "relu", backend)
    finally:
        if handle is not None:
            handle.remove()
        monkeypatch.delenv("FASTRES_BACKEND", raising=False)
        _dispatch.reload_environment()
    assert bool(written()) == (case in ("autocast", "functional_call", "bad variance", "dtype"))
    if case not in ("meta", "autocast"):
        torch.testing.assert_close(y, stock(x, conv, bn), equal_nan=True, rtol=2e-3, atol=2e-3)


def test_bad_input_is_left_to_the_stock_modules():
    conv, bn, x = parts()
    with pytest.raises(RuntimeError, match="channels"):
        conv_bn_act(x[:, :3], conv, bn)
    with pytest.raises(RuntimeError, match="Kernel size"):
        conv_bn_act(torch.randn(1, 8, 0, 0), conv, bn)


def test_an_empty_batch_keeps_its_shape():
    conv, bn, x = parts()
    assert conv_bn_act(x[:0], conv, bn).shape == (0, 16, 9, 9)
    torch.testing.assert_close(conv_bn_act(x, conv, bn), stock(x, conv, bn))
