"""Memory of a service: ResNet-18 in eager and frozen, called by 4 threads with images of changing batches and sizes.

    python benchmarks/service.py                     # 5 minutes each
    python benchmarks/service.py --seconds 60 --network resnet50 --results out

Each variant runs in a process of its own; its resident memory is sampled every second. The result is the peak, the rise
after the first minute, and a plot.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from fastres.lab.results import environment

VARIANTS = ("eager", "frozen")
THREADS, BATCHES, SIZES = 4, range(1, 17), (224, 256, 320)


def serve(network: str, variant: str, seconds: float) -> list[float]:
    """Resident megabytes of this process, a number a second, while the threads call the network."""
    import torchvision

    import fastres

    net = getattr(torchvision.models, network)(weights=None).eval()
    model = net if variant == "eager" else fastres.freeze(net, torch.randn(2, 3, 224, 224))
    torch.set_num_threads(1)
    end = time.monotonic() + seconds

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            size = draw.choice(SIZES)
            with torch.no_grad():
                model(torch.randn(draw.choice(BATCHES), 3, size, size))

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(THREADS)]
    for one in clients:
        one.start()
    found = []
    while time.monotonic() < end:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found.append(pages * 4096 / 1e6)
        time.sleep(1)
    for one in clients:
        one.join()
    return found


def plot(found: dict[str, list[float]], network: str, path: Path) -> None:
    """Resident memory over time, a line a variant."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
    for variant, samples in found.items():
        axes.plot(range(len(samples)), samples, label=f"{variant}: peak {max(samples):,.0f} MB")
    axes.set(xlabel="seconds", ylabel="resident MB", ylim=(0, None))
    axes.set_title(f"{network}, {THREADS} threads, batches 1 to 16, {', '.join(map(str, SIZES))} pixels", fontsize=10)
    axes.legend(loc="lower right")
    axes.figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", help="of torchvision")
    parser.add_argument("--seconds", type=float, default=300.0, help="for each variant")
    parser.add_argument("--results", type=Path, help="folder for the JSON and the plot")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # run this one here
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(serve(options.network, options.variant, options.seconds)))
        return
    found = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--network", options.network, "--seconds", str(options.seconds)]
        done = subprocess.run([*command, "--variant", variant], stdout=subprocess.PIPE, text=True, check=True)
        found[variant] = samples = json.loads(done.stdout)
        rise = max(samples[60:], default=samples[-1]) - max(samples[:60])
        print(f"{variant:7} peak {max(samples):,.0f} MB; after the first minute {rise:+,.0f} MB")
    print(f"frozen over eager: {max(found['frozen']) / max(found['eager']):.2f}x")
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / f"service-cpu-torch{torch.__version__.partition('+')[0]}.json"
        about = environment(torch.device("cpu"), " ".join(["python", "benchmarks/service.py", *sys.argv[1:]]))
        path.write_text(json.dumps({**about, "resident_megabytes": found}, indent=1))
        plot(found, options.network, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
