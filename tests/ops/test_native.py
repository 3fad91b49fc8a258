"""The native kernels, called directly (`_<op>_native`) and held against the same maths in fp64.

Three lanes: the C++ CPU kernels; the CUDA kernels, their sources compiled for the CPU with the threads of a block
as fibers (tests/emulation/emulation.py); the CUDA kernels on a GPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from native_case import LANES, Case, Lane, assert_close, check, per_channel, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHANNELS = [1, 2, 3, 5, 7, 9, 15, 17, 31, 33, 63, 64, 65, 127, 129, 257, 1000]
SPATIAL = [(1, 1), (1, 3), (7, 7), (2, 32), (9, 15)]
MANY_TASKS = [(2, 70, 61, 60), (1, 4100, 9, 11), (3, 2049, 1, 50), (2, 3, 130, 101), (700, 65, 1, 1), (1, 1, 300, 70)]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


@pytest.fixture(params=LANES)
def lane(request):
    return Lane(request.param)


# ---- add_relu


@TYPES
@pytest.mark.parametrize("offset", [0, 1])
def test_add_relu_forward_and_backward_are_exact(lane, dtype, offset):
    for n in [*range(1, 70), 8191, 8192, 8193, 100_003]:
        x, residual, dy = (randn((n,), dtype, offset=offset, device=lane.device) for _ in range(3))
        y = lane.ops._add_relu_native(x, residual)
        assert torch.equal(y, torch.relu((x.float() + residual.float()).to(dtype))), n
        assert torch.equal(lane.ops._add_relu_backward_native(dy, y), torch.where(y <= 0, 0, dy)), n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("length", [7, 1 << 16], ids=["tail", "vectors"])
def test_every_16_bit_value_is_read_and_every_rounding_is_to_nearest_even(lane, dtype, length):
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).to(lane.device)
    other = values[torch.randperm(1 << 16, device=lane.device)]
    for residual in (torch.zeros_like(values), other, (values.float() * 2**-9).to(dtype)):
        parts = zip(values.split(length), residual.split(length), strict=True)
        y = torch.cat([lane.ops._add_relu_native(*part) for part in parts])
        want = torch.relu((values.float() + residual.float()).to(dtype))
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@TYPES
def test_nan_infinity_and_zeros_at_every_lane(lane, dtype):
    n = 41
    specials = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0]
    for position, special in itertools.product(range(n), specials):
        x = torch.linspace(-2, 2, n, device=lane.device).to(dtype)
        x[position] = special
        dy, y = torch.ones_like(x), lane.ops._add_relu_native(x, torch.zeros_like(x))
        torch.testing.assert_close(y, torch.relu(x), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(lane.ops._add_relu_backward_native(dy, y), torch.ops.aten.threshold_backward(dy, y, 0))
        for shape in ((1, 1, 1, n), (1, n, 1, 1)):  # the same lanes in bn_act's two layouts, eval mode
            stats = torch.zeros(shape[1], device=lane.device), torch.ones(shape[1], device=lane.device)
            given = x.view(shape), None, None, None, *stats, None
            z, _, _ = lane.ops._bn_act_native(*given, False, 0.0, 0.0, True, False)
            torch.testing.assert_close(z.flatten(), torch.relu(x), rtol=0, atol=0, equal_nan=True)


# ---- bn_act


@TYPES
@LAYOUTS
@pytest.mark.parametrize("channels", CHANNELS)
def test_bn_act_matches_fp64(lane, channels, channels_last, dtype):
    torch.manual_seed(channels)
    for hw, training in itertools.product(SPATIAL, (True, False)):
        check(Case(lane, (5, channels, *hw), dtype, channels_last, training=training, offset=1))


@TYPES
@LAYOUTS
@pytest.mark.parametrize("shape", MANY_TASKS, ids=str)
def test_bn_act_matches_fp64_over_many_tasks(lane, shape, channels_last, dtype):
    torch.manual_seed(0)
    check(Case(lane, shape, dtype, channels_last))


@TYPES
@LAYOUTS
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_every_option_and_every_subset_of_gradients(lane, training, channels_last, dtype):
    torch.manual_seed(1)
    for act, residual, affine in itertools.product(("relu", "none"), ("other", "x", None), (True, False)):
        options = {"training": training, "act": act, "residual": residual is not None, "affine": affine}
        case = Case(lane, (3, 19, 5, 7), dtype, channels_last, **options)
        case.residual = case.x if residual == "x" else case.residual  # the input may be its own residual
        y, mean, var, *whole = check(case)
        for needs in itertools.product((True, False), repeat=4):
            for part, full, need in zip(case.backward(y, mean, var, needs), whole, needs, strict=True):
                if need:  # not bit for bit: which products become fused multiply-adds is the compiler's choice
                    assert_close(part, full.double(), 16)


@TYPES
@LAYOUTS
def test_integers_are_exact(lane, channels_last, dtype):
    # Deviations of +-2 and eps = 0 make rstd exactly 1/2, and n is a power of two: every step is exact in every type.
    for shape in [(4, 5, 2, 2), (2, 37, 4, 4), (8, 19, 16, 16)]:
        case = Case(lane, shape, dtype, channels_last)
        case.eps = 0.0
        signs = torch.ones(shape, device=lane.device)
        signs.flatten(2)[:, :, torch.randperm(shape[2] * shape[3])[::2]] = -1
        case.x.copy_(2 * signs + per_channel(torch.arange(shape[1], device=lane.device) % 8))
        case.weight, case.bias = torch.randint(-3, 4, (2, shape[1]), device=lane.device).float()
        case.residual.copy_(torch.randint(-3, 4, shape))
        case.dy.copy_(torch.randint(-3, 4, shape))
        y, mean, var = case.forward()
        if not lane.exact_sums:  # a running mean multiplies by 1 / k: from here on with the exact statistics
            _, want_mean, want_var = case.forward64()
            assert_close(mean, want_mean, 8)
            torch.testing.assert_close(var.double(), want_var, rtol=2e-6, atol=0)
            case.mean, case.var, case.training = want_mean.float(), torch.full_like(var, 4.0), False
            y, mean, var = case.forward()
        got = y, mean, var
        want = case.forward64()
        case.training = True
        got, want = (*got, *case.backward(y, mean, var)), (*want, *case.backward64(y, mean, var))
        for g, w in zip(got, want, strict=True):
            w = (w * 2**20).round() / 2**20  # takes fp64's own noise off
            assert torch.equal(g, w.to(g.dtype)), shape


@LAYOUTS
@pytest.mark.parametrize("shape", [(4, 19, 7, 7), (8, 64, 56, 56), (300, 40, 1, 1), (2, 3, 120, 100)], ids=str)
@pytest.mark.parametrize("mean, std", [(1e4, 1.0), (1e6, 0.1)])
def test_variance_survives_a_mean_far_from_zero(lane, mean, std, shape, channels_last):
    torch.manual_seed(2)
    case = Case(lane, shape, torch.float32, channels_last, act="none", residual=False)
    case.x.copy_(torch.randn(shape, dtype=torch.float64) * std + mean)
    exact = case.x.double().var((0, 2, 3), unbiased=False)
    var = case.forward()[2].double()
    _, _, invstd = torch.ops.aten.native_batch_norm(case.x, None, None, None, None, True, 0.0, 0.0)
    eager = invstd.double() ** -2
    floor = 4 * torch.finfo(torch.float32).eps
    assert ((var - exact).abs() / exact).max() <= 4 * ((eager - exact).abs() / exact).max() + floor
    case.x[0, :, 0, 0] = -mean  # where the first shift is taken
    exact = case.x.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(case.forward()[2].double(), exact, rtol=2e-5, atol=0)


@TYPES
@LAYOUTS
def test_a_constant_channel_gives_exactly_its_bias(lane, channels_last, dtype):
    for shape, value in itertools.product([(3, 17, 7, 7), (2, 5, 90, 90), (11, 70, 1, 1)], (0.1, 12345.678, -3e-5)):
        case = Case(lane, shape, dtype, channels_last, act="none", residual=False)
        case.x.fill_(value)
        y, mean, var = case.forward()
        assert torch.equal(y, per_channel(case.bias).to(dtype).expand(shape))
        assert torch.equal(mean, case.x[0, :, 0, 0].float()) and not var.any()


@LAYOUTS
@pytest.mark.parametrize("scale", [1e19, 1e30])
def test_nothing_is_nan_where_eager_is_finite(lane, scale, channels_last):
    case = Case(lane, (4, 9, 8, 8), torch.float32, channels_last, act="none", residual=False)
    case.x.mul_(scale)
    y, mean, _ = case.forward()
    eager = torch.nn.functional.batch_norm(case.x, None, None, case.weight, case.bias, True, 0.0, case.eps)
    assert mean.isfinite().all() and torch.equal(y.isfinite(), eager.isfinite())


@LAYOUTS
def test_nan_stays_in_its_channel(lane, channels_last):
    case = Case(lane, (4, 21, 7, 7), torch.float32, channels_last, residual=False)
    clean = case.forward()[0]
    for channel in range(21):
        values = case.x.clone()
        case.x[1, channel, 3, 3] = float("nan")
        y, others = case.forward()[0], torch.arange(21, device=lane.device) != channel
        assert y[:, channel].isnan().all() and torch.equal(y[:, others], clean[:, others])
        case.x.copy_(values)
