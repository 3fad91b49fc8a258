"""Write the tables of README.md and docs/performance.md, and docs/result.svg, from the files of benchmarks/results.

    python benchmarks/tables.py

A table stands between `<!-- table: KIND FILE -->` and `<!-- end -->`; what was there is replaced. Needs no package.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PICTURE, PICTURED = ROOT / "docs/result.svg", "networks-inference-cpu-torch2.11.0.json"
PAGES = (ROOT / "README.md", ROOT / "docs/performance.md")
MARKED = re.compile(r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.S)
Data = dict[str, Any]


def ratio(found: Data) -> str:
    """A ratio with its 95 % interval."""
    return f"{found['median']:.2f}x [{found['low']:.2f}, {found['high']:.2f}]"


def demo(data: Data) -> list[list[str]]:
    """`fastres demo`: the rows of ResNet-50 on the photographs."""
    rows = [["", "images/s", "ms", "ratio to eager", "referee (2 passes)"]]
    for row in data["photographs"]["rows"]:
        verdict, over = row["verdict"], row["ratio_to_eager"]
        judged = f"passed ({verdict['error_ratio']:.2f})" if verdict else ""
        rows.append([row["name"], f"{row['images_per_s']:.1f}", f"{row['ms']:.1f}", ratio(over) if over else "1.00x"])
        rows[-1].append(judged or "is eager")
    return rows


ENGINES = {
    "eager": ("eager", "eager_channels_last"),
    "TorchScript": ("torchscript",),
    "torch.compile": ("compile", "compile_freezing"),
    "ONNX Runtime": ("onnxruntime",),
    "OpenVINO": ("openvino", "openvino_throughput"),
}


def fastest(case: Data, peers: tuple[str, ...]) -> str | None:
    """The faster mode of an engine, or None where it was not run."""
    there = [peer for peer in peers if peer in case["peers"]]
    return min(there, key=lambda peer: case["peers"][peer]["median"], default=None)


def networks(data: Data) -> list[list[str]]:
    """bench_networks: how many times faster the frozen network is than each engine, in its faster mode."""
    rows = [["", "frozen", *(f"over {name}" for name in ENGINES)]]
    for case in data["cases"]:
        frozen = case["peers"]["frozen"]
        name = f"{case['network'].replace('resnet', 'ResNet-')} {case['dtype']}, batch {case['shape'][0]}"
        cells = [name, f"{1e3 * frozen['median']:.3g} ms"]
        for peers in ENGINES.values():
            name = fastest(case, peers)
            cells.append(ratio(frozen["speedup"][name]) if name else "not run")
        rows.append(cells)
    return rows


def train(data: Data) -> list[list[str]]:
    """bench_train: one SGD step over eager channels_last, and the bytes at its peak."""
    shown = {"eager_channels_last": "eager", "swapped_channels_last": "swapped"}
    shown |= {"swapped_min_channels_last": 'swapped, `memory="min"`', "compile_channels_last": "torch.compile"}
    rows = [["", *shown.values()]]
    for case in data["cases"]:
        cells = [f"{case['network'].replace('resnet', 'ResNet-')} {case['dtype']}"]
        for name in shown:
            peer = case["peers"][name]
            over = ratio(peer["speedup"]["eager_channels_last"]) if name != "eager_channels_last" else "1.00x"
            cells.append(f"{over}, {peer['peak_bytes'] / 1e6:.0f} MB")
        rows.append(cells)
    return rows


def operators(data: Data) -> list[list[str]]:
    """An operator over eager in the same layout, over all its shapes."""
    rows = [["", "median", "range", "1.3x or more"]]
    for layout, name in (("nchw", "NCHW"), ("channels_last", "channels_last")):
        cases = [case for case in data["cases"] if case["layout"] == layout]
        found = [case["peers"]["fastres"]["speedup"]["eager"]["median"] for case in cases]
        least, most = min(found), max(found)
        above = f"{sum(one >= 1.3 for one in found)} of {len(found)}"
        rows.append([name, f"{statistics.median(found):.2f}x", f"{least:.2f} to {most:.2f}", above])
    return rows


def int8(data: Data) -> list[list[str]]:
    """benchmarks/int8.py: int8 networks of each engine, images/s and the SNR of the logits."""
    engines = {"fastres int8": "fastres", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
    rows = [["", *(f"{name}, images/s (SNR)" for name in engines.values()), "fastres bf16, images/s"]]
    for network, batch in dict.fromkeys((row["network"], row["batch"]) for row in data["rows"]):
        found = {row["engine"]: row for row in data["rows"] if (row["network"], row["batch"]) == (network, batch)}
        rate = {engine: 1e3 * batch / row["ms"] for engine, row in found.items()}
        cells = [
            f"{rate[engine]:.0f} ({found[engine]['snr']:.1f} dB)" if engine in found else "-" for engine in engines
        ]
        rows.append([f"{network.replace('resnet', 'ResNet-')}, batch {batch}", *cells, f"{rate['fastres bf16']:.0f}"])
    return rows


KINDS: dict[str, Callable[[Data], list[list[str]]]] = {
    "demo": demo,
    "int8": int8,
    "networks": networks,
    "operators": operators,
    "train": train,
}


def written(text: str) -> str:
    """The text of a page with its tables made anew."""

    def table(found: re.Match[str]) -> str:
        head, *rows = KINDS[found[2]](json.loads((RESULTS / found[3]).read_text()))
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
        return found[1] + "\n" + "\n".join(lines) + "\n\n" + found[4]

    return MARKED.sub(table, text)


STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#24292f}.h{font-weight:600}.n{text-anchor:end}rect{fill:#9aa4b1}"
    ".us{fill:#2f6fd0}@media(prefers-color-scheme:dark){text{fill:#d5dae1}rect{fill:#5d6876}.us{fill:#6ea2f5}}"
)


def picture(data: Data, network: str = "resnet50", batch: int = 8) -> str:
    """An SVG: images/s of a network by each engine that ran it, a group of bars for each type."""
    cases = [case for case in data["cases"] if case["network"] == network and case["shape"][0] == batch]
    engines = {**ENGINES, "fastres frozen": ("frozen",)}
    most = max(peer["images_per_s"] for case in cases for peer in case["peers"].values() if peer["images_per_s"])
    lines, y = [], 0
    for case in cases:
        y += 26
        title = f"{network.replace('resnet', 'ResNet-')}, {case['dtype']}, batch {batch}: images/s"
        lines.append(f'<text class="h" x="4" y="{y}">{title}</text>')
        for name, peers in engines.items():
            mode = fastest(case, peers)
            if mode is None:
                continue
            rate, us = case["peers"][mode]["images_per_s"], ' class="us"' if mode == "frozen" else ""
            y += 22
            lines.append(f'<text class="n" x="116" y="{y}">{name}</text>')
            lines.append(f'<rect{us} x="124" y="{y - 12}" width="{300 * rate / most:.1f}" height="15" rx="2"/>')
            lines.append(f'<text x="{130 + 300 * rate / most:.1f}" y="{y}">{rate:.1f}</text>')
        y += 8
    cpu = data["environment"]["cpu"]
    about = f"{cpu['model']}, {cpu['isa']}, {data['environment']['threads']} threads, torch "
    about += f"{data['environment']['versions']['torch']}, {data['environment']['time'][:10]}; longer is faster"
    lines.append(f'<text x="4" y="{y + 20}" style="font-size:12px">{about}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 {y + 30}" width="640" role="img">'
    return "\n".join([head, f"<title>{about}</title><style>{STYLE}</style>", *lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(json.loads((RESULTS / PICTURED).read_text())))
    for page in PAGES:
        page.write_text(written(page.read_text()))
