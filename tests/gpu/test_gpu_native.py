"""fastres._C_cuda on a GPU, where it differs from the Triton kernels: the fast path, errors, what it says of itself."""

import sys

import pytest
import torch
from torch import nn

import fastres
from fastres import _dispatch, _extension
from fastres.functional import add_relu, bn_act
from gpu_device import captured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
OPS = torch.ops.fastres
LAYOUTS = pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format), ids=("nhwc", "nchw"))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))


@pytest.fixture(autouse=True)
def _module_usable():
    reasons = _dispatch.refusals(_dispatch.OPERATORS["bn_act"].backends["cuda"], torch.empty(1, device="cuda"))
    if reasons:
        pytest.skip("; ".join(reasons))


def random(shape, dtype, layout):
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)


def step(x, residual, weight, bias, stats, training):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    y = bn_act(leaves[0], *stats[:2], *leaves[1:], training=training, num_batches_tracked=stats[2], backend="cuda")
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y)), *stats]


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("training", (True, False))
def test_the_fast_path_and_the_dispatcher_path_agree(training, layout, dtype, monkeypatch):
    x, residual = random((5, 24, 9, 9), dtype, layout), random((5, 24, 9, 9), dtype, layout)
    weight, bias = torch.randn(2, 24, device="cuda")
    stats = torch.randn(24, device="cuda"), torch.rand(24, device="cuda") + 0.5, torch.tensor(3, device="cuda")
    fast = step(x, residual, weight, bias, [t.clone() for t in stats], training)
    # the module, which the package's function of the same name hides
    monkeypatch.setattr(sys.modules["fastres.ops.bn_act"], "is_plain_eager", lambda *tensors: False)
    dispatched = step(x, residual, weight, bias, [t.clone() for t in stats], training)
    for i, (a, b) in enumerate(zip(fast, dispatched, strict=True)):
        if i in (5, 6):  # the running statistics: moved in the merge, or by torch's own operations
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(a, b), i
    assert fast[7] == (4 if training else 3) and fastres.explain("bn_act", x).chosen == "cuda"


@LAYOUTS
def test_row27_running_statistics_advance_with_every_replay(layout):
    bn = nn.BatchNorm2d(24, device="cuda")
    reference = nn.BatchNorm2d(24, device="cuda")
    x = random((6, 24, 10, 10), torch.float32, layout)

    def run():
        return bn_act(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=True,
            num_batches_tracked=bn.num_batches_tracked, backend="cuda",
        )  # fmt: skip

    with torch.no_grad():
        graph, y = captured(run)
        reference(x)
    for i in range(10):
        x.normal_(i, 1 + i)
        graph.replay()
        torch.testing.assert_close(y, torch.relu(reference(x)), rtol=1e-4, atol=1e-5)
    assert bn.num_batches_tracked == reference.num_batches_tracked == 11
    torch.testing.assert_close(bn.running_mean, reference.running_mean)
    torch.testing.assert_close(bn.running_var, reference.running_var)


def test_row3_empty_tensors_launch_nothing():
    for shape in ((0, 8, 4, 4), (2, 8, 0, 4)):
        x = torch.empty(shape, device="cuda", requires_grad=True)
        mean, var = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
        y = bn_act(x, mean, var, training=True, backend="cuda")
        assert y.shape == x.shape and not mean.any() and var.eq(1).all()
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert add_relu(x, x, backend="cuda").shape == x.shape
    assert OPS._add_relu_native(torch.empty(0, device="cuda"), torch.empty(0, device="cuda")) is None


def test_row5_other_tensors_return_nothing_and_move_nothing():
    x, v = torch.randn(2, 6, 3, 3, device="cuda"), torch.ones(6, device="cuda")
    base = [x, v, v, x, v.clone(), v.clone(), None, True, 0.1, 1e-5, True, False]
    wrong = [
        (0, x.double()),
        (0, x[:, :, ::2]),
        (1, v.cpu()),
        (1, torch.ones(7, device="cuda")),
        (2, v.half()),
        (3, torch.ones(2, 6, 3, 4, device="cuda")),
        (3, x.contiguous(memory_format=torch.channels_last)),
        (6, torch.tensor(0)),
        (11, True),  # written over in training
    ]
    for index, value in wrong:
        assert list(OPS._bn_act_native(*base[:index], value, *base[index + 1 :])) == [None] * 3, (index, value)
    assert OPS._add_relu_native(x.double(), x.double()) is None
    torch.cuda.synchronize()
    assert base[4].eq(1).all() and base[5].eq(1).all()
    assert torch.isfinite(OPS._bn_act_native(*base)[0]).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_row28_the_tensors_own_device_is_used():
    x = torch.randn(4, 16, 8, 8, device="cuda:1")
    with torch.cuda.device(0):
        y = bn_act(x, torch.zeros(16, device=x.device), torch.ones(16, device=x.device), backend="cuda")
        assert torch.cuda.current_device() == 0
    assert y.device == x.device and torch.equal(y, torch.relu((x - 0) * (1 / torch.tensor(1 + 1e-5).sqrt()).item()))


def test_kernel_attributes_and_info():
    found = _extension.kernel_attributes()
    major, _ = torch.cuda.get_device_capability()
    assert len(found) > 50
    data_moving = {name: kernel for name, kernel in found.items() if not name.startswith("conv_act<")}
    for name, kernel in data_moving.items():  # those that multiply: test_gpu_conv_launch.py
        assert kernel["local_bytes"] == 0 and kernel["registers"] <= 128, name
        assert kernel["blocks_per_multiprocessor"] * kernel["threads"] >= 512, name
        assert kernel["architecture"] // 10 == major or "+PTX" in _extension.build_info_cuda()["architectures"]
    text = str(fastres.info(init_cuda=True))
    assert "kernels on the GPU" in text and "bn_act<half, 8>" in text
