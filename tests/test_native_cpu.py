"""The C++ CPU kernels, called directly (`_<op>_native`) and held against the same maths in fp64.

Outputs live in the middle of buffers of NaN whose edges must stay NaN: a write out of bounds is a failure. Every tensor
can start one element after an aligned address.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import fastres.ops  # noqa: F401  (declares the operators that fastres._C implements)
from fastres import _extension

if _extension.native_cpu() is None:
    pytest.skip(f"the compiled CPU kernels are not here: {_extension.why_not_cpu()}", allow_module_level=True)

OPS = torch.ops.fastres
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHANNELS = [1, 2, 3, 5, 7, 9, 15, 17, 31, 33, 63, 64, 65, 127, 129, 257, 1000]
SPATIAL = [(1, 1), (1, 3), (7, 7), (2, 32), (9, 15)]
MANY_TASKS = [(2, 70, 61, 60), (1, 4100, 9, 11), (3, 2049, 1, 50), (2, 3, 130, 101), (700, 65, 1, 1), (1, 1, 300, 70)]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
EDGE = 32


def dense(shape, dtype, channels_last=False, offset=0):
    """A dense tensor of this order in the middle of a buffer of NaN, `offset` elements off an aligned address."""
    count = torch.Size(shape).numel()
    flat = torch.full((count + 2 * EDGE + offset,), float("nan"), dtype=dtype)[EDGE + offset :][:count]
    if not channels_last:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def edges_untouched(t):
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    before, after = t.storage_offset(), t.storage_offset() + t.numel()
    return bool(whole[:before].isnan().all() and whole[after:].isnan().all())


def randn(shape, dtype, channels_last=False, offset=0, scale=1.0, shift=0.0):
    return dense(shape, dtype, channels_last, offset).copy_(torch.randn(shape) * scale + shift)


def per_channel(values):
    return values.view(1, -1, 1, 1)


class Case:
    """Inputs of one call, and what fp64 makes of them."""

    def __init__(self, shape, dtype, channels_last, *, training=True, act="relu", residual=True, affine=True, offset=0):
        c = shape[1]
        self.shape, self.dtype, self.channels_last, self.offset = shape, dtype, channels_last, offset
        self.training, self.act, self.eps = training, act, 1e-3
        self.x = randn(shape, dtype, channels_last, offset, scale=2.0, shift=0.5)
        self.residual = randn(shape, dtype, channels_last, offset) if residual else None
        self.dy = randn(shape, dtype, channels_last, offset)
        self.weight = torch.randn(c) if affine else None
        self.bias = torch.randn(c) if affine else None
        self.mean, self.var = torch.randn(c), torch.rand(c) + 0.5

    def out(self, wanted=True):
        return dense(self.shape, self.dtype, self.channels_last, self.offset) if wanted else None

    def forward(self):
        y, mean, var = self.out(), self.mean.clone(), self.var.clone()
        OPS._bn_act_native(
            self.x, self.weight, self.bias, self.residual, y, mean, var, self.channels_last, self.training, self.eps,
            self.act,
        )  # fmt: skip
        assert edges_untouched(y)
        return y, mean, var

    def backward(self, y, mean, var, needs=(True, True, True, True)):
        c = self.shape[1]
        dx, dresidual = self.out(needs[0]), self.out(needs[3])
        dweight, dbias = (torch.full((c,), float("nan")) if need else None for need in needs[1:3])
        OPS._bn_act_backward_native(
            self.dy, self.x, y if self.act == "relu" else None, self.weight, mean, var, dx, dweight, dbias, dresidual,
            self.channels_last, self.training, self.eps, self.act,
        )  # fmt: skip
        assert all(edges_untouched(t) for t in (dx, dresidual) if t is not None)
        return dx, dweight, dbias, dresidual

    def forward64(self):
        x = self.x.double()
        mean, var = self.mean.double(), self.var.double()
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        z = (x - per_channel(mean)) * per_channel((var + self.eps).rsqrt())
        if self.weight is not None:
            z = z * per_channel(self.weight.double()) + per_channel(self.bias.double())
        if self.residual is not None:
            z = z + self.residual.double()
        return (torch.where(z < 0, 0.0, z) if self.act == "relu" else z), mean, var

    def backward64(self, y, mean, var):
        dy, x = self.dy.double(), self.x.double()
        g = torch.where(y <= 0, 0.0, dy) if self.act == "relu" else dy
        rstd = (var.double() + self.eps).rsqrt()
        x_hat = (x - per_channel(mean.double())) * per_channel(rstd)
        dbias, dweight = g.sum((0, 2, 3)), (g * x_hat).sum((0, 2, 3))
        n = x.numel() / x.shape[1]
        dx = g - (per_channel(dbias) + x_hat * per_channel(dweight)) / n if self.training else g
        dx = dx * per_channel(rstd * (1.0 if self.weight is None else self.weight.double()))
        return dx, dweight, dbias, g


def assert_close(got, want, ulps32, scale=1.0):
    """Within half a unit in the last place of the dtype, and fp32's noise at the scale of what was added up."""
    half_ulp = 0.0 if got.dtype == torch.float32 else 0.502 * torch.finfo(got.dtype).eps
    atol = ulps32 * 2**-24 * max(scale, want.abs().max().item()) + (1e-7 if got.dtype == torch.float16 else 0.0)
    torch.testing.assert_close(got.double(), want.double(), rtol=half_ulp, atol=atol)


def check(case):
    y, mean, var = case.forward()
    want_y, want_mean, want_var = case.forward64()
    assert_close(mean, want_mean, 4, case.x.abs().max().item())
    torch.testing.assert_close(var.double(), want_var, rtol=2e-6, atol=1e-7)  # measured: 1e-6
    assert_close(y, want_y, 24)
    n = y.numel() // y.shape[1]
    got, wanted = case.backward(y, mean, var), case.backward64(y, mean, var)
    for g, w, scale in zip(got, wanted, (1, n**0.5, n**0.5, 1), strict=True):
        assert_close(g, w, 64, scale)
    return y, mean, var, *got


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


# ---- add_relu


@TYPES
@pytest.mark.parametrize("offset", [0, 1])
def test_add_relu_forward_and_backward_are_exact(dtype, offset):
    for n in [*range(1, 70), 8191, 8192, 8193, 100_003]:
        x, residual, dy = (randn((n,), dtype, offset=offset) for _ in range(3))
        y, dx = dense((n,), dtype, offset=offset), dense((n,), dtype, offset=offset)
        OPS._add_relu_native(x, residual, y)
        assert torch.equal(y, torch.relu((x.float() + residual.float()).to(dtype))), n
        OPS._add_relu_backward_native(dy, y, dx)
        assert torch.equal(dx, torch.where(y <= 0, 0, dy)), n
        assert edges_untouched(y) and edges_untouched(dx), n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("length", [7, 1 << 16], ids=["tail", "vectors"])
def test_every_16_bit_value_is_read_and_every_rounding_is_to_nearest_even(dtype, length):
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    other = values[torch.randperm(1 << 16)]
    for residual in (torch.zeros_like(values), other, (values.float() * 2**-9).to(dtype)):
        y = torch.empty_like(values)
        for parts in zip(values.split(length), residual.split(length), y.split(length), strict=True):
            OPS._add_relu_native(*parts)
        want = torch.relu((values.float() + residual.float()).to(dtype))
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@TYPES
def test_nan_infinity_and_zeros_at_every_lane(dtype):
    n = 41
    specials = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0]
    for lane, special in itertools.product(range(n), specials):
        x = torch.linspace(-2, 2, n).to(dtype)
        x[lane] = special
        y, dx, dy = torch.empty_like(x), torch.empty_like(x), torch.ones_like(x)
        OPS._add_relu_native(x, torch.zeros_like(x), y)
        torch.testing.assert_close(y, torch.relu(x), rtol=0, atol=0, equal_nan=True)
        OPS._add_relu_backward_native(dy, y, dx)
        assert torch.equal(dx, torch.ops.aten.threshold_backward(dy, y, 0))
        for shape in ((1, 1, 1, n), (1, n, 1, 1)):  # the same lanes in bn_act's two layouts, eval mode
            z, stats = torch.empty(shape, dtype=dtype), (torch.zeros(shape[1]), torch.ones(shape[1]))
            OPS._bn_act_native(x.view(shape), None, None, None, z, *stats, False, False, 0.0, "relu")
            torch.testing.assert_close(z.flatten(), torch.relu(x), rtol=0, atol=0, equal_nan=True)


# ---- bn_act


@TYPES
@LAYOUTS
@pytest.mark.parametrize("channels", CHANNELS)
def test_bn_act_matches_fp64(channels, channels_last, dtype):
    torch.manual_seed(channels)
    for hw, training in itertools.product(SPATIAL, (True, False)):
        check(Case((5, channels, *hw), dtype, channels_last, training=training, offset=1))


@TYPES
@LAYOUTS
@pytest.mark.parametrize("shape", MANY_TASKS, ids=str)
def test_bn_act_matches_fp64_over_many_tasks(shape, channels_last, dtype):
    torch.manual_seed(0)
    check(Case(shape, dtype, channels_last))


def streamed_shape(dtype):
    """A tensor above an eighth of the last-level cache (csrc/cpu/isa.h: is_cached), of whole vectors and odd rows."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    cache = int(size.read_text().strip().rstrip("K")) << 10 if size.exists() else 32 << 20
    row = 64 * dtype.itemsize
    return (1, 64, cache // 8 // row // 9 + 1, 9)


@TYPES
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_large_rows_written_past_the_caches(training, offset, dtype):
    torch.manual_seed(0)
    check(Case(streamed_shape(dtype), dtype, True, training=training, offset=offset))


@TYPES
@LAYOUTS
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_every_option_and_every_subset_of_gradients(training, channels_last, dtype):
    torch.manual_seed(1)
    for act, residual, affine in itertools.product(("relu", "none"), ("other", "x", None), (True, False)):
        options = {"training": training, "act": act, "residual": residual is not None, "affine": affine}
        case = Case((3, 19, 5, 7), dtype, channels_last, **options)
        case.residual = case.x if residual == "x" else case.residual  # the input may be its own residual
        y, mean, var, *whole = check(case)
        for needs in itertools.product((True, False), repeat=4):
            for part, full, need in zip(case.backward(y, mean, var, needs), whole, needs, strict=True):
                assert (part is not None) == need
                if need:  # not bit for bit: which products become fused multiply-adds is the compiler's choice
                    assert_close(part, full.double(), 16)


@TYPES
@LAYOUTS
def test_integers_are_exact(channels_last, dtype):
    # Deviations of +-2 and eps = 0 make rstd exactly 1/2, and n is a power of two: every step is exact in every type.
    for shape in [(4, 5, 2, 2), (2, 37, 4, 4), (8, 19, 16, 16)]:
        case = Case(shape, dtype, channels_last)
        case.eps = 0.0
        signs = torch.ones(shape)
        signs.flatten(2)[:, :, torch.randperm(shape[2] * shape[3])[::2]] = -1
        case.x.copy_(2 * signs + per_channel(torch.arange(shape[1]) % 8))
        case.weight, case.bias = torch.randint(-3, 4, (2, shape[1])).float()
        case.residual.copy_(torch.randint(-3, 4, shape))
        case.dy.copy_(torch.randint(-3, 4, shape))
        y, mean, var = case.forward()
        got = y, mean, var, *case.backward(y, mean, var)
        for g, w in zip(got, (*case.forward64(), *case.backward64(y, mean, var)), strict=True):
            w = (w * 2**20).round() / 2**20  # takes fp64's own noise off
            assert torch.equal(g, w.to(g.dtype)), shape


@LAYOUTS
@pytest.mark.parametrize("shape", [(4, 19, 7, 7), (8, 64, 56, 56), (300, 40, 1, 1), (2, 3, 120, 100)], ids=str)
@pytest.mark.parametrize("mean, std", [(1e4, 1.0), (1e6, 0.1)])
def test_variance_survives_a_mean_far_from_zero(mean, std, shape, channels_last):
    torch.manual_seed(2)
    case = Case(shape, torch.float32, channels_last, act="none", residual=False)
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
def test_a_constant_channel_gives_exactly_its_bias(channels_last, dtype):
    for shape, value in itertools.product([(3, 17, 7, 7), (2, 5, 90, 90), (11, 70, 1, 1)], (0.1, 12345.678, -3e-5)):
        case = Case(shape, dtype, channels_last, act="none", residual=False)
        case.x.fill_(value)
        y, mean, var = case.forward()
        assert torch.equal(y, per_channel(case.bias).to(dtype).expand(shape))
        assert torch.equal(mean, case.x[0, :, 0, 0].float()) and not var.any()


@LAYOUTS
@pytest.mark.parametrize("scale", [1e19, 1e30])
def test_nothing_is_nan_where_eager_is_finite(scale, channels_last):
    case = Case((4, 9, 8, 8), torch.float32, channels_last, act="none", residual=False)
    case.x.mul_(scale)
    y, mean, _ = case.forward()
    eager = torch.nn.functional.batch_norm(case.x, None, None, case.weight, case.bias, True, 0.0, case.eps)
    assert mean.isfinite().all() and torch.equal(y.isfinite(), eager.isfinite())


@LAYOUTS
def test_nan_stays_in_its_channel(channels_last):
    case = Case((4, 21, 7, 7), torch.float32, channels_last, residual=False)
    clean = case.forward()[0]
    for channel in range(21):
        values = case.x.clone()
        case.x[1, channel, 3, 3] = float("nan")
        y, others = case.forward()[0], torch.arange(21) != channel
        assert y[:, channel].isnan().all() and torch.equal(y[:, others], clean[:, others])
        case.x.copy_(values)


@TYPES
@LAYOUTS
@pytest.mark.parametrize("shape", [(2, 70, 61, 60), (1, 4100, 9, 11), (8, 96, 7, 7)], ids=str)
def test_results_are_the_same_bits_on_repeats_and_with_any_number_of_threads(shape, channels_last, dtype):
    case = Case(shape, dtype, channels_last)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            forward = case.forward()
            results.append((*forward, *case.backward(*forward)))
    finally:
        torch.set_num_threads(threads)
    assert all(same(results[0], other) for other in results[1:])


# ---- refusals


def test_refusals_name_the_tensor():
    case = Case((2, 6, 3, 3), torch.float32, False)
    base = [case.x, case.weight, case.bias, case.residual, case.out(), case.mean, case.var, False, True, 1e-5, "relu"]
    wrong = [
        ("x: expected 4 dimensions", 0, case.x[0]),
        ("x: expected a dense contiguous", 0, case.x.contiguous(memory_format=torch.channels_last)),
        ("weight: expected a contiguous \\[6\\], got \\[7\\]", 1, torch.ones(7)),
        ("bias: expected dtype Float, got Half", 2, torch.ones(6).half()),
        ("residual: expected shape \\[2, 6, 3, 3\\] as x, got \\[2, 6, 3, 4\\]", 3, torch.ones(2, 6, 3, 4)),
        ("y: expected dtype Float as x, got BFloat16", 4, torch.ones(2, 6, 3, 3).bfloat16()),
        ("var: expected a contiguous", 6, torch.ones(12)[::2]),
        ('act: expected "relu" or "none", got "gelu"', 10, "gelu"),
    ]
    for message, index, value in wrong:
        with pytest.raises(RuntimeError, match=message):
            OPS._bn_act_native(*base[:index], value, *base[index + 1 :])
    with pytest.raises(RuntimeError, match="x: expected dtype Float, BFloat16 or Half, got Double"):
        OPS._add_relu_native(*torch.ones(3, 4).double())
    with pytest.raises(RuntimeError, match="y: act=.relu. takes its mask"):
        outputs = case.out(), None, None, None
        OPS._bn_act_backward_native(case.dy, case.x, None, None, case.mean, case.var, *outputs, *base[7:])


def test_build_info_says_how_it_was_built():
    module = _extension.native_cpu()
    info = module.build_info()
    assert (
        info["schema_version"] == _extension.SCHEMA_VERSION
        and info["torch_target"] == "2.11"
        and info["cxx_std"] >= 201703
    )
    assert info["isa_runtime"] in ("baseline", "avx2", "avx512") and info["compiler"].split()[0] in ("gcc", "clang")
    assert module.kernel_attributes() == {}
