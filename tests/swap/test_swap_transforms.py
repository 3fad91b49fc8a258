"""torch.func and forward-mode differentiation over swapped networks and over the operators: stock's answers.

Inside a transform PyTorch's operators run, so that the comparison is exact up to rounding.
"""

import copy
from collections import OrderedDict as Named

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import fastres
from fastres.functional import add_relu, bn_act, conv_act
from fastres.nn import BasicBlock, Bottleneck, ConvBNReLU
from fastres.swap import swap
from swap_cases import fused_calls, images, projection, scramble, tiny

B, H = 3, 8


def functions(net):
    """A loss of the parameters and one image; the network as a function of an image."""
    values = {name: t.detach() for name, t in net.named_parameters()}

    def loss(values, x):
        return functional_call(net, values, (x,)).square().mean()

    return values, loss


def single(net):
    return lambda x: net(x.unsqueeze(0)).squeeze(0)


def dual(net, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def per_sample_gradients(net, x):
    values, loss = functions(net)
    return vmap(grad(loss), in_dims=(None, 0))(values, x.unsqueeze(1))


def ensemble(net, x):
    """vmap(grad) over stacked networks."""
    nets = [net, scramble(copy.deepcopy(net))]
    values, buffers = stack_module_state(nets)
    skeleton = copy.deepcopy(net).to("meta")

    def loss(values, buffers, x):
        return functional_call(skeleton, (values, buffers), (x,)).square().mean()

    return vmap(grad(loss), in_dims=(0, 0, None))({k: v.detach() for k, v in values.items()}, buffers, x)


def parameter_gradients(net, x):
    values, loss = functions(net)
    return grad(loss)(values, x)


def penalty(net, x):
    return grad(lambda x: grad(lambda x: net(x).square().mean())(x).square().sum())(x)


def small_hessian(net, x):
    direction = torch.randn(2, *x.shape, dtype=x.dtype)
    return hessian(lambda a: net(x + (a[:, None, None, None, None] * direction).sum(0)).square().mean())(
        torch.zeros(2, dtype=x.dtype)
    )


def outer_tape(net, x):
    """vmap over torch.autograd.grad of a graph that was made outside."""
    x = x.clone().requires_grad_()
    y = net(x)
    return vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(torch.randn(2, *y.shape, dtype=y.dtype))


AUTOGRAD = torch.autograd.functional
RUNS = {
    "grad": parameter_gradients,
    "grad(grad)": penalty,
    "jvp": lambda net, x: jvp(net, (x,), (torch.ones_like(x),)),
    "vjp": lambda net, x: (lambda y, f: (y, f(torch.ones_like(y))))(*vjp(net, x)),
    "jacrev": lambda net, x: jacrev(net)(x),
    "jacfwd": lambda net, x: jacfwd(lambda a: net(x * a))(torch.ones(1, dtype=x.dtype)),
    "hessian": small_hessian,
    "forward_ad": dual,
    "autograd jvp": lambda net, x: AUTOGRAD.jvp(net, x, torch.ones_like(x)),
    "autograd hessian": lambda net, x: AUTOGRAD.hessian(
        lambda a: net(x * a).square().mean(), torch.ones(1, dtype=x.dtype)
    ),
    "autograd jacobian, forward": lambda net, x: AUTOGRAD.jacobian(
        lambda a: net(x * a), torch.ones(1, dtype=x.dtype), strategy="forward-mode", vectorize=True
    ),
    "vmap(autograd.grad)": outer_tape,
    "vmap": lambda net, x: vmap(single(net))(x),
    "vmap(jacrev)": lambda net, x: vmap(jacrev(single(net)))(x),
    "vmap(jacfwd)": lambda net, x: vmap(jacfwd(lambda x, a: single(net)(x * a), argnums=1), in_dims=(0, None))(
        x, torch.ones(1, dtype=x.dtype)
    ),
    "per-sample gradients": per_sample_gradients,
    "ensemble": ensemble,
}  # fmt: skip


class Operators(nn.Module):
    """Every operator of fastres.functional, or the stock functions that they stand for."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        torch.manual_seed(3)
        for name, shape in (("w1", (4, 3, 3, 3)), ("w2", (4, 4, 1, 1)), ("b", (4,)), ("scale", (4,)), ("r", (4, 1, 1))):
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
        self.register_buffer("mean", torch.randn(4, dtype=torch.float64))
        self.register_buffer("var", torch.rand(4, dtype=torch.float64) + 0.5)

    def forward(self, x):
        statistics = (None, None) if self.training else (self.mean, self.var)
        if self.fused:
            y = conv_act(x, self.w1, self.b, padding=1, act="silu")
            z = conv_act(y, self.w2, self.b, self.r.expand_as(y), self.scale, act="relu6")
            z = bn_act(z, *statistics, self.scale, self.b, y, training=self.training)
            return add_relu(bn_act(z, *statistics, act="none", training=self.training), y)
        y = F.silu(F.conv2d(x, self.w1, self.b, padding=1))
        z = F.conv2d(y, self.w2) * self.scale[:, None, None] + self.b[:, None, None] + self.r
        z = F.batch_norm(F.relu6(z), *statistics, self.scale, self.b, self.training)
        z = torch.relu(z + y)
        return torch.relu(F.batch_norm(z, *statistics, training=self.training) + y)


def ours(net):
    """`tiny` made of fastres.nn."""
    blocks = Named(
        stem=ConvBNReLU(3, 8),
        layer1=nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, 2, projection(8, 16, 2))),
        layer2=nn.Sequential(Bottleneck(16, 4), Bottleneck(16, 8, 2, projection(16, 32, 2))),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(32, 5),
    )
    made = nn.Sequential(blocks).double()
    made.load_state_dict(net.state_dict())
    return made


def swapped(net, **options):
    net = copy.deepcopy(net)
    swap(net, strict=True, **options)
    return net


PAIRS = {  # a stock network, and what has to equal it
    "swapped": (tiny, swapped),
    "swapped, min": (tiny, lambda net: swapped(net, memory="min", checkpoint_bn="once")),
    "fastres.nn": (tiny, ours),
    "operators": (lambda: Operators(False), lambda net: Operators(True)),
}


def assert_equal(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_row57_transforms_answer_as_stock(run, train, pair):
    stock, net = pair[0](), pair[1](pair[0]())
    x, calls = images(B, H), fused_calls(copy.deepcopy(net), images(B, H))
    results = []
    for model in (stock, net):
        if train:  # stock BN refuses to write to its statistics inside a transform
            torch.func.replace_all_batch_norm_modules_(model)
        torch.manual_seed(2)
        results.append(run(model.train(train), x))
    assert_equal(*results[::-1])
    assert fused_calls(net, x) == calls > 0  # outside of a transform ours again


@pytest.mark.parametrize("momentum", [0.1, None])
def test_row57_statistics_move_as_stocks(momentum):
    """Where stock BN may write to them: under forward-mode AD, and inside grad when they are its arguments."""
    results = []
    for build in (lambda net: net, swapped):
        net = build(tiny())
        for module in net.modules():
            module.momentum = momentum
        x, state = images(B, H), {k: v.detach().clone() for k, v in net.state_dict().items()}
        torch.manual_seed(2)

        def loss(x, state, net=net):
            return functional_call(net, state, (x,)).square().mean(), state

        results.append([dual(net, x), net.state_dict(), grad(loss, has_aux=True)(x, state)])
    assert_equal(*results[::-1])
    assert int(results[1][1]["stem.1.num_batches_tracked"]) == 1


@pytest.mark.parametrize(
    "transform", [lambda f: vmap(lambda x: f(x)), lambda f: grad(lambda x: f(x[0]).sum())], ids=["vmap", "grad"]
)
def test_row57_a_compiled_transform(transform):
    stock = tiny(torch.float32).eval()
    net, x = swapped(stock), images(2 * B, H, torch.float32).unflatten(0, (2, B))
    got = torch.compile(transform(net), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, transform(stock)(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_row57_a_named_backend_refuses_and_bad_arguments_are_named():
    x = images(B, H)
    net = Operators(True).eval()
    with pytest.raises(fastres.BackendError, match="add_relu: backend 'cpu' refuses: PyTorch's operators alone"):
        vmap(lambda x: add_relu(x, x, backend="cpu"))(x)
    with pytest.raises(ValueError, match="backend: got 'xyz'"):
        vmap(lambda x: add_relu(x, x, backend="xyz"))(x)
    with pytest.raises(ValueError, match=r"bn_act: running_mean: got shape \[4\], expected \[3\]"):
        grad(lambda x: bn_act(x, net.mean, net.var).sum())(x)
    with pytest.raises(ValueError, match="conv_act: x: got 3 dimensions"):
        vmap(lambda x: conv_act(x, net.w1))(x)
