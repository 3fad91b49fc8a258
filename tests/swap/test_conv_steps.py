"""Convolution, BN, addition and ReLU as one step in eval mode: answers, what ends a fold, what never starts one."""

import copy
import itertools
import pickle
import weakref

import pytest
import torch
from torch import nn

import fastres
from fastres import _dispatch
from fastres._extension import why_not_cpu
from fastres.nn import BasicBlock, Bottleneck, ConvBNReLU, conv_bn_act, conv_norm_act, conv_steps
from referee import LAYOUTS, assert_as_good, layout
from swap_cases import projection, scramble, tiny

pytestmark = pytest.mark.skipif(bool(why_not_cpu()), reason="without fastres._C nothing is folded on the fly")


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


def is_folded(bn):
    found = conv_steps._folds.get(bn)
    return found is not None and found.folded is not None


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_answers(dtype, bias, act, residual):
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
        assert is_folded(bn)
        eager = stock(given, conv, bn, r, act)
        assert y.stride() == eager.stride()
        r64 = None if r is None else r.double()
        truth = stock(x.double(), *exact, r64, act)
        magnitude = stock(x.double().abs(), *size, None if r64 is None else r64.abs(), "none").abs() + 1
        assert_as_good(y, eager, truth, magnitude)


@pytest.mark.parametrize("block", [BasicBlock(8, 8), BasicBlock(8, 16, 2, projection(8, 16, 2)), Bottleneck(8, 2),
                                   Bottleneck(8, 4, 2, projection(8, 16, 2)), ConvBNReLU(8, 16)])  # fmt: skip
def test_blocks_fold_every_pair(block):
    torch.manual_seed(0)
    block, x = scramble(block).eval(), torch.randn(2, 8, 7, 7)
    y = block(x)
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    shortcut = [] if getattr(block, "downsample", None) is None else list(block.downsample)
    assert all(is_folded(bn) for bn in norms if bn not in shortcut)
    torch.testing.assert_close(y, copy.deepcopy(block).double()(x.double()).float(), rtol=1e-5, atol=1e-5)


def test_a_swapped_network_folds_every_pair_and_calls_no_batch_norm():
    net = tiny(torch.float32).eval()
    x = torch.randn(2, 3, 16, 16)
    wanted = net(x)
    fastres.swap(net)
    got = net(x)
    assert all(is_folded(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        again = net(x)
    names = {event.key for event in trace.key_averages()}
    assert not any("batch_norm" in name or "bn_act" in name for name in names), names
    assert torch.equal(again, got)


def test_row10_nan_and_infinity_pass():
    conv, bn, x = parts()
    for value in (float("nan"), float("inf"), float("-inf")):
        x[0, 0, 4, 4] = value
        y, wanted = conv_bn_act(x, conv, bn), stock(x, conv, bn)
        assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())


def test_residuals_that_only_eager_adds():
    conv, bn, x = parts()
    for r in (torch.randn(16, 1, 1), torch.randn(1, 16, 9, 9), torch.randn(2, 16, 9, 9).double(), torch.randn(9, 9)):
        y = conv_bn_act(x, conv, bn, r)
        assert is_folded(bn) and y.dtype is torch.float32
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


# ---- what ends a fold ------------------------------------------------------------------------------------------------


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


CHANGES = [change_weight, change_statistics, change_affine, change_eps, load, assign, replace, set_data, add_bias,
           drop_affine, geometry, padding_mode, no_statistics, hook]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_are_followed(change):
    conv, bn, x = parts()
    before = conv_bn_act(x, conv, bn)
    change(conv, bn)
    got, wanted = conv_bn_act(x, conv, bn), stock(x, conv, bn)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, before, rtol=1e-3, atol=1e-3)


def test_another_parameter_at_the_same_address_and_version_is_noticed():
    conv, bn, x = parts()
    memory = conv.weight.detach().numpy().copy()
    conv.weight = nn.Parameter(torch.from_numpy(memory))
    conv_bn_act(x, conv, bn)
    memory *= 2
    conv.weight = nn.Parameter(torch.from_numpy(memory))
    torch.testing.assert_close(conv_bn_act(x, conv, bn), stock(x, conv, bn))


@pytest.mark.parametrize("build", [lambda: ConvBNReLU(4, 8), lambda: BasicBlock(4, 4),
                                   lambda: fastres.models.cifar_resnet(8), "swapped"])  # fmt: skip
@pytest.mark.parametrize("between", ["eval", "train and eval", "a step", "a frozen step"])
def test_writes_through_data_are_followed_in_every_usual_loop(build, between):
    """`.data` moves no version counter: old EMA and optimizer code is seen by what comes before the next use."""
    torch.manual_seed(0)
    channels = 4
    if build == "swapped":
        net = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
        fastres.swap(net)
    else:
        net = build()
        channels = 3 if isinstance(net, fastres.models.cifar.CifarResNet) else 4
    x = torch.randn(2, channels, 8, 8)
    before = scramble(net).eval()(x)
    if between == "a step":
        with torch.enable_grad():
            net.train()(x).sum().backward()
    elif between == "a frozen step":  # BN in eval mode all along, convolutions trained
        with torch.enable_grad():
            net(x).sum().backward()
    for p in net.parameters():
        p.data.mul_(1.5)
    if between == "train and eval":
        net.train()
    if "eval" in between or between == "a step":
        net.eval()
    got = net(x)
    wanted = copy.deepcopy(net).double()(x.double()).float()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, before, rtol=1e-3, atol=1e-3)


def test_row37_copies_and_pickles_hold_no_fold_and_share_none():
    net, x = scramble(ConvBNReLU(4, 8)).eval(), torch.randn(1, 4, 6, 6)
    size = len(pickle.dumps(net))
    before = net(x)
    assert len(pickle.dumps(net)) == size and not any("fold" in name for name in net[0].__dict__ | net[1].__dict__)
    twin = copy.deepcopy(net)
    assert not is_folded(twin[1])
    twin[0].weight.mul_(2)
    assert torch.equal(net(x), before) and not torch.allclose(twin(x), before)


def test_a_fold_goes_with_its_module():
    net = scramble(ConvBNReLU(4, 8)).eval()
    net(torch.randn(1, 4, 6, 6))
    weight = weakref.ref(conv_steps._folds[net[1]].folded.weight)
    count = len(conv_steps._folds)
    del net
    assert weight() is None and len(conv_steps._folds) == count - 1


def test_row41_one_bn_behind_two_convolutions():
    conv, bn, x = parts()
    other = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    for _, c in itertools.product(range(3), (conv, other)):
        torch.testing.assert_close(conv_bn_act(x, c, bn), stock(x, c, bn))


# ---- what never starts one -------------------------------------------------------------------------------------------


def test_gradients_run_the_two_operators():
    for wants in ("x", "weight", "gamma", "residual"):
        conv, bn, x = parts()
        r = torch.randn(2, 16, 9, 9)
        conv.requires_grad_(False), bn.requires_grad_(False)
        {"x": x, "weight": conv.weight, "gamma": bn.weight, "residual": r}[wants].requires_grad_()
        with torch.enable_grad():
            y = conv_bn_act(x, conv, bn, r)
            assert y.requires_grad and not is_folded(bn)
            y.sum().backward()
    conv, bn, x = parts()
    conv.requires_grad_(False), bn.requires_grad_(False)
    with torch.enable_grad():
        assert not conv_bn_act(x, conv, bn).requires_grad and is_folded(bn)


def test_train_mode_moves_the_statistics():
    conv, bn, x = parts()
    conv_bn_act(x, conv, bn)
    bn.train()
    before = bn.running_mean.clone()
    conv_bn_act(x, conv, bn)
    assert not torch.equal(before, bn.running_mean) and not is_folded(bn)


@pytest.mark.parametrize("case", ["float64", "a named backend", "FASTRES_BACKEND", "autocast", "global hook",
                                  "functional_call", "bad variance", "compile", "fx", "meta", "dtype"])  # fmt: skip
def test_calls_that_are_left_alone(case, monkeypatch):
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
    assert not is_folded(bn) or case == "dtype"
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


def test_inference_mode_folds_are_good_outside_it():
    conv, bn, x = parts()
    with torch.inference_mode():
        y = conv_bn_act(x, conv, bn)
    assert is_folded(bn) and not conv_steps._folds[bn].folded.weight.is_inference()
    assert torch.equal(conv_bn_act(x, conv, bn), y)
