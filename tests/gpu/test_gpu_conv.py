"""conv_act's CUDA kernels on a GPU, each of the build by name: fp64 at the shapes of ResNet, integers exactly, NaN and
infinity, gradients, refusals. What concerns launches is in test_gpu_conv_launch.py."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastres.functional import conv_act
from gpu_conv import ACTS, BACKEND, LAST, chosen, exact, integers, kernels_for, launch, pairs, random, refusal
from gpu_device import DEVICE, DRY, needs_device, on_gpu_alone, shifted
from referee import assert_as_good

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "shapes.py").is_file():  # an installed wheel, without its sources
    pytest.skip("benchmarks/ is not here", allow_module_level=True)
from shapes import CONVS  # noqa: E402

pytestmark = [pytest.mark.gpu, needs_device, pytest.mark.usefixtures("tf32")]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INF, NAN = float("inf"), float("nan")
SHAPES = CONVS[1 :: 7 if DRY else 1]  # of ResNet-18, -50 and -152, but for the stem, whose three channels are refused
BATCH = 1 if DRY else 3


def every(failures):
    """All that went wrong at once, so that a first run says which kernels are wrong and where."""
    assert not failures, f"{len(failures)} wrong:\n" + "\n".join(failures[:20])


# ---- as good as cuDNN ------------------------------------------------------------------------------------------------


def as_tf32(t):
    """fp32 rounded to the ten bits that TF32 has, to the nearest even."""
    bits = t.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def yardstick(x, weight, bias, residual, how, act, wanted):
    """Eager's y in x's dtype. For fp32 the worse of it and of operands rounded to TF32 by the book: with TF32 allowed
    cuDNN may still take an algorithm that has none, which is no measure of one that has."""
    z = F.conv2d(x, weight, bias, how["stride"], how["padding"], how["dilation"])
    y = ACTS[act](z if residual is None else z + residual)
    if x.dtype is not torch.float32:
        return y
    rounded = ACTS[act](exact(as_tf32(x), as_tf32(weight), bias, residual, how)).float()
    return max(y, rounded, key=lambda t: float((t - wanted).square().mean()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv", SHAPES, ids=lambda c: c.id)
def test_resnet_shapes_are_as_good_as_cudnn(conv, dtype):
    kernels, how = kernels_for(dtype), pairs(conv.stride, conv.padding)
    x = random((BATCH, conv.inputs, conv.size, conv.size), dtype)
    weight = random(
        (conv.outputs, conv.inputs, conv.kernel, conv.kernel), dtype, (conv.inputs * conv.kernel**2) ** -0.5
    )
    bias = torch.randn(conv.outputs, device=DEVICE).to(dtype)
    residual = random((BATCH, conv.outputs, conv.out, conv.out), dtype) if conv.residual else None
    z = exact(x, weight, bias, residual, how)
    wanted = ACTS[conv.act](z)
    # What roundings of every x, weight, bias and residual, independent of each other, move it by (benchmarks/judge.py).
    size = 2 * exact(x.square(), weight.square(), None, None, how) + bias.double().square().view(1, -1, 1, 1)
    size = size if residual is None else size + residual.double().square()
    size = torch.maximum((size / 3).sqrt(), z.abs())
    eager = yardstick(x, weight, bias, residual, how, conv.act, wanted)

    taken, failures = chosen(kernels, x, weight, how, conv.residual), []
    for kernel in kernels:
        assert not refusal(kernel, x, weight, how), kernel.name
        if kernel == taken:
            y = conv_act(x, weight, bias, residual, **how, act=conv.act, backend=BACKEND)
            assert y.is_contiguous(memory_format=LAST)
        else:
            y = launch(kernel, x, weight, bias, residual, how, conv.act)
        try:
            assert_as_good(y, eager, wanted, size, f"{kernel.name}{' (chosen)' if kernel == taken else ''}")
        except AssertionError as error:
            failures.append(str(error).splitlines()[0])
    every(failures)


# ---- exact in integers -----------------------------------------------------------------------------------------------


SQUARE = [(r, r, *rest) for r, *rest in itertools.product(range(1, 8), (1, 2, 3), (0, 1, 2, 3), (1, 2))]
UNLIKE = [  # R, S, stride, padding, dilation
    (1, 7, (1, 2), (0, 3), (1, 1)), (7, 1, (2, 1), (3, 0), (1, 1)), (2, 3, (3, 1), (1, 0), (2, 1)),
    (3, 5, (1, 3), (2, 1), (1, 2)), (5, 2, (2, 3), (0, 2), (2, 2)), (1, 1, (2, 1), (0, 0), (1, 1)),
]  # fmt: skip
GRID = (SQUARE + UNLIKE)[:: 15 if DRY else 1]
INPUTS, OUTPUTS = (8, 24, 40, 72, 136), (8, 24, 72, 136, 200, 264)  # multiples of 16 bytes, of no tile


def problem(dtype, n, c, k, size, kernel, how, bias=True, residual=True):
    """x, weight, bias, residual: small integers, whose sums are exact in fp32 in any order, and rounded once."""
    x, weight = integers((n, c, *size), dtype), integers((k, c, *kernel), dtype)
    z = exact(x, weight, None, None, how)
    b = integers((k,), dtype, 9) if bias else None
    return x, weight, b, integers(z.shape, dtype, 9) if residual else None


def compare(kernel, tensors, how, act, said, failures):
    x, weight, bias, residual = tensors
    reason = refusal(kernel, x, weight, how)
    if reason:
        failures.append(f"{kernel.name} refuses {said}: {reason}")
        return
    wanted = ACTS[act](exact(*tensors, how)).to(x.dtype)
    y = launch(kernel, *tensors, how, act)
    if not torch.equal(y, wanted):
        bad = (y != wanted).nonzero()
        failures.append(f"{kernel.name}, {said}, {act}: {len(bad)} of {y.numel()} wrong, first at {bad[0].tolist()}")


def test_every_geometry_is_exact(kernel):
    dtype, failures = getattr(torch, kernel.element), []
    for i, (r, s, stride, padding, dilation) in enumerate(GRID):
        how, act = pairs(stride, padding, dilation), tuple(ACTS)[i % 3]
        c, k = INPUTS[i % len(INPUTS)], OUTPUTS[i % len(OUTPUTS)]
        tensors = problem(dtype, 3, c, k, (17, 15), (r, s), how, bias=i % 4 != 0, residual=i % 2 == 0)
        compare(kernel, tensors, how, act, f"{r}x{s} {how} {c} to {k}", failures)
    every(failures)


# N, C, K, H and W, kernel: more tiles than multiprocessors, so that blocks go on from one to the next; one tile and a
# deep sum, which stream-K shares out; one pixel; one row; fewer channels than a vector of them is bytes.
SIZES = (
    (8, 72, 264, (56, 56), 3), (9, 136, 136, (57, 55), 1), (2, 1032, 72, (7, 7), 3), (1, 512, 520, (7, 7), 3),
    (1, 8, 8, (1, 1), 1), (5, 64, 264, (1, 1), 1), (1, 40, 24, (1, 301), 1), (3, 24, 40, (300, 1), 3),
    (1, 2048, 512, (7, 7), 1),
)  # fmt: skip
FLOAT_SIZES = ((2, 12, 20, (9, 11), 3), (3, 4, 4, (5, 5), 1), (1, 28, 132, (7, 9), 5))  # 16 bytes are four of them


def test_every_size_is_exact(kernel):
    dtype, failures = getattr(torch, kernel.element), []
    sizes = (SIZES[4:8] if DRY else SIZES) + (FLOAT_SIZES if dtype is torch.float32 else ())
    for i, (n, c, k, size, r) in enumerate(sizes):
        for residual in (True, False):
            how, act = pairs(1, r // 2), tuple(ACTS)[i % 3]
            tensors = problem(dtype, n, c, k, size, (r, r), how, residual=residual)
            compare(kernel, tensors, how, act, f"{n}x{c}x{size} to {k}, {r}x{r}, residual {residual}", failures)
    every(failures)


@on_gpu_alone
def test_more_tiles_than_blocks_is_exact(kernel):
    """The last wave full, one tile short of it, and one over: where a schedule of persistent blocks begins and ends."""
    blocks = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    dtype, failures = getattr(torch, kernel.element), []
    for tiles in (blocks - 1, blocks, blocks + 1, 2 * blocks + kernel.cluster, 5 * blocks - 1):
        for c, r in ((72, 1), (24, 3)):
            how = pairs(1, r // 2)
            tensors = problem(dtype, 1, c, kernel.channels, (tiles, kernel.pixels), (r, r), how)
            compare(kernel, tensors, how, "relu", f"{tiles} tiles, {c} channels, {r}x{r}", failures)
    every(failures)


# ---- special values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", tuple(ACTS))
def test_nan_infinity_and_zero_pass_as_in_eager(kernel, act):
    dtype, how = getattr(torch, kernel.element), pairs(1, 1)
    x, weight, bias, residual = problem(dtype, 2, 24, 40, (11, 13), (3, 3), how)
    weight.copy_(weight.sign().where(weight != 0, 1.0))  # no product of infinity and 0
    for place, value in (((0, 3, 2, 2), NAN), ((0, 5, 8, 3), INF), ((0, 7, 5, 9), -INF), ((1, 0, 0, 0), INF)):
        x[place] = value
    bias[:3] = torch.tensor([NAN, INF, -0.0])
    residual[1, 3:6, 5, 5] = torch.tensor([NAN, -INF, -0.0])
    residual[1, 6:9, 6, 6] = torch.finfo(dtype).max
    bias[6:9] = torch.finfo(dtype).max  # beyond the largest number: infinity, as after any addition
    for b, r in ((bias, residual), (bias, None), (None, residual), (None, None)):
        wanted = ACTS[act](exact(x, weight, b, r, how)).to(dtype)
        assert wanted.isnan().any() and not wanted.isnan().all()
        y = launch(kernel, x, weight, b, r, how, act)
        torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


# ---- the backend -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_the_references(dtype, deterministic):
    kernels_for(dtype)
    for (r, stride), act, with_residual in itertools.product(((1, 1), (3, 2)), ACTS, (True, False)):
        how = pairs(stride, r // 2)
        given = problem(dtype, 2, 32, 48, (9, 11), (r, r), how, residual=with_residual)
        results = []
        for backend in (BACKEND, "reference"):  # y is exact in both, so that one mask serves
            leaves = [None if t is None else t.clone().requires_grad_() for t in given]
            y = conv_act(*leaves, **how, act=act, backend=backend)
            torch.manual_seed(1)
            dy = torch.randint_like(y, -2, 3)
            results.append([y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)])
        for i, (ours, wanted) in enumerate(zip(*results, strict=True)):
            assert torch.equal(ours, wanted), (r, stride, act, with_residual, i)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_other_layouts_are_copied_and_right(dtype):
    kernels_for(dtype)
    how = pairs(1, 1)
    given = x, weight, bias, residual = problem(dtype, 2, 40, 72, (9, 8), (3, 3), how)
    wanted = torch.relu(exact(*given, how)).to(dtype)
    wide = torch.full((2, 40, 9, 11), NAN, dtype=dtype, device=DEVICE).contiguous(memory_format=LAST)
    wide[..., 3:] = x
    flat = torch.cat((bias[:1], bias))
    for x_, weight_, bias_, residual_ in (
        (shifted(x), weight, bias, residual),
        (x, shifted(weight), flat[1:], shifted(residual, 3)),
        (wide[..., 3:], weight.contiguous(), bias, residual.contiguous()),
        (x.contiguous(), weight.contiguous(memory_format=LAST), bias, residual),
    ):
        y = conv_act(x_, weight_, bias_, residual_, stride=1, padding=1, backend=BACKEND)
        assert torch.equal(y, wanted) and y.is_contiguous(memory_format=LAST)


@on_gpu_alone
def test_a_native_call_that_does_not_fit_is_named_and_leaves_no_error_behind(kernel):
    dtype = getattr(torch, kernel.element)
    x, weight = random((2, 32, 8, 8), dtype), random((48, 32, 3, 3), dtype)
    bias, y = torch.ones(48, device=DEVICE, dtype=dtype), random((2, 48, 6, 6), dtype)
    base = [x, weight, bias, None, 1, 1, 0, 0, 1, 1, "relu", kernel.index]
    few = 4 // dtype.itemsize  # channels of 4 bytes
    wrong = [
        ("x: expected an address that is a multiple of 16", {0: shifted(x)}),
        ("residual: expected an address that is a multiple of 16", {3: shifted(y)}),
        ("bias: expected an address that is a multiple of 16", {2: shifted(bias)}),
        ("x: expected a dense", {0: x.contiguous()}),
        ("weight: expected dtype", {1: weight.double()}),
        (r"bias: expected a contiguous \[48\]", {2: bias[:47]}),
        ("residual: expected shape", {3: y[:1]}),
        ("too small for a 3x3 kernel", {0: random((2, 32, 2, 8), dtype)}),
        ("act: expected relu, relu6 or none, got silu", {10: "silu"}),
        ("tile: got -1", {11: -1}),
        ("refuses: x has", {0: random((2, few, 8, 8), dtype), 1: random((48, few, 3, 3), dtype)}),
    ]
    for says, changes in wrong:
        with pytest.raises(RuntimeError, match=says):
            torch.ops.fastres._conv_act_native(*(changes.get(i, value) for i, value in enumerate(base)))
    torch.cuda.synchronize()  # nothing of it is left in the stream
    y = torch.ops.fastres._conv_act_native(*base)
    wanted = torch.relu(exact(x, weight, bias, None, pairs()))
    assert (y.double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()
