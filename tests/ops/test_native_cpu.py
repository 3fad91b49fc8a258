"""The C++ CPU kernels alone: writes past the caches, any number of threads, refusals. What they share with the CUDA
kernels is in test_native.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastres import _extension
from native_case import Case, Lane, check, same

if _extension.native_cpu() is None:
    pytest.skip(f"the compiled CPU kernels are not here: {_extension.why_not_cpu()}", allow_module_level=True)

OPS = torch.ops.fastres
LANE = Lane("cpu")
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


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
    check(Case(LANE, streamed_shape(dtype), dtype, True, training=training, offset=offset))


@TYPES
@LAYOUTS
@pytest.mark.parametrize("shape", [(2, 70, 61, 60), (1, 4100, 9, 11), (8, 96, 7, 7)], ids=str)
def test_results_are_the_same_bits_on_repeats_and_with_any_number_of_threads(shape, channels_last, dtype):
    case = Case(LANE, shape, dtype, channels_last)
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


def test_refusals_name_the_tensor():
    case = Case(LANE, (2, 6, 3, 3), torch.float32, False)
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
