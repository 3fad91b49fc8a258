"""Draw a result file: the speed-up of every case over eager with its 95 % interval, wins and losses alike.

The peers of a case share its row, in the order of the legend.

python benchmarks/plot.py out/bench/all-cpu-torch2.11.0.json [picture.png]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastres.lab.errors import MissingExtra
from fastres.lab.results import new_figure, save_png, style
from pages import load

COLORS = {  # from the top of a row to its bottom
    "frozen": "#1f6fb4",
    "channels_last": "#1f6fb4",
    "compile": "#7a7f85",
    "compile_freezing": "#33383d",
    "compile_max_autotune": "#a9adb2",
    "nchw": "#d98c1f",
    "torchscript": "#7b52a8",
    "onnxruntime": "#2c9a6b",
    "openvino": "#c2456f",
    "openvino_throughput": "#e39ab4",
    "cudagraph": "#8a6d3b",
    "jax": "#4bb3c4",
}
NAMES = {"nchw": "NCHW", "compile": "torch.compile", "frozen": "fastres frozen"}


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the PNG: a panel per operator and mode, a row per shape.

    Raises MissingExtra where matplotlib is not installed, OutputError where `path` cannot be written.
    """
    panels = _panels(data)
    columns = min(3, len(panels))
    height = [
        1.3 + 0.3 * max(len(_labels(points)) for _, points in panels[i : i + columns])
        for i in range(0, len(panels), columns)
    ]
    figure = new_figure(max(5.6 * columns, 7.5), sum(height) + 0.8, dpi=110)
    grid = figure.add_gridspec(len(height), columns, height_ratios=height)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(grid[i // columns, i % columns])
        _draw_panel(axes, *panel)
    shown = {name for _, points in panels for _, name, _ in points}
    names = [name for name in COLORS if name in shown]
    handles = [axes.plot([], [], "o", color=COLORS[name], label=NAMES.get(name, name))[0] for name in names]
    figure.legend(handles=handles, loc="outside lower left", ncols=min(6, 3 * columns), frameon=False, fontsize=8)
    where = data["environment"]
    device = where["gpu"]["name"] if where["gpu"] else where["cpu"]["model"]
    figure.suptitle(
        f"Speed-up over eager PyTorch, median and 95 % interval, right of the line is faster\n"
        f"{device}, {where['threads']} threads, torch {where['versions']['torch']}, {where['time'][:10]}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    save_png(figure, path)


Point = tuple[str, str, dict[str, float]]  # label, key of COLORS, ratio


def _panels(data: dict[str, Any]) -> list[tuple[str, list[Point]]]:
    """The points of each panel, by its title."""
    panels: dict[str, list[Point]] = {}
    for case in data["cases"]:
        dtype = f", {case['dtype']}" if case["dtype"] else ""
        form = f" {case['form']}" if "form" in case and case["what"] != "overhead" else ""
        batch = f", batch {case['shape'][0]}" if case["what"] == "conv_act" else ""
        title = case["what"] if case["what"] == "overhead" else f"{case['what']}{form}, {case['mode']}{dtype}{batch}"
        label = _LABELS.get(case["what"], lambda case: str(case["id"]))
        for name, peer in case["peers"].items():
            ratio = peer["speedup"].get(case["baseline"])
            if ratio is None or name in ("eager", "eager_channels_last"):
                continue
            panels.setdefault(title, []).append((label(case), _color(case, name), ratio))
    return list(panels.items())


def _color(case: dict[str, Any], peer: str) -> str:
    """A key of COLORS: the engine, or else the layout."""
    engine = peer.removesuffix("_channels_last")
    if engine in COLORS:
        return engine
    return "channels_last" if "channels_last" in f"{peer} {case['layout']}" else "nchw"


_LABELS: dict[str, Callable[[dict[str, Any]], str]] = {  # of a row, by the case's what; else its id
    "bn_act": lambda case: "x".join(map(str, case["shape"][1:])),
    "add_relu": lambda case: "x".join(map(str, case["shape"][1:])),
    "conv_act": lambda case: str(case["id"]).rsplit("-", 2)[0],
    "networks": lambda case: f"{case['network']}, batch {case['shape'][0]}",
    "blocks": lambda case: f"{case['network']} {case['block']}",
    "train": lambda case: str(case["network"]),
}


def _labels(points: list[Point]) -> list[str]:
    return list(dict.fromkeys(label for label, _, _ in points))


def _draw_panel(axes: Any, title: str, points: list[Point]) -> None:
    labels = _labels(points)
    colors = [name for name in COLORS if any(color == name for _, color, _ in points)]
    for label, color, ratio in points:
        place = labels.index(label) + 0.6 * ((colors.index(color) + 0.5) / len(colors) - 0.5)
        axes.plot([ratio["low"], ratio["high"]], [place, place], color=COLORS[color], linewidth=1.6)
        axes.plot(ratio["median"], place, "o", color=COLORS[color], markersize=4.5)
    axes.axvline(1.0, color="#c8452f", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    lows, highs = zip(*((ratio["low"], ratio["high"]) for _, _, ratio in points), strict=True)
    axes.set_xlim(min(0.8, *lows) - 0.05, max(1.2, *highs) + 0.1)
    style(axes, title, grid="x", size=8.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print("usage: python benchmarks/plot.py RESULT.json [PICTURE.png]", file=sys.stderr)
        return 2
    source = Path(arguments[0])
    target = Path(arguments[1]) if len(arguments) == 2 else source.with_suffix(".png")
    try:
        draw(load(source), target)
    except (OSError, ValueError, MissingExtra) as error:
        print(f"plot: {source}: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
