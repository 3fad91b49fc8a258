"""Experiment 3, layer responses (Fig. 7): the standard deviation of each 3x3 layer's response.

    response   the output of a 3x3 layer's BN, before ReLU and addition
    std        over all images, positions and channels together, in double precision

A fused block never writes that tensor: BN, addition and ReLU are one operator. A hook on the BN changes that: a block
with a hooked child runs its stock forward (fastres.nn.steps.is_bare), so hooks see what an unfused network computes.
The paper names neither the images nor the mode. Here: the test images, in evaluation mode (running statistics).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastres.lab import datasets, loop
from fastres.lab.batches import Part
from fastres.lab.devices import pick_device
from fastres.lab.loop_state import RunSpec
from fastres.lab.paper.degradation import KINDS, specs
from fastres.lab.paper.runs import Context, Experiment, folder
from fastres.lab.paper.tables import Comparison, Curve, Outcome, Panel, Table, curve, spread


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The BN of every 3x3 layer, by its convolution's name, in the order of the network.

    A convolution `conv2` belongs to the BN `bn2` next to it, as in every network here and in torchvision.

    >>> from fastres.models import cifar_resnet
    >>> list(layers_of(cifar_resnet(8)))[:3]
    ['conv1', 'layer1.0.conv1', 'layer1.0.conv2']
    """
    found = {}
    for name, module in model.named_modules():
        for child, conv in module.named_children():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and child.startswith("conv"):
                norm = getattr(module, child.replace("conv", "bn", 1), None)
                if isinstance(norm, nn.Module):
                    found[f"{name}.{child}".removeprefix(".")] = norm
    return found


@torch.no_grad()
def responses(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """The standard deviation of each 3x3 layer's response after BN, before ReLU and addition, in evaluation mode.

    Args:
        model: fused or not; its mode and its hooks are restored.
        batches: images [N, C, H, W] on the model's device.

    Returns the deviations by the convolution's name, in the order of the network. Raises ValueError: no batches, or a
    network without 3x3 layers.

    >>> from fastres.models import cifar_resnet
    >>> len(responses(cifar_resnet(20), [torch.randn(2, 3, 8, 8)]))
    19
    """
    norms = layers_of(model)
    if not norms:
        raise ValueError(f"model: got a {type(model).__name__} without 3x3 convolutions conv1, conv2 ... and their bn")
    sums = {name: [0.0, 0.0, 0.0] for name in norms}  # count, sum, sum of squares

    def hook(name: str) -> Any:
        def add(module: nn.Module, _: Any, y: Tensor) -> None:
            y = y.double()
            for i, value in enumerate((float(y.numel()), float(y.sum()), float(y.square().sum()))):
                sums[name][i] += value

        return add

    was_training = model.training
    handles = [norm.register_forward_hook(hook(name)) for name, norm in norms.items()]
    try:
        model.eval()
        for images in batches:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not all(count for count, _, _ in sums.values()):
        raise ValueError("batches: got none, expected at least one that runs through every 3x3 layer")
    return {name: max(0.0, square / n - (total / n) ** 2) ** 0.5 for name, (n, total, square) in sums.items()}


def of_run(context: Context, spec: RunSpec) -> dict[str, float]:
    """The responses of a finished run's network on the test images."""
    data = datasets.load(spec.data, context.place.data_root)
    device = pick_device(context.place.device)
    model = loop.trained(folder(context.place.out, spec), context.place.data_root).to(device)
    return responses(model, (images for images, _ in data.test_batches(128, Part(), device)))


def outcome(context: Context) -> Outcome:
    """The mean response by network, the layers in order and sorted, and the two claims of Fig. 7."""
    preset = context.preset
    stds: dict[str, list[list[float]]] = {}
    for spec in specs(preset):
        context.tell(f"responses of {spec.network}, seed {spec.seed}")
        stds.setdefault(spec.network, []).append(list(of_run(context, spec).values()))
    means = {network: [statistics.fmean(layers) for layers in seeds] for network, seeds in stds.items()}
    table = Table.of(
        f"Standard deviation of the responses of 3x3 layers: {preset.title}",
        {
            "network": str,
            "3x3 layers": lambda network: str(len(stds[network][0])),
            "mean": lambda network: spread(means[network], 1, 3),
            "median": lambda network: spread([statistics.median(layers) for layers in stds[network]], 1, 3),
            "largest": lambda network: spread([max(layers) for layers in stds[network]], 1, 3),
        },
        stds,
        preset.seeds_note(
            ". After BN, before ReLU and addition; over the test images, positions and channels; evaluation mode."
            " Fig. 7 has curves and no numbers."
        ),
    )
    lines = []
    for depth in preset.depths:
        a, b = f"plain{depth}", f"resnet{depth}"
        claim = f"{depth} layers: residual responses are smaller than plain ones"
        lines.append(Comparison(a, means[a], b, means[b], 1).finding(claim, higher=False))
    chain = [statistics.fmean(means[f"resnet{depth}"]) for depth in preset.depths]
    holds = all(a > b for a, b in zip(chain, chain[1:], strict=False))
    text = ", ".join(f"resnet-{d} {m:.3f}" for d, m in zip(preset.depths, chain, strict=True))
    lines.append(f"deeper residual networks have smaller responses - {'yes' if holds else 'no'}: {text}")
    panels = tuple(
        Panel(title, "layer", "standard deviation", tuple(_curves(stds, preset.depths, by_size)), log=True)
        for title, by_size in (("in the order of the network", False), ("sorted", True))
    )
    return Outcome((table,), tuple(lines), panels, {"stds": stds})


def _curves(stds: dict[str, list[list[float]]], depths: tuple[int, ...], by_size: bool) -> Iterable[Curve]:
    for kind in KINDS:
        for color, depth in enumerate(depths):
            seeds = [sorted(layers, reverse=True) if by_size else layers for layers in stds[f"{kind}{depth}"]]
            layers = enumerate(zip(*seeds, strict=True), 1)
            yield curve(layers, f"{kind}-{depth}", color, "dashed" if kind == "plain" else "solid")


EXPERIMENTS = (
    Experiment(3, "responses", "Layer responses", "Fig. 7", specs, outcome, note="the runs are those of degradation"),
)
