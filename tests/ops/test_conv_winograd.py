"""Winograd's convolutions on the CPU: the native operators against float64, and their place in a frozen network."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres._extension import build_info, native_cpu  # noqa: F401  (`run_on` asks the module)
from fastres.inference import precision, tune
from fastres.ops import _conv_native as winograd
from fastres.ops._conv_frozen import stock
from fastres.verify.verdict import Row, Verification
from freeze_cases import compare
from guards import guarded, run_on
from swap_cases import scramble

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(native_cpu() is None, reason="the C++ extension is not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, C, K, H, W, padding: tails of channels, of panels and of tiles; many tiles and few; one output
SHAPES = [
    (1, 16, 32, 8, 8, (1, 1)),
    (2, 3, 5, 7, 9, (1, 1)),
    (3, 17, 33, 10, 5, (0, 1)),
    (1, 40, 100, 13, 11, (2, 2)),
    (2, 64, 64, 14, 14, (1, 1)),
    (5, 33, 65, 30, 31, (1, 0)),
    (1, 200, 130, 7, 7, (1, 1)),
    (1, 1, 1, 3, 3, (0, 0)),
    (2, 20, 20, 1, 1, (1, 1)),
]


def tensors(n, c, k, h, w, padding, dtype=torch.float32, draw=torch.randn):
    p, q = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    sizes = ((n, c, h, w), (k, c, 3, 3), (k,), (n, k, p, q), (k,))
    x, weight, bias, residual, scale = (draw(size).to(dtype) for size in sizes)
    return x.contiguous(memory_format=LAST), weight, bias, residual.contiguous(memory_format=LAST), scale


def exact(x, weight, bias, residual, scale, padding, act):
    z = F.conv2d(x.double(), weight.double(), None, 1, padding)
    z = z if scale is None else z * scale.double()[:, None, None]
    z = z if bias is None else z + bias.double()[:, None, None]
    z = z if residual is None else z + residual.double()
    return {"none": lambda t: t, "relu": torch.relu, "relu6": F.relu6, "hardswish": F.hardswish}[act](z)


def run(tile, x, weight, bias, residual, scale, padding, act):
    return winograd.forward(x, winograd.pack(weight, tile), bias, residual, scale, weight.shape[0], *padding, act)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64_within_twice_a_direct_product_s_error(tile, dtype, shape):
    torch.manual_seed(0)
    x, weight, bias, residual, scale = tensors(*shape, dtype=dtype)
    weight /= (9 * shape[1]) ** 0.5
    for after in ((bias, residual, scale), (bias, None, None), (None, residual, None), (None, None, scale)):
        for act in winograd.ACTS:
            want = exact(x, weight, *after, shape[-1], act)
            got = run(tile, x, weight, *after, shape[-1], act)
            assert got.dtype is dtype and got.shape == want.shape and got.is_contiguous(memory_format=LAST)
            direct = stock(x, weight, *after, (1, 1), shape[-1], (1, 1), 1, act)
            error, its = (float((y.double() - want).square().mean().sqrt()) for y in (got, direct))
            assert error <= 2 * its + 1e-6 * (1 + float(want.abs().max())), (act, error, its)


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact_so_that_no_index_is_off(shape):
    """F(2x2): its coefficients are 1, 1/2 and 1/4. F(4x4)'s are not, a wrong index is off by far more than rounding."""

    def draw(size):
        return torch.randint(-3, 4, size).float()

    torch.manual_seed(1)
    given = tensors(*shape, draw=draw)
    for act in ("none", "relu"):
        want = exact(*given, shape[-1], act)
        assert torch.equal(run(2, *given, shape[-1], act).double(), want)
        assert float((run(4, *given, shape[-1], act).double() - want).abs().max()) < 0.01


@pytest.mark.parametrize("tile", [2, 4])
def test_written_over_the_residual(tile):
    shape = (2, 24, 40, 9, 10, (1, 1))
    x, weight, bias, residual, _ = tensors(*shape)
    want = run(tile, x, weight, bias, residual, None, (1, 1), "relu")
    got = winograd.into(x, winograd.pack(weight, tile), bias, residual, None, 40, 1, 1, "relu", residual)
    assert got.data_ptr() == residual.data_ptr() and torch.equal(residual, want)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(
    "shape", [(1, 48, 64, 14, 14, (1, 1)), (3, 32, 96, 28, 30, (1, 1)), (1, 16, 200, 5, 5, (2, 0))]
)
def test_threads_change_no_bit(tile, shape):
    given, before = tensors(*shape), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(tile, *given, shape[-1], "relu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_outside_its_tensors_is_read_or_written(tile, dtype, shape):
    x, weight, bias, residual, scale = tensors(*shape, dtype=dtype)
    u = winograd.pack(weight, tile)
    want = winograd.forward(x, u, bias, residual, scale, shape[2], *shape[-1], "relu")
    (x, _), (bias, _), (scale, _), (residual, memory) = map(guarded, (x, bias, scale, residual))
    got = winograd.into(x, guarded(u)[0], bias, residual, scale, shape[2], *shape[-1], "relu", residual)
    assert torch.equal(got, want)
    assert memory[:128].isnan().all() and memory[128 + residual.numel() :].isnan().all()


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_instruction_sets(isa):
    calls = """
    for shape in tests.SHAPES:
        tests.test_integers_are_exact_so_that_no_index_is_off(shape)
        for tile in (2, 4):
            for dtype in tests.DTYPES:
                tests.test_against_float64_within_twice_a_direct_product_s_error(tile, dtype, shape)
                tests.test_nothing_outside_its_tensors_is_read_or_written(tile, dtype, shape)
    """
    run_on(isa, "test_conv_winograd", calls)


def test_an_instruction_set_that_nobody_knows():
    code = "import torch, fastres.functional as f; f.add_relu(torch.ones(3), torch.ones(3))"
    environment = os.environ | {"FASTRES_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    problem = "FASTRES_ISA: got 'sse9', expected 'amx', 'avx512', 'avx2' or 'baseline'"
    assert done.returncode == 0 and done.stderr.count(f"{problem}: no compiled kernel is used") == 1
    command = [sys.executable, "-m", "fastres", "freeze", "torchvision:resnet18"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode and problem in done.stderr and "Traceback" not in done.stderr


def test_arguments_that_do_not_fit():
    x, weight, bias, residual, scale = tensors(2, 16, 24, 8, 8, (1, 1))
    u = winograd.pack(weight, 4)
    with pytest.raises(RuntimeError, match="tile: got 3, expected 2 or 4"):
        winograd.pack(weight, 3)
    with pytest.raises(RuntimeError, match=r"weight: got shape \[24, 16, 1, 1\]"):
        winograd.pack(weight[:, :, :1, :1], 2)
    for changed, words in (
        ({0: x.contiguous()}, "channels_last"),
        ({0: x.double()}, "a kernel's dtype"),
        ({1: u.flatten()}, "u: got shape"),
        ({5: 200}, "u: got shape"),
        ({2: bias[:5]}, "expected 24 contiguous numbers"),
        ({3: residual[:, :, 1:]}, r"residual: got shape \[2, 24, 7, 8\]"),
        ({6: 3}, "padding: got 3, 1"),
        ({8: "silu"}, "act: got silu"),
    ):
        arguments = [x, u, bias, residual, scale, 24, 1, 1, "relu"]
        for place, value in changed.items():
            arguments[place] = value
        with pytest.raises(RuntimeError, match=words):
            winograd.forward(*arguments)


def test_refusals_name_what_does_not_fit():
    x, whole = torch.ones(1, 32, 8, 8), ((1, 1), (1, 1), (1, 1), 1)
    assert winograd.why_not(x, (32, 32, 3, 3), whole, "relu") == []
    for weight, where, act, words in (
        ((32, 32, 5, 5), whole, "relu", "5x5"),
        ((32, 32, 3, 3), ((2, 1), (1, 1), (1, 1), 1), "relu", "stride"),
        ((32, 16, 3, 3), ((1, 1), (1, 1), (1, 1), 2), "relu", "2 groups"),
        ((32, 32, 3, 3), ((1, 1), (3, 1), (1, 1), 1), "relu", "padding"),
        ((32, 8, 3, 3), whole, "relu", "8 to 32 channels"),
        ((32, 32, 3, 3), whole, "silu", "silu"),
    ):
        (reason,) = winograd.why_not(x, weight, where, act)
        assert words in reason


# ---- in a frozen network ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)

    def forward(self, x):
        x = torch.relu(x + 0.5)
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)


def ways(frozen, x):
    executor, inputs, _ = frozen.prepared(x)
    frozen(x)
    return sorted(executor.ways(inputs).values())


def block():
    return scramble(Block()).eval(), torch.randn(2, 32, 28, 28)


def test_the_cost_model_takes_small_tiles_unless_it_is_told_exact():
    net, x = block()
    frozen = fastres.freeze(net, x, tune=False, verify=False)
    assert ways(frozen, x) == ["winograd2"] * 2 and frozen.report.winograd == {"2x2": 2} and frozen.report.held
    assert "Winograd: 2 F(2x2, 3x3)" in str(frozen.report) and "; F(2x2, 3x3)" in frozen.report.table()
    for size in (28, 9, 40):
        compare(net, frozen, torch.randn(3, 32, size, size))
    direct = fastres.freeze(net, x, tune=False, precision="exact")
    assert ways(direct, x) == ["packed"] * 2 and not direct.report.winograd
    assert [4 * row.flops // 9 for row in direct.report.rows[:2]] == [row.products for row in frozen.report.rows[:2]]
    judged = fastres.freeze(net, x, tune=False)
    assert set(ways(judged, x)) <= {"winograd2", "winograd4"} and judged.report.verification
    with pytest.raises(ValueError, match="precision: got 'fast', expected 'auto' or 'exact'"):
        fastres.freeze(net, x, precision="fast")


def test_not_finite_images_run_direct_and_give_eager_s_numbers():
    net, x = block()
    frozen = fastres.freeze(net, x, tune=False)
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in ((0, 0, 0, 0), (1, 31, 27, 27), (0, 7, 13, 14)):
            y = x.clone()
            y[place] = value
            compare(net, frozen, y)


def test_ways_are_kept_in_the_file_and_the_weights_as_they_are(tmp_path):
    net, x = block()
    frozen = fastres.freeze(net, x, tune=False, verify=False)
    executor, inputs, constants = frozen.prepared(x)
    frozen.plan.winograd = 4
    frozen.choose({choices.key: "winograd4" for choices, _ in executor.find_choices(inputs, constants)})
    frozen.save(tmp_path / "net")
    loaded = fastres.load(tmp_path / "net")
    assert ways(loaded, x) == ["winograd4"] * 2 and torch.equal(loaded(x), frozen(x))
    assert (tmp_path / "net").stat().st_size < 2 * sum(t.nbytes for t in net.state_dict().values())


def test_transformed_weights_are_shared_by_image_sizes_and_follow_the_weight():
    net, x = block()
    frozen = fastres.freeze(net, x, tune=False, verify=False)
    executor, inputs, _ = frozen.prepared(x)
    frozen(x), frozen(torch.randn(2, 32, 20, 20))
    held = [{id(t) for t in plan.held} for plan in executor._plans.values()]
    assert len(held) == 2 and held[0] == held[1]
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    frozen.refresh()
    compare(net, frozen, x)


def verdict(ratio):
    return Verification(
        (Row("out", "output", (2,), "float32", *(0.0,) * 6, ratio, ratio <= 2),), "float32", False, False
    )


def all_large():
    net, x = block()
    frozen = fastres.freeze(net, x, tune=False, verify=False)
    frozen.plan.winograd = 4
    executor, inputs, constants = frozen.prepared(x)
    frozen.choose({choices.key: "winograd4" for choices, _ in executor.find_choices(inputs, constants)})
    tune.tell_ways(frozen, x)
    return frozen, x


@pytest.mark.parametrize(("takes", "left", "tile"), [(4, 2, 4), (1, 1, 4), (0, 0, 2), (-1, 0, 0)])
def test_layers_go_back_until_the_referee_takes_the_network(takes, left, tile):
    """A referee that takes so many large tiles; -1: none of Winograd's."""
    frozen, x = all_large()

    def judge():
        taken = ways(frozen, x)
        sound = taken.count("winograd4") <= takes if takes >= 0 else taken == ["packed"] * 2
        return verdict(1.0 if sound else 3.0)

    assert precision.settle(frozen, x, judge)
    assert ways(frozen, x).count("winograd4") == left and frozen.plan.winograd == tile
    notes = " ".join(frozen.report.notes)
    assert ("went from F(4x4, 3x3) to F(2x2, 3x3)" in notes) == (tile > 0 and left < 2)
    assert ("no Winograd" in notes) == (tile == 0)


def test_without_a_verdict_no_large_tile_is_taken_and_without_large_tiles_other_sizes_take_none():
    frozen, x = all_large()
    assert precision.settle(frozen, x, lambda: None) is None
    assert ways(frozen, x) == ["winograd2"] * 2 and frozen.plan.winograd == 2
    frozen.plan.winograd = 4
    tune.tell_ways(frozen, x)
    assert frozen.report.winograd == {"2x2": 2} and precision.settle(frozen, x, lambda: verdict(1.0))
    assert frozen.plan.winograd == 2


def test_a_network_that_is_rejected_for_another_reason_keeps_its_plan():
    frozen, x = all_large()
    assert not precision.settle(frozen, x, lambda: verdict(3.0))
    assert ways(frozen, x) == ["winograd4"] * 2 and frozen.plan.winograd == 4 and not frozen.report.notes


def test_exact_reaches_the_parts_of_a_network_without_a_graph():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Block()

        def forward(self, x):
            y = self.body(x)
            return y if float(y.sum()) < 1e30 else y * 2  # no graph

    net, x = scramble(Odd()).eval(), torch.randn(2, 32, 28, 28)
    for how, way in (("auto", "winograd2"), ("exact", "packed")):
        frozen = fastres.freeze(net, x, tune=False, precision=how)
        frozen(x)
        (executor, inputs, _) = frozen.fallback.body.prepared(x)
        assert list(executor.ways(inputs).values()) == [way] * 2


def test_a_real_verdict_on_large_tiles_of_a_deep_network():
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())]
    net, x = scramble(nn.Sequential(*layers)).eval(), torch.randn(2, 32, 32, 32)
    frozen = fastres.freeze(net, x)
    assert frozen.report.verification and frozen.report.verification.error_ratio <= 2
