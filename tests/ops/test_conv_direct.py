"""The CPU's direct products, with and without a max-pool behind: the native operators against float64, and frozen."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres._extension import build_info, native_cpu  # noqa: F401  (`run_on` asks the module)
from fastres.ops import _conv_native as native
from fastres.ops._conv_frozen import stock
from freeze_cases import compare, operators
from freeze_nets import NETS, prepared
from guards import guarded, run_on
from swap_cases import scramble

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(native_cpu() is None, reason="the C++ extension is not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, C, K, H, W; kernel, stride, padding, dilation; the pool's kernel, stride, padding. Few channels (taps side by
# side) and many, tails of everything, kernels not square, padding beyond a kernel's reach, more panels than rows
CASES = [
    ((2, 3, 33, 21, 23), ((7, 7), (2, 2), (3, 3), (1, 1)), ()),
    ((2, 3, 64, 30, 30), ((7, 7), (2, 2), (3, 3), (1, 1)), (3, 2, 1)),
    ((3, 5, 7, 11, 19), ((3, 5), (1, 2), (2, 0), (1, 1)), (2, 2, 0)),
    ((1, 17, 40, 9, 13), ((3, 3), (2, 2), (1, 1), (1, 1)), (3, 1, 1)),
    ((1, 64, 20, 12, 12), ((3, 3), (2, 1), (1, 1), (1, 1)), ()),
    ((2, 20, 70, 9, 9), ((3, 3), (1, 1), (2, 2), (2, 2)), ()),
    ((1, 2, 3, 6, 7), ((2, 3), (1, 1), (1, 4), (3, 1)), (5, 3, 2)),
    ((4, 40, 130, 4, 4), ((3, 3), (2, 2), (1, 1), (1, 1)), ()),
    ((1, 300, 300, 3, 3), ((3, 3), (2, 2), (1, 1), (1, 1)), ()),
    ((1, 16, 16, 8, 8), ((8, 1), (1, 5), (0, 9), (1, 1)), ()),
    ((1, 1, 1, 1, 1), ((1, 1), (1, 1), (0, 0), (1, 1)), ()),
    ((1, 20, 24, 17, 15), ((3, 3), (3, 3), (2, 2), (2, 2)), ()),
    # for tiles of bf16: x as it is, with some last pixels; several images a band; output rows that run on; blocks of 32
    # pixels and less; a weight beyond an L2 cache, of which panels are shared out
    ((3, 64, 100, 5, 7), ((1, 1), (1, 1), (0, 0), (1, 1)), ()),
    ((1, 96, 40, 12, 13), ((1, 1), (2, 2), (0, 0), (1, 1)), ()),
    ((5, 32, 48, 7, 7), ((3, 3), (1, 1), (1, 1), (1, 1)), ()),
    ((1, 48, 33, 20, 64), ((3, 3), (1, 1), (1, 1), (1, 1)), ()),
    ((1, 256, 512, 5, 5), ((3, 3), (1, 1), (1, 1), (1, 1)), ()),
    ((2, 512, 1100, 3, 3), ((1, 1), (1, 1), (0, 0), (1, 1)), ()),
]
IDS = ["x".join(map(str, size)) + ("-pool" if pool else "") for size, _, pool in CASES]
case = pytest.mark.parametrize(("size", "where", "pool"), CASES, ids=IDS)


def tensors(size, where, pool, dtype=torch.float32, draw=torch.randn):
    """x, weight, bias, residual (none before a pool) and scale."""
    n, c, k, h, w = size
    x, weight = draw((n, c, h, w)).to(dtype).contiguous(memory_format=LAST), draw((k, c, *where[0])).to(dtype)
    y = F.conv2d(x, weight, None, *where[1:])
    residual = None if pool else draw(y.shape).to(dtype).contiguous(memory_format=LAST)
    return x, weight, draw((k,)).to(dtype), residual, draw((k,)).to(dtype)


def numbers(where):
    return [n for part in where for n in part]


def run(x, weight, bias, residual, scale, where, pool, act):
    u = native.pack_direct(weight)
    return native.direct(x, u, bias, residual, scale, weight.shape[0], numbers(where), list(pool), act)


def eager(x, weight, bias, residual, scale, where, pool, act):
    y = stock(x, weight, bias, residual, scale, *where[1:], 1, act)
    return F.max_pool2d(y, *pool) if pool else y


@pytest.mark.parametrize("dtype", DTYPES)
@case
def test_against_float64_within_twice_eager_s_error(size, where, pool, dtype):
    torch.manual_seed(0)
    x, weight, bias, residual, scale = tensors(size, where, pool, dtype)
    for after in ((bias, residual, scale), (bias, None, None), (None, residual, None), (None, None, scale)):
        for act in native.ACTS:
            wide = [None if t is None else t.double() for t in after]
            want = eager(x.double(), weight.double(), *wide, where, pool, act)
            its, got = eager(x, weight, *after, where, pool, act), run(x, weight, *after, where, pool, act)
            assert got.dtype is dtype and got.shape == want.shape and got.is_contiguous(memory_format=LAST)
            error, its = (float((y.double() - want).square().mean().sqrt()) for y in (got, its))
            assert error <= 2 * its + 1e-6 * (1 + float(want.abs().max())), act


@case
def test_integers_are_exact_so_that_no_index_is_off(size, where, pool):
    given = tensors(size, where, pool, draw=lambda shape: torch.randint(-5, 6, shape).float())
    for act in ("relu", "none"):
        assert torch.equal(run(*given, where, pool, act), eager(*given, where, pool, act))


@case
def test_pairs_of_integers_are_exact_until_they_are_rounded(size, where, pool):
    x, weight, bias, residual, _ = tensors(size, where, pool, draw=lambda shape: torch.randint(-5, 6, shape).float())
    want = eager(x, weight, bias, residual, None, where, pool, "relu").bfloat16()
    given = [None if t is None else t.bfloat16() for t in (x, weight, bias, residual)]
    larger = F.pad(given[0] * float("nan"), [9] * 4, value=float("nan")).contiguous(memory_format=LAST)
    run(larger, given[1], None, None, None, where, pool, "relu")  # leaves NaN in scratch memory
    assert torch.equal(run(*given, None, where, pool, "relu"), want)


@case
def test_nan_and_infinity_pass_as_eager_s(size, where, pool):
    x, weight, bias, residual, _ = tensors(size, where, pool)
    for value in (float("nan"), float("inf"), -float("inf")):
        for at in ((0, 0, 0, 0), (-1, -1, -1, -1)):
            given = x.clone(memory_format=torch.preserve_format)
            given[at] = value
            got, want = (f(given, weight, bias, residual, None, where, pool, "none") for f in (run, eager))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@case
def test_threads_change_no_bit(size, where, pool, dtype):
    given, before = tensors(size, where, pool, dtype), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(run(*given, where, pool, "relu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@case
def test_nothing_outside_its_tensors_is_read_or_written(size, where, pool, dtype):
    x, weight, bias, residual, scale = tensors(size, where, pool, dtype)
    want = run(x, weight, bias, residual, scale, where, pool, "relu")
    y, memory = guarded(torch.zeros_like(want) if residual is None else residual)
    x, bias, scale, u = (guarded(t)[0] for t in (x, bias, scale, native.pack_direct(weight)))
    added = None if residual is None else y
    got = native.direct_into(x, u, bias, added, scale, size[2], numbers(where), list(pool), "relu", y)
    assert got.data_ptr() == y.data_ptr() and torch.equal(got, want)
    assert memory[:128].isnan().all() and memory[128 + y.numel() :].isnan().all()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_narrower_instruction_sets(isa):
    calls = """
    for case in tests.CASES:
        tests.test_pairs_of_integers_are_exact_until_they_are_rounded(*case)
        tests.test_integers_are_exact_so_that_no_index_is_off(*case)
        for dtype in tests.DTYPES:
            tests.test_against_float64_within_twice_eager_s_error(*case, dtype)
            tests.test_nothing_outside_its_tensors_is_read_or_written(*case, dtype)
    """
    run_on(isa, "test_conv_direct", calls)


@pytest.mark.skipif(not native.has_pairs(torch.bfloat16), reason="no products of bf16 pairs")
def test_a_weight_of_pairs_needs_bf16_images_and_no_dilation_across_few_channels():
    x, weight, bias, _, _ = tensors(*CASES[0])
    u, rest = native.pack_direct(weight.bfloat16()), (bias, None, None, 33)
    assert u.dtype is torch.int32
    with pytest.raises(RuntimeError, match="u: got"):
        native.direct(x, u, *rest, numbers(CASES[0][1]), [], "relu")
    with pytest.raises(RuntimeError, match="got dilation 2 with 3 channels"):
        native.direct(x.bfloat16(), u, bias.bfloat16(), *rest[1:], [7, 7, 2, 2, 3, 3, 1, 2], [], "relu")
    assert native.why_not_direct(x.bfloat16(), ((2, 2), (3, 3), (1, 2), 1), "relu")


def test_arguments_that_do_not_fit():
    size, where, _ = CASES[0]
    x, weight, bias, _, _ = tensors(*CASES[0])
    u = native.pack_direct(weight)
    large = torch.zeros(2, 33, 11, 12).contiguous(memory_format=LAST)
    for changed, words in (
        ({0: x.contiguous()}, "channels_last"),
        ({1: u[:, :5]}, "u: got"),
        ({3: large}, "residual: expected none before a pool"),
        ({6: numbers(where)[:7]}, "got 7 and 3 numbers"),
        ({6: [7, 7, 0, 2, 3, 3, 1, 1]}, "positive kernel sizes"),
        ({6: [7, 7, 2, 2, 3, 3, 9, 9]}, "too small for the kernel"),
        ({7: [3, 2, 2]}, "pool: expected"),
        ({7: [80, 2, 20]}, "pool: expected"),
    ):
        arguments = [x, u, bias, None, None, size[2], numbers(where), [3, 2, 1], "relu"]
        for at, value in changed.items():
            arguments[at] = value
        with pytest.raises(RuntimeError, match=words):
            native.direct(*arguments)
    with pytest.raises(RuntimeError, match="y: got shape"):
        native.direct_into(x, u, bias, None, None, size[2], numbers(where), [3, 2, 1], "relu", large)


# ---- in a frozen network ---------------------------------------------------------------------------------------------


def stem_of(pool, conv=None):
    net = nn.Sequential(conv or nn.Conv2d(3, 20, 7, 2, 3, bias=False), nn.BatchNorm2d(20), nn.ReLU(), pool)
    return scramble(net).eval()


def test_a_stem_is_one_step_and_writes_no_output_of_the_convolution():
    net = stem_of(nn.MaxPool2d(3, 2, 1))
    x = torch.randn(2, 3, 37, 41)
    frozen = fastres.freeze(net, x, tune=False)
    compare(net, frozen, x)
    seen = operators(frozen, x)
    assert [name for name in seen if "conv" in name or "pool" in name] == ["fastres::_conv_direct_native"]
    (row,) = [row for row in frozen.report.rows if row.kind == "conv"]
    assert row.became == "conv + bias + relu + max_pool" and "stem" in str(frozen.graph)


@pytest.mark.parametrize(
    "net",
    [
        stem_of(nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        stem_of(nn.MaxPool2d(2, dilation=2)),
        stem_of(nn.AvgPool2d(2)),
        stem_of(nn.MaxPool2d(2), nn.Conv2d(3, 20, 3, padding=1)),
    ],
    ids=["rounded up", "dilated", "average", "winograd's"],
)
def test_other_pools_stay(net):
    x = torch.randn(2, 3, 37, 41)
    frozen = fastres.freeze(net, x, tune=False)
    compare(net, frozen, x)
    assert "stem" not in str(frozen.graph)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d((3, 2), (2, 1), (1, 0)), nn.MaxPool2d(3, 1, 1)])
def test_windows_of_any_shape(pool):
    net, x = stem_of(pool), torch.randn(2, 3, 37, 41)
    frozen = fastres.freeze(net, x, tune=False)
    compare(net, frozen, x)
    assert "stem" in str(frozen.graph)


def test_every_way_gives_the_answer_and_nan_passes():
    net, x = stem_of(nn.MaxPool2d(3, 2, 1)), torch.randn(2, 3, 37, 41)
    frozen = fastres.freeze(net, x, tune=False)
    ((choices, _),) = frozen.prepared(x)[0].find_choices(*frozen.prepared(x)[1:])
    assert list(choices.ways) == ["fused", "packed", "plain", "direct"]
    for way in choices.ways:
        frozen.choose({choices.key: way})
        compare(net, frozen, x)
        broken = x.clone()
        broken[0, 0, 0, 0] = float("nan")
        assert torch.equal(frozen(broken).isnan(), net(broken).isnan()), way


def test_the_strided_convolutions_have_the_way_too():
    net, x = prepared(NETS["resnet18"]), torch.randn(1, 3, 64, 64)
    frozen = fastres.freeze(net, x, tune=False)
    executor, *given = frozen.prepared(x)
    keys = {choices.key: "direct" for choices, _ in executor.find_choices(*given) if "direct" in choices.ways}
    assert len(keys) == 4  # the stem's too
    frozen.choose(keys)
    compare(net, frozen, x, tol=1e-3)
    assert operators(frozen, x)["fastres::_conv_direct_into_native"] == 3


def test_a_stem_is_saved_exported_and_computed_for_another_size(tmp_path):
    net, x = stem_of(nn.MaxPool2d(3, 2, 1)), torch.randn(2, 3, 37, 41)
    frozen = fastres.freeze(net, x, tune=False)
    frozen.save(tmp_path / "stem.fastres")
    loaded = fastres.load(tmp_path / "stem.fastres")
    assert torch.equal(loaded(x), frozen(x))
    compare(net, loaded, torch.randn(1, 3, 64, 64))
    exported = torch.export.export(frozen, (x,))
    assert not [n for n in exported.graph.nodes if "fastres" in str(n.target)]
    torch.testing.assert_close(exported.module()(x), net(x), rtol=1e-4, atol=1e-4)
