"""Memory of a training step: torchvision's ResNets in eager, swapped, and swapped with memory="min".

    python benchmarks/memory.py                        # ResNet-18 and -50, batch 16 at 224x224, fp32
    python benchmarks/memory.py --dtype bf16 --batch 32 --networks resnet50 --results out

    saved    bytes allocated by the forward pass and still alive after it: what backward needs
    kept     saved plus parameters, gradients and SGD's momentum: what a step holds between forward and backward
    peak     the peak of torch's allocator, including what was in use before the step
    RSS      the peak memory of the process, minus what it used after importing torch; CPUs only
    mapped   the same with every tensor mapped separately by the C library (MALLOC_MMAP_THRESHOLD_): without the gaps
             that its heap leaves between tensors of changing sizes, of which memory="min" leaves more

Each measurement runs in its own process, because the C library keeps freed memory. The allocator's figures are exact
and the same in every run; RSS varies by a few percent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import pages
from fastres.lab.results import environment
from measure import Meter
from peers import DTYPES

VARIANTS = ("eager", "swapped", "swapped_min")
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}  # of glibc, in bytes
STEPS = 3


def measure(network: str, variant: str, batch: int, size: int, dtype: str, device: torch.device) -> dict[str, int]:
    """Measure one network and variant in this process: the bytes named above."""
    import torchvision

    import fastres

    rss_before = _rss()
    torch.manual_seed(0)
    net = getattr(torchvision.models, network)(weights=None).to(device, memory_format=torch.channels_last).train()
    if variant != "eager":
        fastres.swap(net, strict=True, memory="min" if variant == "swapped_min" else "default")
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def forward() -> torch.Tensor:
        with nullcontext() if dtype == "fp32" else torch.autocast(device.type, DTYPES[dtype]):
            return F.cross_entropy(net(images), labels)

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    for _ in range(STEPS):
        step()
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    optimizer.zero_grad()
    meter = Meter(device)
    loss = forward()
    saved, _ = meter.end()
    del loss
    parameters = sum(p.numel() * p.element_size() for p in net.parameters())
    there = 2 * parameters + _bytes(net.buffers()) + _bytes([images, labels])  # parameters and momentum
    meter = Meter(device)
    step()
    _, peak = meter.end()
    found = {"parameters": parameters, "saved": saved, "kept": 3 * parameters + saved, "peak": there + peak}
    return found | ({"rss": peak_rss - rss_before} if device.type == "cpu" else {})


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _rss() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_apart(network: str, variant: str, options: argparse.Namespace) -> dict[str, int]:
    """`measure` in a new process; on a CPU in a second one too, for "mapped"."""
    command = [sys.executable, __file__, "--one", variant, "--networks", network]
    command += [
        part for name in ("batch", "size", "dtype", "device") for part in (f"--{name}", str(getattr(options, name)))
    ]

    def run(more: dict[str, str]) -> dict[str, int]:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | more)
        if done.returncode:
            raise RuntimeError(f"{network}, {variant}: {done.stderr.strip().splitlines()[-1:]}")
        return json.loads(done.stdout.splitlines()[-1])

    found = run({})
    return found | ({"mapped": run(MAPPED)["rss"]} if "rss" in found else {})


def table(networks: dict[str, dict[str, dict[str, int]]]) -> list[tuple[str, ...]]:
    """A header, and a row per network and variant: MB, and the ratio to eager's."""
    some = next(iter(networks.values()))["eager"]
    columns = [column for column in ("saved", "kept", "peak", "rss", "mapped") if column in some]
    rows = [("network", "", *(c.upper() if c == "rss" else c for c in columns))]
    for network, variants in networks.items():
        for variant, found in variants.items():
            cells = (f"{found[c] / 1e6:.0f} MB, {found[c] / variants['eager'][c]:.2f}x" for c in columns)
            rows.append((network, variant, *cells))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet18,resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, help="write the table and its data to this folder")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        device = torch.device(options.device)
        one = measure(options.networks, options.one, options.batch, options.size, options.dtype, device)
        print(json.dumps(one))
        return
    networks: dict[str, dict[str, dict[str, int]]] = {}
    for network, variant in itertools.product(options.networks.split(","), VARIANTS):
        print(f"measuring {network}, {variant} ...", file=sys.stderr)
        networks.setdefault(network, {})[variant] = measure_apart(network, variant, options)
    rows = table(networks)
    print("\n".join(pages.aligned(rows)))
    if options.results:
        _write(options, networks, rows)


def _write(options: argparse.Namespace, networks: dict[str, Any], rows: list[tuple[str, ...]]) -> None:
    shape = [options.batch, 3, options.size, options.size]
    where = environment(torch.device(options.device), " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]))
    data = {"schema": "fastres.memory", "environment": where, "dtype": options.dtype}
    data |= {"device": options.device, "shape": shape, "networks": networks}
    lines = [
        *pages.heading("Memory of a training step", where),
        f"Batch {shape}, {options.dtype}, channels_last, SGD with momentum. The columns are explained by",
        "`python benchmarks/memory.py --help`; x is the ratio to eager's.",
        "",
        *pages.markdown_table(rows[0], rows[1:]),
        "",
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"memory-{options.dtype}-{options.device}-torch{pages.torch_version()}"
    pages.write_result(options.results / name, data, "\n".join(lines))


if __name__ == "__main__":
    main()
