"""Throughput of the input pipeline against that of the training step it feeds, in images/s.

    OMP_NUM_THREADS=1 python benchmarks/input_pipeline.py

CIFAR-10: 50,000 uint8 images in memory, centered, padded, cropped and flipped a batch at a time; ResNet-20. ImageNet:
the photographs that come with scikit-learn, as JPEG files of 500x375, decoded and cropped by worker processes;
ResNet-50. CIFAR-10's pixels are random here, since nothing is trained to the end.
"""

import argparse
import itertools
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastres.lab import networks
from fastres.lab.datasets import InMemory, Part, load
from fastres.lab.devices import channels_last, pick_device
from fastres.lab.recipes import TrainRecipe
from fastres.lab.results import environment


def rate(batches, count, batch_size, use=lambda images, labels: None):
    """Images/s over `count` batches, after a first untimed one."""
    batches = iter(batches)
    use(*next(batches))
    start = time.perf_counter()
    for images, labels in itertools.islice(batches, count):
        use(images, labels)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count * batch_size / (time.perf_counter() - start)


def compare(name, data, network, recipe, device, count, pipeline_count):
    net = channels_last(networks.build(network, data.classes, data.channels).to(device))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)

    def step(images, labels):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    batch = next(data.batches(recipe, 0, 0, Part(), device))
    steps = rate(itertools.repeat(batch), count, recipe.batch_size, step)
    input_rate = rate(data.batches(recipe, 0, 0, Part(), device), pipeline_count, recipe.batch_size)
    ratio, batch_size = input_rate / steps, recipe.batch_size
    print(f"| {name} | {input_rate:,.0f} | {network}, batch {batch_size} | {steps:,.1f} | {ratio:,.0f}x |")


def photographs(root, count=64):
    """Write `count` JPEG files of ImageNet's usual size to each of ROOT/train and ROOT/val."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(pixels).resize((500, 375)) for pixels in load_sample_images().images]
    for part, i in itertools.product(("train", "val"), range(count)):
        folder = root / part / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pictures[i % 2].save(folder / f"{i}.JPEG", quality=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    about = environment(device, shlex.join(["python", *sys.argv]))
    where = about["gpu"]["name"] if about["gpu"] else about["cpu"]["model"]
    print(f"{where}, {about['threads']} threads, torch {torch.__version__}, commit {about['commit']}\n")
    print("| data | input, images/s | step | images/s | input over step |\n| --- | --- | --- | --- | --- |")
    pixels = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (50_000,))
    cifar = InMemory("cifar10", 10, (pixels, labels), (pixels[:100], labels[:100]))
    recipe = TrainRecipe("cifar", 128, 10_000, 0.1, (), augment="cifar")
    compare("CIFAR-10 in memory", cifar, "resnet20", recipe, device, arguments.steps, 100)
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder))
        data = load("imagenet", Path(folder), arguments.workers)
        recipe = TrainRecipe("imagenet", 16, 10_000, 0.1, (), augment="imagenet")
        name = f"ImageNet, {arguments.workers} workers"
        compare(name, data, "resnet50", recipe, device, arguments.steps, 20)


if __name__ == "__main__":
    main()
