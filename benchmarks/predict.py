"""Throughput of fastres.predict over JPEG files against that of the frozen network alone, in images/s.

    python benchmarks/predict.py
    python benchmarks/predict.py --network resnet18 --dtype bf16 --workers 1 --rounds 5

The files are 224x224 pieces of the photographs that come with scikit-learn. A round runs both, the network on one batch
that is in memory; a rate is from the first batch to the last, so that the start of the workers, once in a run, is not
in it. Rows are written to a file, as in a run that can be resumed. The result is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import fastres
from fastres.lab.devices import pick_device
from fastres.lab.results import environment, write_json
from fastres.pipelines.images import Decoder


def photographs(folder: Path, count: int) -> None:
    """Write `count` JPEG files, each another piece."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640x427
    for place in range(count):
        x, y = place * 37 % 416, place * 23 % 203
        pictures[place % 2].crop((x, y, x + 224, y + 224)).save(folder / f"{place:06}.jpg", quality=90)


def network_rate(network: fastres.FrozenModel, images: torch.Tensor, batches: int) -> float:
    """Images/s of the network alone, its answers read back as predict does."""
    start = time.perf_counter()
    for _ in range(batches):
        network(images).softmax(1).topk(5)[1].tolist()
    return batches * len(images) / (time.perf_counter() - start)


def pipeline_rate(network: fastres.FrozenModel, folder: Path, out: Path, batch: int, workers: int) -> float:
    """Images/s of predict, from the end of the first batch to that of the last."""
    rows = fastres.predict(network, folder, out=out, batch=batch, workers=workers)
    start = count = 0
    for count, row in enumerate(rows, 1):
        assert row["error"] is None
        if count == batch:
            start = time.perf_counter()
        end = time.perf_counter()
    out.unlink()
    return (count - batch) / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="of torchvision")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="a JSON file")
    options = parser.parse_args()
    import torchvision

    device = pick_device(options.device)
    model = getattr(torchvision.models, options.network)(weights=None).eval().to(device)
    example = Decoder(None, 224).example(options.batch).to(device)
    network = fastres.freeze(model, example[:16], dtype=options.dtype)
    about = environment(device, shlex.join(["python", *sys.argv]))
    where = about["gpu"]["name"] if about["gpu"] else about["cpu"]["model"]
    print(f"{where}, {about['threads']} threads, torch {torch.__version__}, commit {about['commit']}")
    print(
        f"{options.network} {options.dtype}, batch {options.batch}, {options.workers} workers, {options.images} files\n"
    )
    found: dict[str, list[float]] = {"network": [], "predict": []}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").mkdir()
        photographs(Path(folder) / "images", options.images)
        network_rate(network, example, 2)
        print("| network, images/s | predict, images/s | predict over network |\n| --- | --- | --- |")
        for _ in range(options.rounds):
            found["network"].append(network_rate(network, example, max(1, options.images // options.batch // 2)))
            out = Path(folder) / "out.jsonl"
            found["predict"].append(
                pipeline_rate(network, Path(folder) / "images", out, options.batch, options.workers)
            )
            alone, whole = (rates[-1] for rates in found.values())
            print(f"| {alone:.1f} | {whole:.1f} | {whole / alone:.1%} |", flush=True)
    ratio = statistics.median(whole / alone for alone, whole in zip(*found.values(), strict=True))
    print(f"\nmedian: {ratio:.1%}")
    if options.results:
        write_json(options.results, {**about, "images_per_s": found, "ratio": ratio})


if __name__ == "__main__":
    main()
