"""conv_act's CUDA kernels on a GPU, each of the build by name: repeats, streams, graphs, devices, how many launches a
call is, tensors of more than 2^31 elements, what they say of themselves. Values are in test_gpu_conv.py."""

import ctypes
from collections import Counter

import pytest
import torch

from fastres import _extension
from fastres.functional import conv_act
from gpu_conv import ACTS, BACKEND, KERNELS, LAST, exact, integers, kernels_for, launch, need, pairs, random, refusal
from gpu_device import DEVICE, DRY, captured, late_on_another_stream, memory_for, needs_device, needs_gpus, on_gpu_alone

pytestmark = [pytest.mark.gpu, needs_device, pytest.mark.usefixtures("tf32")]
DTYPES = pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
# N, C, K, H and W, kernel: several waves of tiles; fewer tiles than multiprocessors and a deep sum, for stream-K
SIZES = ((8, 72, 264, 40, 3), (2, 512, 136, 9, 3), (9, 256, 520, 14, 1)) if not DRY else ((2, 24, 40, 5, 3),)


def problem(dtype, n, c, k, size, r, residual=True):
    """x, weight, bias, residual; and the geometry."""
    x, weight = random((n, c, size, size), dtype), random((k, c, r, r), dtype, (c * r * r) ** -0.5)
    bias = torch.randn(k, device=DEVICE).to(dtype)
    return [x, weight, bias, random((n, k, size, size), dtype) if residual else None], pairs(1, r // 2)


# ---- repeats, streams, graphs ----------------------------------------------------------------------------------------


def test_row45_twenty_repeats_are_bitwise_equal(kernel):
    for size in SIZES:
        tensors, how = problem(getattr(torch, kernel.element), *size)
        first = launch(kernel, *tensors, how, "relu")
        assert first.isfinite().all()
        for _ in range(19):
            assert torch.equal(launch(kernel, *tensors, how, "relu"), first), size


@on_gpu_alone
def test_row27_a_graph_captures_it_and_replays_see_new_inputs(kernel):
    for size in SIZES:
        tensors, how = problem(getattr(torch, kernel.element), *size)
        c = size[1]
        graph, y = captured(lambda tensors=tensors, how=how: launch(kernel, *tensors, how, "relu"))
        for seed in range(4):
            for t in tensors:
                t.normal_(0, 1 + seed).mul_(c**-0.5 if t is tensors[1] else 1)
            y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, launch(kernel, *tensors, how, "relu")), size


@on_gpu_alone
def test_row30_the_current_stream_is_used(kernel):
    tensors, how = problem(getattr(torch, kernel.element), *SIZES[1])
    wanted = launch(kernel, *tensors, how, "relu")
    y = late_on_another_stream(tensors[0], lambda late: launch(kernel, late, *tensors[1:], how, "relu"))
    assert torch.equal(y, wanted)


@on_gpu_alone
def test_two_streams_at_once_do_not_share_a_workspace(kernel):
    tensors, how = problem(getattr(torch, kernel.element), *SIZES[1])
    wanted = launch(kernel, *tensors, how, "relu")
    streams, found = [torch.cuda.Stream() for _ in range(3)], []
    torch.cuda.synchronize()
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(launch(kernel, *tensors, how, "relu"))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in found)


@needs_gpus(2)
def test_row28_the_tensors_own_device_is_used(kernel):
    if not kernel.runs_on(torch.cuda.get_device_capability(1)):
        pytest.skip(f"needs compute capability {kernel.architecture / 10} of the second GPU")
    tensors, how = problem(getattr(torch, kernel.element), *SIZES[1])
    wanted = launch(kernel, *tensors, how, "relu")
    there = [t.to("cuda:1") for t in tensors]
    with torch.cuda.device(0):
        y = launch(kernel, *there, how, "relu")
        assert torch.cuda.current_device() == 0
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert torch.equal(y.cpu(), wanted.cpu())
    error = (y.cpu().double() - wanted.cpu().double()).abs().max()
    assert error <= 2**-7 * wanted.abs().max().item()


# ---- launches --------------------------------------------------------------------------------------------------------


NODES = {0: "kernel", 1: "copy", 2: "memset"}  # CUgraphNodeType


def launches(call):
    """What a call puts into a stream, by kind: the nodes of its graph, as the driver lists them."""
    driver, (graph, _) = ctypes.CDLL("libcuda.so.1"), captured(call, keep_graph=True)
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    assert driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)) == 0
    found = Counter()
    for node in nodes:
        kind = ctypes.c_int()
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        found[NODES.get(kind.value, kind.value)] += 1
    return found


@on_gpu_alone
def test_a_call_is_one_kernel(kernel):
    """And where blocks share the depth, one memset of the workspace in which they count."""
    for size in SIZES:
        for residual in (True, False):
            tensors, how = problem(getattr(torch, kernel.element), *size, residual=residual)
            found = launches(lambda t=tensors, how=how: launch(kernel, *t, how, "relu"))
            allowed = [{"kernel": 1}, {"kernel": 1, "memset": 1}] if kernel.splits_depth else [{"kernel": 1}]
            assert dict(found) in allowed, size


@on_gpu_alone
@DTYPES
def test_a_call_of_the_backend_copies_nothing(dtype):
    """channels_last inputs and weights; others are copied, as a check of the count itself."""
    kernels_for(dtype)
    tensors, how = problem(dtype, *SIZES[0])
    for act in ACTS:
        found = launches(lambda act=act: conv_act(*tensors, **how, act=act, backend=BACKEND))
        assert found["kernel"] == 1 and set(found) <= {"kernel", "memset"}
    other = [tensors[0].contiguous(), *tensors[1:]]
    found = launches(lambda: conv_act(*other, **how, backend=BACKEND))
    assert found["kernel"] + found["copy"] == 2


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("r", (1, 3))
@on_gpu_alone
def test_row1_above_two_to_the_31_elements_or_a_refusal(kernel, r):
    n, c, side, dtype, how = 33, 64, 1024, getattr(torch, kernel.element), pairs(1, r // 2)
    x = torch.empty((n, c, side, side), device="meta", dtype=dtype)
    assert x.numel() > 2**31
    weight = integers((c, c, r, r), dtype).contiguous(memory_format=LAST)
    reason = refusal(kernel, x, weight, how)
    if reason:
        assert "must be smaller than 2 GiB" in reason
        return
    memory_for(2 * x.numel() * dtype.itemsize / 2**30 + 8)
    x = torch.empty((n, c, side, side), dtype=dtype, device=DEVICE, memory_format=LAST).random_(-2, 3)
    y = launch(kernel, x, weight, None, None, how, "relu")
    assert not any(image.isnan().any() for image in y)
    for i in (0, 7, 8, 15, 16, 31, 32):  # on either side of 2^31 and 2^32 elements and bytes
        for top in range(0, side, 256):  # with the rows above and below that a kernel of 3 reads
            low, high = max(top - r // 2, 0), min(top + 256 + r // 2, side)
            z = exact(x[i : i + 1, :, low:high], weight, None, None, how)[:, :, top - low :][:, :, :256]
            assert torch.equal(y[i : i + 1, :, top : top + 256], torch.relu(z).to(dtype)), (i, top)


# ---- what they say of themselves -------------------------------------------------------------------------------------


@on_gpu_alone
def test_every_kernel_has_attributes_and_spills_nothing():
    if KERNELS == [None]:
        need(None)
    names = {"float16": "half", "bfloat16": "bfloat16", "float32": "float"}
    attributes = _extension.kernel_attributes()
    here = [k for k in KERNELS if k.runs_on(torch.cuda.get_device_capability())]
    assert here
    for kernel in here:
        found = attributes[f"conv_act<{names[kernel.element]}, {kernel.name}>"]
        assert found["local_bytes"] == 0 and found["blocks_per_multiprocessor"] >= 1, (kernel, found)
        assert found["threads"] == kernel.threads and found["shared_bytes"] >= kernel.shared_bytes, (kernel, found)
        assert found["registers"] * kernel.threads <= 65536, (kernel, found)
