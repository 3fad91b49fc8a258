"""The fast path of bn_act and add_relu (the native operator) against the dispatcher path, and who takes which."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastres.ops  # noqa: F401  (declares the operators that fastres._C implements)
from fastres import _extension
from fastres.functional import add_relu, bn_act, bn_act_module
from referee import DTYPES, LAYOUTS, layout
from shapes import ACTIVATIONS

if _extension.native_cpu() is None:
    pytest.skip(f"the compiled CPU kernels are not here: {_extension.why_not_cpu()}", allow_module_level=True)

OPS = torch.ops.fastres
NAMES = ("fastres::bn_act", "fastres::add_relu")
NATIVE = ("fastres::_bn_act_native", "fastres::_add_relu_native")


class Between(TorchDispatchMode):
    """Stands between the call and the kernel and changes nothing: the dispatcher path is taken."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def called(f):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        f()
    return {event.key for event in trace.key_averages() if event.key.startswith("fastres::")}


def problem(shape, dtype=torch.float32, kind="nchw", needs=(True,) * 4):
    c = shape[1]
    tensors = (torch.randn(shape).to(dtype), torch.rand(c) + 0.5, torch.randn(c), torch.randn(shape).to(dtype))
    x, weight, bias, residual = (
        (layout(t, kind) if t.ndim == 4 else t).requires_grad_(need) for t, need in zip(tensors, needs, strict=True)
    )
    return x, weight, bias, residual


def results(y, leaves):
    """y, and the gradients of the leaves that need one."""
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)) if wanted else ()
    return [y.detach(), *grads]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", "none"])
def test_both_paths_give_the_same_bits(dtype, training, act):
    shapes = [(3, 8, 5, 6), (2, 17, 7, 7), (2, 4, 1, 1), (2, 1, 3, 3), (1, 4, 2, 1), (2, 1, 1, 1), (1, 1, 5, 5)]
    for kind, shape, needs in itertools.product(LAYOUTS[:2], shapes, itertools.product([False, True], repeat=4)):
        x, weight, bias, residual = leaves = problem(shape, dtype, kind, needs)
        found = []
        for mode in (contextlib.nullcontext(), Between()):
            state = torch.linspace(-1, 1, shape[1]), torch.linspace(0.5, 2, shape[1]), torch.tensor(3)
            with mode:
                how = {"act": act, "training": training, "num_batches_tracked": state[2]}
                y = bn_act(x, *state[:2], weight, bias, residual, **how)
                found.append([*results(y, leaves), *state])
        assert "fastres::bn_act" in mode.names
        running = range(len(found[0]) - 3, len(found[0]) - 1)  # their update is rounded once, or twice
        for i, (fast, dispatched) in enumerate(zip(*found, strict=True)):
            assert fast.stride() == dispatched.stride() and fast.dtype == dispatched.dtype
            rtol, atol = (3e-7, 1e-7) if i in running else (0, 0)
            torch.testing.assert_close(fast, dispatched, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_relu_both_paths_give_the_same_bits(dtype):
    for kind, needs in itertools.product(LAYOUTS[:2], itertools.product([False, True], repeat=2)):
        x, _, _, residual = problem((3, 8, 5, 6), dtype, kind, (needs[0], False, False, needs[1]))
        fast = results(add_relu(x, residual), (x, residual))
        with Between() as mode:
            dispatched = results(add_relu(x, residual), (x, residual))
        assert "fastres::add_relu" in mode.names
        for a, b in zip(fast, dispatched, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("kind", LAYOUTS[:2])
def test_every_resnet_shape_takes_the_fast_path(kind):
    for activation, dtype, training in itertools.product(ACTIVATIONS, DTYPES, (True, False)):
        channels, shape = activation.channels, (2, activation.channels, activation.height, activation.width)
        x = layout(torch.zeros(shape, dtype=dtype), kind)
        stats = torch.zeros(channels), torch.ones(channels)
        found = OPS._bn_act_native(x, *stats, x, *stats, torch.tensor(0), training, 0.1, 1e-5, True, False)
        y, mean, var = found
        assert y is not None and y.stride() == x.stride(), (activation, kind, dtype)
        grads = OPS._bn_act_backward_native(x, x, y, stats[1], None, mean, var, training, 1e-5, True, 0b1111, False)
        assert all(g is not None for g in grads)
        assert OPS._add_relu_native(x, x) is not None and OPS._add_relu_backward_native(x, y) is not None


LEFT = {  # what the fast path leaves: the dispatcher path runs it, or raises
    "fp64": {"x": torch.randn(2, 4, 3, 3).double()},
    "every second channel": {"x": layout(torch.randn(2, 4, 3, 3), "every_second")},
    "transposed": {"x": layout(torch.randn(2, 4, 3, 3), "transposed")},
    "odd strides of one pixel": {"x": torch.randn(2, 4, 1, 1).as_strided((2, 4, 1, 1), (4, 1, 9, 9))},
    "empty": {"x": torch.randn(0, 4, 3, 3)},
    "residual in another layout": {"residual": layout(torch.randn(2, 4, 3, 3), "channels_last")},
    "half parameters": {"weight": torch.ones(4).half()},
    "strided parameters": {"weight": torch.ones(8)[::2]},
    "half statistics": {"running_mean": torch.zeros(4).half(), "running_var": torch.ones(4).half()},
    "an int32 counter": {"num_batches_tracked": torch.tensor(0, dtype=torch.int32)},
    "cumulative average": {"momentum": None, "num_batches_tracked": torch.tensor(0)},
}


@pytest.mark.parametrize("change", LEFT.values(), ids=LEFT)
def test_what_the_fast_path_leaves_takes_the_dispatcher_path(change):
    given = {"x": torch.randn(2, 4, 3, 3), "weight": torch.ones(4), "running_mean": None, "running_var": None, **change}
    names = called(lambda: bn_act(**given, training=True, act="relu"))
    assert "fastres::bn_act" in names


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 4, 3)},
        {"x": torch.zeros(2, 4, 3, 3).int()},
        {"x": torch.zeros(1, 4, 1, 1)},
        {"residual": torch.zeros(2, 4, 3, 2)},
        {"residual": torch.zeros(2, 4, 3, 3).half()},
        {"weight": torch.ones(3)},
        {"weight": torch.ones(4, device="meta")},
        {"running_mean": torch.zeros(5), "running_var": torch.ones(5)},
    ],
)
def test_a_bad_call_returns_nothing_and_moves_nothing(change):
    mean, var, count = torch.zeros(4), torch.ones(4), torch.tensor(0)
    given = {"x": torch.randn(2, 4, 3, 3), "weight": torch.ones(4), "residual": None}
    given |= {"running_mean": mean, "running_var": var} | change
    x, weight, residual = (given[name] for name in ("x", "weight", "residual"))
    found = OPS._bn_act_native(
        x, weight, None, residual, given["running_mean"], given["running_var"], count, True, 0.1, 1e-5, True, False
    )
    assert list(found) == [None] * 3
    assert not mean.any() and (var == 1).all() and count == 0


def test_running_statistics_bump_their_versions():
    bn = nn.BatchNorm2d(4)
    before = [t._version for t in bn.buffers()]
    names = called(lambda: bn_act_module(torch.randn(2, 4, 3, 3), bn))
    assert names == {"fastres::_bn_act_native"}
    assert all(t._version > old for t, old in zip(bn.buffers(), before, strict=True))
    before = [t._version for t in bn.buffers()]
    bn_act_module(torch.randn(2, 4, 3, 3), bn.eval())
    assert [t._version for t in bn.buffers()] == before


def test_transforms_tracers_and_subclasses_see_the_operator():
    x, weight, bias, residual = problem((2, 4, 3, 3), needs=(False,) * 4)

    def f(x, r):
        return add_relu(bn_act(x, None, None, weight, bias, r, training=True), r)

    want = f(x, residual)
    batched = torch.func.vmap(f)(torch.stack([x, x]), torch.stack([residual, residual]))
    torch.testing.assert_close(batched, torch.stack([want, want]))
    traced = torch.jit.trace(f, (x, residual), check_trace=False)
    assert all(name in str(traced.graph) for name in NAMES)
    graph = torch.fx.experimental.proxy_tensor.make_fx(f)(x, residual)
    assert all(name.replace("::", ".") in graph.code for name in NAMES)
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        assert f(fake.from_tensor(x), fake.from_tensor(residual)).shape == want.shape
    assert called(lambda: f(x, residual)) == set(NATIVE)


@pytest.mark.parametrize("name", ["bn_act", "add_relu", "conv_act"])
def test_the_operators_themselves_refuse_tangents_and_lose_none(name):
    """torch.ops.fastres.*, which has no rule for them; fastres.functional runs stock operators there."""
    x = torch.randn(2, 4, 3, 3)
    op = getattr(torch.ops.fastres, name)
    call = {
        "bn_act": lambda x: op(x, None, None, None, None, None, True, 1e-5, "relu")[0],
        "add_relu": lambda x: op(x, x),
        "conv_act": lambda x: op(x, torch.randn(4, 4, 1, 1), *[None] * 3, (1, 1), (0, 0), (1, 1), 1, "relu"),
    }[name]
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=f"fastres::{name}: got a tensor with a tangent"):
            call(forward_ad.make_dual(x, torch.ones_like(x)))
        assert call(x).shape == x.shape  # nothing to lose
    assert call(x).shape == x.shape


def test_batched_gradients_take_the_dispatcher_path():
    x, weight, bias, residual = leaves = problem((2, 4, 3, 3))
    y = bn_act(x, None, None, weight, bias, residual, training=True)
    dys = torch.randn(3, *y.shape)
    got = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    for k, dy in enumerate(dys):
        want = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[k], b)


@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5), (2, 3, 4, 5, 6), (1, 3, 4, 5, 6), (4, 1)], ids=str)
def test_add_relu_keeps_eagers_strides_in_every_order_of_dimensions(shape):
    for order in itertools.permutations(range(len(shape))):
        x, residual = (
            torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
            for _ in range(2)
        )
        for r in (residual, residual.contiguous()):
            for mode in (contextlib.nullcontext(), Between()):
                with mode:
                    y, want = add_relu(x, r), torch.relu(x + r)
                assert torch.equal(y, want) and y.stride() == want.stride(), (order, mode)
