"""Where tests marked `gpu` run: on the GPU, or with FASTRES_TEST_DEVICE=cpu on the CPU, as far as it can stand for one.

The second is for `make gpu-dry-run`: it proves that the tests themselves run, and nothing about a GPU.
"""

import os

import pytest
import torch

DRY = os.environ.get("FASTRES_TEST_DEVICE") == "cpu"
DEVICE = torch.device("cpu" if DRY else "cuda")

needs_device = pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="no CUDA device")
on_gpu_alone = pytest.mark.skipif(DRY, reason="dry run: streams and CUDA graphs are a GPU's")


def needs_gpus(count):
    """A mark: skipped where there are fewer."""
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs")


def memory_for(gigabytes):
    """Skip where less memory is free."""
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free:.0f} are free")


def shifted(t, offset=1):
    """The same values and strides, `offset` elements off an aligned address."""
    flat = torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)
    return flat.as_strided(t.shape, t.stride(), offset).copy_(t)


def captured(call, warm_up=1, **how):
    """(a CUDA graph of the call, which has run before on a stream of its own; what the captured call returned)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph(**how)
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


def late_on_another_stream(x, call):
    """call(x) on a side stream, where x arrives after a long wait: a kernel that ran elsewhere would read zeros."""
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        y = call(late)
    stream.synchronize()
    return y
