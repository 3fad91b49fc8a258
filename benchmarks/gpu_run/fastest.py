"""The summary of convs.json: the fastest backends, and our best kernel against cuDNN at ResNet-50's layers."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

BACKENDS = ("cudnn", "triton")
Entry = dict[str, Any]


def best(entry: Entry) -> str | None:
    """The fastest of our kernels, or None if none was measured."""
    own = [name for name in entry["ms"] if name not in BACKENDS]
    return min(own, key=entry["ms"].__getitem__) if own else None


def winner(entry: Entry) -> str:
    name: str = min(entry["ms"], key=entry["ms"].__getitem__)
    return name if name in BACKENDS else "cuda"


def message(entries: list[Entry], planned: int) -> str:
    """One line: how many were measured, and how often each backend was the fastest."""
    found = Counter(winner(entry) for entry in entries)
    fastest = ", ".join(f"{name} at {found[name]}" for name in ("cuda", *BACKENDS) if found[name])
    return f"{len(entries)} of {planned} convolutions measured" + (f"; fastest: {fastest}" if fastest else "")


def first(entries: list[Entry]) -> list[Entry]:
    """ResNet-50's layers in fp16 at the largest batch, which are measured first."""
    fifty = [e for e in entries if e["dtype"] == "float16" and e["counts"]["resnet50"] and best(e) is not None]
    batch = max((e["shape"][0] for e in fifty), default=0)
    return [e for e in fifty if e["shape"][0] == batch]


def yardstick(entry: Entry, conv: str) -> float | None:
    """Milliseconds of cuDNN's convolution plus the rest of the work: the bias, and one pass over the residual."""
    beside = entry["beside"]
    parts = [beside.get(conv), beside.get("read") if entry["residual"] else 0.0]
    return None if None in parts else float(sum(parts))


def bar(entries: list[Entry], residual: bool, conv: str, against: str) -> list[str]:
    """One line: the speed-up of our best kernels over the yardstick, and where they are slowest."""
    ratios = {}
    for entry in entries:
        name, least = best(entry), yardstick(entry, conv)
        if entry["residual"] == residual and name is not None and least is not None:
            ratios[entry["conv"]] = least / entry["ms"][name]
    if not ratios:
        return []
    worst = min(ratios, key=ratios.__getitem__)
    slower = sum(ratio < 1 for ratio in ratios.values())
    which, median = "with" if residual else "without", statistics.median(ratios.values())
    plus = " + reading the residual" if residual else ""
    least_of_all = f"least {ratios[worst]:.2f}x ({worst}), {slower} below 1x"
    return [f"{len(ratios)} {which} a residual: median {median:.2f}x {against}{plus}, {least_of_all}"]


def lines(entries: list[Entry]) -> list[str]:
    """The bars, then a line per layer, the smallest speed-up over cuDNN first."""
    found = first(entries)
    if not found:
        return []
    about = [f"cuda at ResNet-50 in fp16, batch {found[0]['shape'][0]}, over cuDNN, each with its bias:"]
    for conv, against in (("conv_bias", "conv + bias"), ("conv_bias_tuned", "conv + bias by its fastest plan")):
        about += bar(found, False, conv, against) + bar(found, True, conv, against)
    layers = []
    for entry in found:
        name, least = best(entry), yardstick(entry, "conv_bias")
        ratio = least / entry["ms"][name] if least else 0.0
        text = f"{ratio:.2f}x conv + bias" if least else "nothing to compare with"
        others = "".join(f", {other} {entry['ms'][other]:.3f}" for other in BACKENDS if other in entry["ms"])
        layers.append((ratio, f"{entry['conv']}: {text}; {name} {entry['ms'][name]:.3f} ms{others}"))
    return about + [text for _, text in sorted(layers, key=lambda layer: layer[0])]
