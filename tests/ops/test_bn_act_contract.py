"""The whole contract of nn.BatchNorm2d, kept by bn_act_module: statistics, counters, modes, dtypes, autocast."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fastres.functional import bn_act_module


def pair(channels=4, **settings):
    bn = nn.BatchNorm2d(channels, **settings)
    with torch.no_grad():
        for t in bn.parameters():
            t.uniform_(0.5, 1.5)
    return bn, copy.deepcopy(bn)


def both(ours, theirs, x, residual=None, backend="auto"):
    y = bn_act_module(x, ours, residual, backend=backend)
    z = theirs(x)
    want = F.relu(z if residual is None else z + residual)
    torch.testing.assert_close(y, want)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
    return y, want


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_row15_momentum(backend, momentum):
    ours, theirs = pair(momentum=momentum)
    for _ in range(5):
        both(ours, theirs, torch.randn(3, 4, 5, 5) * 3 + 1, backend=backend)
    assert ours.num_batches_tracked == 5


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("flipped", [True, False])
def test_row16_tracking_matrix(backend, tracked, training, flipped):
    ours, theirs = pair(track_running_stats=tracked)
    for bn in (ours, theirs):
        bn.train(training)
        if flipped:
            bn.track_running_stats = not tracked
    if tracked or not (flipped and training):
        both(ours, theirs, torch.randn(3, 4, 5, 5), backend=backend)
    both(ours, theirs, torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), backend=backend)


def test_row16_counter_deleted(backend):
    ours, theirs = pair()
    for bn in (ours, theirs):
        bn.num_batches_tracked = None
    both(ours, theirs, torch.randn(3, 4, 2, 2), backend=backend)


def test_row17_running_variance_is_unbiased_at_two_values(backend):
    ours, _ = pair(1, momentum=1.0, affine=False)
    bn_act_module(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), ours, backend=backend)
    assert ours.running_var.item() == 2.0 and ours.running_mean.item() == 2.0  # biased: 1.0


@pytest.mark.parametrize("affine", [True, False])
def test_row20_dtypes(backend, affine):
    dtypes = [torch.float16, torch.bfloat16][: 1 + (backend != "triton")]
    for dtype, half_params in itertools.product(dtypes, (False, True)):
        ours, _ = pair(affine=affine)
        if half_params:
            ours = ours.to(dtype)
        x = torch.randn(3, 4, 5, 5).to(dtype).requires_grad_()
        y = bn_act_module(x, ours, backend=backend)
        y.sum().backward()
        assert y.dtype == dtype and x.grad.dtype == dtype
        assert ours.running_mean.dtype == (dtype if half_params else torch.float32)
        if affine:
            assert ours.weight.grad.dtype == ours.weight.dtype
        params = [p.detach().float() for p in ours.parameters()]
        want = F.relu(F.batch_norm(x.detach().float(), None, None, *params, training=True))
        torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row21_autocast_gives_eagers_dtypes(backend, dtype):
    if backend == "triton" and dtype is torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 is wrong")
    conv = nn.Conv2d(3, 4, 3)
    ours, theirs = pair()
    x = torch.randn(2, 3, 8, 8)

    def step(f, bn):
        with torch.autocast("cpu", dtype=dtype):
            y = f(conv(x))
            with torch.autocast("cpu", enabled=False):
                z = f(conv(x))
        grads = torch.autograd.grad(y.float().sum() + z.sum(), [*conv.parameters(), *bn.parameters()])
        return y, z, grads

    got = step(lambda t: bn_act_module(t, ours, backend=backend), ours)
    want = step(lambda t: F.relu(theirs(t)), theirs)
    assert got[0].dtype == want[0].dtype == dtype and got[1].dtype == want[1].dtype == torch.float32
    torch.testing.assert_close(got[0], want[0], rtol=3e-2, atol=3e-2)
    for g, w in zip(got[2], want[2], strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=5e-2, atol=5e-2 * w.abs().max().item())


def test_row18_backward_uses_the_mode_and_statistics_of_its_forward(backend):
    ours, theirs = pair()
    x = torch.randn(3, 4, 5, 5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = bn_act_module(a, ours.eval(), backend=backend), F.relu(theirs.eval()(b))
    (expected,) = torch.autograd.grad(want.sum(), b)
    bn_act_module(torch.randn(3, 4, 5, 5) * 9, ours.train(), backend=backend)  # moves the buffers
    (got,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(got, expected)


def test_row25_two_forwards_before_two_backwards(backend):
    ours, theirs = pair()
    xs = [torch.randn(3, 4, 5, 5) * k for k in (1, 7)]
    got = [bn_act_module(x, ours, backend=backend) for x in xs]
    want = [F.relu(theirs(x)) for x in xs]
    for g, w in zip(reversed(got), reversed(want), strict=True):
        g.square().sum().backward()
        w.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_row26_checkpoint_updates_as_pytorch(backend, reentrant):
    ours, theirs = pair()
    x = torch.randn(3, 4, 5, 5)
    # early stop ends the recomputation at the last saved tensor: then a region's last bn_act moves its statistics once
    with set_checkpoint_early_stop(False):
        for f in (lambda t: bn_act_module(t, ours, backend=backend), lambda t: F.relu(theirs(t))):
            checkpoint(f, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()))
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 2


def test_row22_scalars_do_not_promote(backend):
    ours, _ = pair(eps=1e-3)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    assert bn_act_module(x, ours, backend=backend).dtype == torch.float32
    assert not ours.running_mean.requires_grad and ours.running_mean.grad_fn is None


def test_functional_call_and_inference_mode(backend):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return bn_act_module(x, self.bn, backend=backend)

    net, x = Net().eval(), torch.randn(2, 4, 3, 3)
    doubled = {name: t * 2 for name, t in net.state_dict().items()}
    got = torch.func.functional_call(net, doubled, (x,))
    want = F.relu(F.batch_norm(x, *(doubled[f"bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))))
    torch.testing.assert_close(got, want)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), F.relu(net.bn(x)))


def test_not_a_batch_norm():
    with pytest.raises(TypeError, match="bn: got ReLU, expected a torch.nn.BatchNorm2d"):
        bn_act_module(torch.zeros(2, 3, 1, 1), nn.ReLU())
