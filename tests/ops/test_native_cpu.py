"""The C++ CPU kernels alone: writes past the caches, any number of threads, 16-bit parameters. What they share with the
CUDA kernels is in test_native.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastres import _extension
from native_case import Case, Lane, assert_close, check, per_channel, same

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


@TYPES
@LAYOUTS
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_what_is_written_over_takes_16_bit_parameters_and_no_statistics(stored, channels_last, dtype):
    case = Case(LANE, (2, 19, 5, 7), dtype, channels_last, training=False)
    for name in ("weight", "bias", "mean", "var"):
        setattr(case, name, getattr(case, name).to(stored))
    want, _, _ = case.forward64()
    assert_close(case.run(case.x.clone(), overwrite=True)[0], want, 24)
    given = case.x.clone(), case.weight, case.bias, case.residual, None, None, None
    y, _, _ = OPS._bn_act_native(*given, False, 0.0, 1e-5, True, True)
    z = case.x.double() * per_channel(case.weight.double()) + per_channel(case.bias.double()) + case.residual.double()
    assert_close(y, torch.relu(z), 24)


def test_build_info_says_how_it_was_built():
    module = _extension.native_cpu()
    info = module.build_info()
    assert (
        info["schema_version"] == _extension.SCHEMA_VERSION
        and info["torch_target"] == "2.11"
        and info["cxx_std"] >= 201703
    )
    assert info["isa_runtime"] in ("baseline", "avx2", "avx512", "amx") and info["compiler"].split()[0] in (
        "gcc",
        "clang",
    )
    assert module.kernel_attributes() == {}
