"""The CPU product for 1x1 convolutions: the native operators against float64, and its place in a frozen network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres._extension import build_info, native_cpu  # noqa: F401  (`run_on` asks the module)
from fastres.ops import _conv_native as native
from fastres.ops._conv_frozen import stock
from freeze_cases import compare
from guards import guarded, run_on
from swap_cases import scramble

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(native_cpu() is None, reason="the C++ extension is not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, C, K, H, W, stride: tails of channels, of panels and of rows; more panels than pixels
SHAPES = [
    (1, 16, 32, 8, 8, (1, 1)),
    (2, 3, 5, 7, 9, (2, 2)),
    (3, 17, 33, 10, 5, (1, 2)),
    (2, 64, 256, 28, 28, (1, 1)),
    (1, 40, 100, 13, 11, (3, 1)),
    (1, 300, 700, 2, 3, (1, 1)),
    (1, 1, 1, 1, 1, (2, 2)),
]


def tensors(n, c, k, h, w, stride, dtype=torch.float32, draw=torch.randn):
    p, q = -(-h // stride[0]), -(-w // stride[1])
    sizes = ((n, c, h, w), (k, c, 1, 1), (k,), (n, k, p, q), (k,))
    x, weight, bias, residual, scale = (draw(size).to(dtype) for size in sizes)
    return x.contiguous(memory_format=LAST), weight, bias, residual.contiguous(memory_format=LAST), scale


def run(x, weight, bias, residual, scale, stride, act):
    return native.forward_1x1(
        x, native.pack_direct(weight.float()), bias, residual, scale, weight.shape[0], *stride, act
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64_within_twice_eager_s_error(dtype, shape):
    torch.manual_seed(0)
    x, weight, bias, residual, scale = tensors(*shape, dtype=dtype)
    where = shape[-1], (0, 0), (1, 1), 1
    for after in ((bias, residual, scale), (bias, None, None), (None, residual, None), (None, None, scale)):
        for act in native.ACTS:
            wide = [None if t is None else t.double() for t in after]
            want = stock(x.double(), weight.double(), *wide, *where, act)
            eager, got = stock(x, weight, *after, *where, act), run(x, weight, *after, shape[-1], act)
            assert got.dtype is dtype and got.shape == want.shape and got.is_contiguous(memory_format=LAST)
            error, its = (float((y.double() - want).square().mean().sqrt()) for y in (got, eager))
            assert error <= 2 * its + 1e-6 * (1 + float(want.abs().max())), act


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact_so_that_no_index_is_off(shape):
    x, weight, bias, residual, scale = tensors(*shape, draw=lambda size: torch.randint(-5, 6, size).float())
    want = F.conv2d(x, weight, None, shape[-1]) * scale[:, None, None] + bias[:, None, None] + residual
    assert torch.equal(run(x, weight, bias, residual, scale, shape[-1], "relu"), want.relu())


@pytest.mark.parametrize("shape", SHAPES)
def test_nan_and_infinity_pass_as_eager_s(shape):
    x, weight, bias, residual, _ = tensors(*shape)
    for value in (float("nan"), float("inf")):
        x[0, 0, 0, 0] = value
        want = stock(x, weight, bias, residual, None, shape[-1], (0, 0), (1, 1), 1, "relu")
        got = run(x, weight, bias, residual, None, shape[-1], "relu")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_change_no_bit(shape):
    given, before = tensors(*shape), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(run(*given, shape[-1], "relu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_outside_its_tensors_is_read_or_written(dtype, shape):
    x, weight, bias, residual, scale = tensors(*shape, dtype=dtype)
    want = run(x, weight, bias, residual, scale, shape[-1], "relu")
    (x, _), (bias, _), (scale, _), (residual, memory) = map(guarded, (x, bias, scale, residual))
    u = guarded(native.pack_direct(weight.float()))[0]  # fp32: where bf16 has pairs, "direct" has 1x1 too
    got = native.into_1x1(x, u, bias, residual, scale, shape[2], *shape[-1], "relu", residual)
    assert got.data_ptr() == residual.data_ptr() and torch.equal(got, want)
    assert memory[:128].isnan().all() and memory[128 + residual.numel() :].isnan().all()


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_instruction_sets(isa):
    calls = """
    for shape in tests.SHAPES:
        tests.test_integers_are_exact_so_that_no_index_is_off(shape)
        for dtype in tests.DTYPES:
            tests.test_against_float64_within_twice_eager_s_error(dtype, shape)
            tests.test_nothing_outside_its_tensors_is_read_or_written(dtype, shape)
    """
    run_on(isa, "test_conv_1x1", calls)


def test_refusals_and_arguments_that_do_not_fit():
    x, weight, bias, residual, scale = tensors(2, 16, 24, 8, 8, (1, 1))
    u, whole = native.pack_direct(weight), ((2, 2), (0, 0), (1, 1), 1)
    assert native.why_not_1x1(x, (24, 16, 1, 1), whole, "relu") == []
    for shape, where, words in (
        ((24, 16, 3, 3), whole, "3x3"),
        ((24, 16, 1, 1), ((1, 1), (1, 1), (1, 1), 1), "padding"),
        ((24, 8, 1, 1), ((1, 1), (0, 0), (1, 1), 2), "2 groups"),
    ):
        (reason,) = native.why_not_1x1(x, shape, where, "relu")
        assert words in reason
    with pytest.raises(RuntimeError, match=r"weight: got shape \[4, 16, 3\]"):
        native.pack_direct(torch.ones(4, 16, 3))
    for changed, words in (
        ({0: x.contiguous()}, "channels_last"),
        ({1: u[:, :, :3]}, "u: got"),
        ({1: native.pack_direct(torch.ones(24, 16, 3, 3))}, "u: got"),
        ({6: 0}, "stride: got 0"),
    ):
        arguments = [x, u, bias, residual, scale, 24, 1, 1, "relu"]
        for place, value in changed.items():
            arguments[place] = value
        with pytest.raises(RuntimeError, match=words):
            native.forward_1x1(*arguments)


def test_in_a_frozen_network_with_a_residual_and_a_stride():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(24, 40, 1, bias=False), nn.BatchNorm2d(40)
            self.shortcut, self.other = nn.Conv2d(40, 40, 1, 2), nn.Conv2d(40, 40, 1, 2)

        def forward(self, x):
            y = torch.relu(self.bn(self.conv(x)))
            return torch.relu(self.other(y) + self.shortcut(y))

    net, x = scramble(Net()).eval(), torch.randn(2, 24, 14, 14)
    frozen = fastres.freeze(net, x, tune=False)
    executor, inputs, constants = frozen.prepared(x)
    keys = [choices.key for choices, _ in executor.find_choices(inputs, constants)]
    frozen.choose(dict.fromkeys(keys, "product"))
    for batch in (2, 1, 5):
        compare(net, frozen, torch.randn(batch, 24, 14, 14))
    frozen(x)
    assert list(executor.ways(inputs).values()) == ["product"] * 3
